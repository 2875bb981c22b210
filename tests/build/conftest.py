"""Where nvcc is; compilers that only pretend."""

import os
import shutil

import pytest

from tests.build.building import copy_of_the_sources


@pytest.fixture(scope="session")
def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None and "cuda" in os.environ.get("EAP_REQUIRE", "").split(","):
        pytest.fail("EAP_REQUIRE asks for cuda, and nvcc was not found")
    return found or pytest.skip("nvcc was not found")


@pytest.fixture
def tools(tmp_path):
    """A copy of the package; an nvcc that knows sm_80 and fails on everything; a g++ that makes empty files."""
    folder = copy_of_the_sources(tmp_path / "source")
    scripts = {
        "cuda/bin/nvcc": "[ $1 = --list-gpu-code ] && echo sm_80 && exit 0\nexit 1",
        "g++": 'while [ "$1" != -o ]; do shift; done; touch "$2"',
    }
    for name, script in scripts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return folder, {"CXX": str(tmp_path / "g++"), "CUDA_HOME": str(tmp_path / "cuda")}
