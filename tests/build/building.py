"""Builds of a copy of the package, for tests; most with compilers that only pretend."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A folder's name that the shell, ninja and make would each read as something else.
ODD = "my drive (é) & 'q' \"$HOME\" #1;%"


def copy_of_the_sources(folder):
    """Of what builds read: a build leaves files beside the sources."""
    hidden = shutil.ignore_patterns("*.so", "__pycache__", "_build_failure.txt", "build")
    for name in ("csrc", "eap_kernels", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=hidden)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def build(folder, **env):
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    clean = dict.fromkeys(("EAP_CUDA", "EAP_REQUIRE_EXT", "TORCH_CUDA_ARCH_LIST"), "") | {"PYTHONPATH": str(folder)}
    env = {**os.environ, **clean, **env}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def torch_of(folder, cuda):
    """A torch folder as far as building looks into it."""
    (folder / "include/torch/csrc/stable").mkdir(parents=True)
    (folder / "include/torch/csrc/stable/library.h").touch()
    (folder / "version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\nhip = None\n")
    return str(folder)


def why_no_cuda(folder):
    """The clause that the build gave to the module that describes it."""
    (description,) = folder.glob("build/*/build.ninja")
    return re.search(r'-DEAP_CUDA_FAILURE="(.*?)"', description.read_text())[1]
