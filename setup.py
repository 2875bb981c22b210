"""Builds the native modules of eap_kernels with ninja. Needs torch's headers only: LibTorch stable ABI, abi3.

Where there is no compiler or no torch the package installs as pure Python and records why; EAP_REQUIRE_EXT=1
makes that an error. EAP_TORCH_DIR names a torch folder, CXX a compiler, MAX_JOBS the number of parallel jobs.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "eap_kernels/__init__.py").read_text())[1]
REQUIRED = os.environ.get("EAP_REQUIRE_EXT") == "1"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]

OPERATORS = ["csrc/register.cpp", "csrc/cpu/edge_scores.cpp", "csrc/cpu/masked_read.cpp", "csrc/cpu/expand.cpp"]
BUILD_INFO = ["csrc/build_info.cpp"]


def torch_dir():
    """torch's folder, for its headers: build isolation hides torch from `import`, but not from sysconfig."""
    spec = importlib.util.find_spec("torch")
    folders = [os.environ.get("EAP_TORCH_DIR"), spec and spec.origin and os.path.dirname(spec.origin)]
    folders += [os.path.join(sysconfig.get_path(key), "torch") for key in ("platlib", "purelib")]
    for folder in filter(None, folders):
        if os.path.exists(os.path.join(folder, "include/torch/csrc/stable/library.h")):
            return folder
    raise CompileError("the headers of torch >= 2.10 were not found when the package was installed")


def compiler():
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(name.split()[0]):
            return name
    raise CompileError("no C++ compiler was found when the package was installed")


def ninja():
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if found is None:
        raise CompileError("ninja was not found when the package was installed")
    return found


def include_flags(folders):
    return [f"-isystem {folder}" for folder in folders]


class NinjaFile:
    """The text of a build.ninja. A second rule beside `cxx` is all another compiler needs."""

    def __init__(self, cxx, temp):
        flags = "-O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra"
        self.temp = temp
        self.lines = [
            f"builddir = {temp}",
            f"rule cxx\n  command = {cxx} {flags} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d",
            f"rule link\n  command = {cxx} -shared $in -o $out $libs",
        ]

    def module(self, output, sources, flags, libs=()):
        objects = []
        for source in sources:
            objects.append(str(self.temp / f"{Path(output).name}-{Path(source).stem}.o"))
            self.lines.append(f"build {objects[-1]}: cxx {ROOT / source}\n  flags = {' '.join(flags)}")
        self.lines.append(f"build {output}: link {' '.join(objects)}\n  libs = {' '.join(libs)}")


class Build(build_ext):
    def run(self):
        in_place = self.inplace
        super().run()
        package = ROOT / "eap_kernels" if in_place else Path(self.build_lib, "eap_kernels")
        note = package / "_build_failure.txt"
        note.unlink(missing_ok=True)
        if self.failure:
            package.mkdir(parents=True, exist_ok=True)
            note.write_text(self.failure + "\n")
            for extension in self.extensions:  # a library of an earlier build is not this package's
                (package / Path(self.get_ext_filename(extension.name)).name).unlink(missing_ok=True)

    def build_extensions(self):
        self.failure = None
        try:
            self.compile_all()
        except (CompileError, OSError, subprocess.CalledProcessError) as error:
            if REQUIRED:
                raise
            self.failure = str(error)
            print(f"eap-kernels: installing without native kernels: {self.failure}")

    def compile_all(self):
        torch, temp = torch_dir(), Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        python = sysconfig.get_path("include")
        file = NinjaFile(compiler(), temp)
        for extension in self.extensions:
            output = Path(self.get_ext_fullpath(extension.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            if extension.name == "eap_kernels._C":
                flags = [*STABLE_ABI, *include_flags([f"{torch}/include", python])]
                # libtorch itself must stay needed: it is what brings a device's library along.
                libs = ["-Wl,--no-as-needed", f"-L{torch}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
                file.module(output, extension.sources, flags, libs)
            elif importlib.util.find_spec("pybind11"):
                import pybind11

                flags = [f"-DEAP_VERSION='\"{VERSION}\"'", *include_flags([pybind11.get_include(), python])]
                file.module(output, extension.sources, flags)
        (temp / "build.ninja").write_text("\n".join(file.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([ninja(), "-f", str(temp / "build.ninja"), *jobs], check=True)


setup(
    ext_modules=[
        Extension("eap_kernels._C", OPERATORS, py_limited_api=True, optional=not REQUIRED),
        Extension("eap_kernels._build_info", BUILD_INFO, optional=True),
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
