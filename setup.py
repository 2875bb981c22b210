"""Builds the native modules of eap_kernels with ninja. Needs torch's headers only: LibTorch stable ABI, abi3.

Where there is no compiler or no torch the package installs as pure Python and records why, which its first use says;
EAP_REQUIRE_EXT=1 makes that an error. CUDA kernels are built where torch has CUDA and nvcc is found (CUDA_HOME, PATH):
EAP_CUDA=1 builds them beside any torch and insists on nvcc, EAP_CUDA=0 never builds them. EAP_TORCH_DIR names a torch
folder, CXX a compiler, MAX_JOBS the number of parallel jobs, TORCH_CUDA_ARCH_LIST ("8.0;9.0") the cards to compile for.
"""

import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "eap_kernels/__init__.py").read_text())[1]
REQUIRED = os.environ.get("EAP_REQUIRE_EXT") == "1"
LIMITED_API = "-DPy_LIMITED_API=0x030A0000"
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", LIMITED_API]

OPERATORS, CUDA_OPERATORS = (
    [first, *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))]
    for first, pattern in (("csrc/register.cpp", "csrc/cpu/*.cpp"), ("csrc/register_cuda.cpp", "csrc/cuda/*.cu"))
)
OLDER_LIBRARIES = "csrc/older_libraries.cpp"
CUDA_ARCHITECTURES = ["80", "90a", "100"]  # 80 serves 8.x; PTX of the last serves what comes after it
# What PyTorch's own extensions let TORCH_CUDA_ARCH_LIST call them.
CUDA_GENERATIONS = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}
BUILD_INFO = ["csrc/build_info.cpp", OLDER_LIBRARIES]


def torch_dir():
    """torch's folder, for its headers. pip's isolated build hides torch from `import`, but not from sysconfig; uv's and
    build's have an environment of their own, so the one that they were called for is searched."""
    for folder in filter(None, torch_folders()):
        headers, version = Path(folder, "include/torch/csrc/stable/library.h"), Path(folder, "version.py")
        found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text()) if version.exists() else None
        if headers.exists() and (found is None or (int(found[1]), int(found[2])) >= (2, 10)):
            return os.path.abspath(folder)
    raise CompileError("the headers of torch >= 2.10 were not found when the package was installed")


def torch_folders():
    yield os.environ.get("EAP_TORCH_DIR")
    spec = importlib.util.find_spec("torch")
    yield spec and spec.origin and os.path.dirname(spec.origin)
    for key in ("platlib", "purelib"):
        yield os.path.join(sysconfig.get_path(key), "torch")
    code = "import importlib.util, os; print(os.path.dirname(importlib.util.find_spec('torch').origin))"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for python in dict.fromkeys(pythons()):
        command = [python, "-c", code]
        try:  # in a folder without modules: with -c the current one is on the path
            done = subprocess.run(command, cwd=os.sep, env=plain, capture_output=True, text=True, timeout=60)
            yield done.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            continue


def pythons():
    """The interpreters that the calling front end may install for, in the order in which uv picks one.

    No front end tells an isolated build: where the system shows them, its command line, variables and folder do.
    """
    words, variables, folder = [], os.environ, ROOT
    caller = Path("/proc", str(os.getppid()))
    try:
        read = {name: os.fsdecode((caller / name).read_bytes()).split("\0") for name in ("cmdline", "environ")}
        folder = Path(os.readlink(caller / "cwd"))
        words, variables = read["cmdline"], dict(entry.split("=", 1) for entry in read["environ"] if "=" in entry)
    except OSError:
        pass
    names = [after for word, after in itertools.pairwise(words) if word in ("-p", "--python")]
    names += [word.split("=", 1)[1] for word in words if word.startswith("--python=")]
    names += [variables.get(name) for name in ("UV_PYTHON", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX")]
    names += [str(parent / ".venv") for parent in (folder, *folder.parents)]
    names += [word for word in words[:1] if os.path.basename(word).startswith("python")] + ["python", "python3"]
    search = [path for path in variables.get("PATH", "").split(os.pathsep) if not path.startswith(sys.prefix)]
    for name in filter(None, names):
        path = folder / name
        found = path / "bin/python" if path.is_dir() else path
        if found.is_file():
            yield str(found)
        elif os.path.basename(name) == name and shutil.which(name, path=os.pathsep.join(search)):
            yield shutil.which(name, path=os.pathsep.join(search))


def compiler():
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(name.split()[0]):
            return name
    raise CompileError("no C++ compiler was found when the package was installed")


class Cuda(NamedTuple):
    """nvcc and what to compile for; or no nvcc, and one clause that says why."""

    nvcc: str | None = None
    architectures: tuple[str, ...] = ()
    failure: str = ""

    def flags(self):
        ptx = self.architectures[-1].rstrip("af")
        targets = [(a, f"sm_{a}") for a in self.architectures] + [(ptx, f"compute_{ptx}")]
        flags = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in targets]
        # Elsewhere the kernel of 9.0 is empty, and nothing may choose it.
        return " ".join([*flags, *(["-DEAP_SM90A"] if "90a" in self.architectures else [])])


def wanted_architectures():
    """The architectures that TORCH_CUDA_ARCH_LIST names, ours where it names none; the kernels need 8.0 or later."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not text:
        return CUDA_ARCHITECTURES
    for name, versions in CUDA_GENERATIONS.items():
        text = text.replace(name, versions)
    found = {}
    for entry in re.split(r"[;,\s]+", text.strip(";, ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST: expected versions such as 8.0;9.0+PTX, got {entry}")
        number = int(match[1] + match[2])
        found[number] = "90a" if number == 90 else f"{number}{match[3]}"  # the kernel of 9.0 uses what only 90a has
    usable = [found[number] for number in sorted(found) if number >= 80]
    if not usable:
        raise CompileError(f"TORCH_CUDA_ARCH_LIST: expected a version from 8.0 on, got {text}")
    return usable


def find_cuda(torch):
    wanted = os.environ.get("EAP_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise CompileError(f"EAP_CUDA: expected 0 or 1, got {wanted!r}")
    if wanted == "0":
        return Cuda(failure="EAP_CUDA was 0 when the package was installed")
    # As text: importing torch would not work under build isolation, and take seconds.
    version = Path(torch, "version.py").read_text()
    if wanted != "1" and not re.search(r"^cuda\b.*= *['\"]", version, re.MULTILINE):
        return Cuda(failure="torch had no CUDA when the package was installed")
    folders = [os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"), os.environ.get("PATH", "")]
    if "CUDA_HOME" not in os.environ:
        folders.reverse()
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None:
        failure = "nvcc was not found when the package was installed"
        if wanted == "1":
            raise CompileError(failure)
        return Cuda(failure=failure)
    try:
        architectures = wanted_architectures()
    except CompileError as error:
        if wanted == "1":
            raise
        return Cuda(failure=str(error))
    known = subprocess.run([found, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    usable = tuple(a for a in architectures if f"sm_{a.rstrip('af')}" in known)
    return Cuda(found, usable) if usable else Cuda(failure=f"the nvcc found knows none of {', '.join(architectures)}")


def ninja():
    found = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
    if found is None:
        raise CompileError("ninja was not found when the package was installed")
    return found


def word(text):
    """A path or an option as one word of a command in a build.ninja, which the shell reads too."""
    return shlex.quote(str(text)).replace("$", "$$")


def target(path):
    """A path as ninja reads it; a relative one inside the sources, since compilers escape only some paths for make."""
    path = os.path.relpath(path, ROOT) if Path(path).is_relative_to(ROOT) else str(path)
    return re.sub(r"[$: ]", r"$\g<0>", path)


def define(name, value):
    """The option that defines a string of C++."""
    return word(f"-D{name}={json.dumps(value)}")


def include_flags(folders):
    return [f"-isystem {word(folder)}" for folder in folders]


class NinjaFile:
    """The text of a build.ninja, which runs in the folder of the sources."""

    def __init__(self, cxx, temp, cuda):
        cxx = cxx.replace("$", "$$")
        flags = "-O3 -std=c++20 -fPIC -fvisibility=hidden -ffp-contract=fast -Wall -Wextra"
        self.temp = temp
        self.lines = [
            f"builddir = {target(temp)}",
            f"rule cxx\n  command = {cxx} {flags} $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d",
            f"rule link\n  command = {cxx} -shared $in -o $out $libs",
        ]
        if cuda.nvcc:
            nvcc = f"{word(cuda.nvcc)} -ccbin {cxx.split()[-1]}"
            flags = f"-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall --threads 2 {cuda.flags()}"
            self.lines += [
                f"rule nvcc\n  command = {nvcc} {flags} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d",
                # The runtime is linked in: the library loads where there is none.
                f"rule link_cuda\n  command = {nvcc} -shared -cudart static $in -o $out $libs",
            ]

    def module(self, output, sources, flags, libs=()):
        objects = []
        with_cuda = any(source.endswith(".cu") for source in sources)
        for source in sources:
            objects.append(target(self.temp / f"{Path(output).name}-{source.replace('/', '-')}.o"))
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            self.lines.append(f"build {objects[-1]}: {rule} {target(ROOT / source)}\n  flags = {' '.join(flags)}")
        link = "link_cuda" if with_cuda else "link"
        self.lines.append(f"build {target(output)}: {link} {' '.join(objects)}\n  libs = {' '.join(libs)}")


def run_ninja(file):
    """Raises CompileFailed with the compiler's own last line."""
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    command = [ninja(), "-f", str(file), *jobs]
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout:
            print(line, end="")
            lines.append(line.strip())
    if process.returncode:
        # Below this word ninja repeats the command, then comes what the command printed.
        outputs = [lines[at + 2 :] for at, line in enumerate(lines) if line.startswith("FAILED: ")] or [lines]
        others = r"\[\d+/\d+\]|ninja: build stopped|collect2: error|$"  # these only say that something failed
        said = [line for line in outputs[-1] if not re.match(others, line)]
        errors = [line for line in said if re.search(r"\berror\b", line)] or said
        raise CompileFailed(f": {errors[-1]}" if errors else "")


class CompileFailed(CompileError):
    """A compiler ran and failed; the text is its own last line, behind a colon."""


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
        except (CompileError, OSError) as error:
            if REQUIRED:
                raise
            failed = isinstance(error, CompileFailed)
            self.failure = f"the compiler failed when the package was installed{error}" if failed else str(error)
            print(f"eap-kernels: installing without native kernels: {self.failure}")

    def compile_all(self):
        torch = torch_dir()
        cuda = find_cuda(torch)
        try:
            self.compile(torch, cuda)
        except CompileFailed as error:
            if REQUIRED or cuda.nvcc is None or os.environ.get("EAP_CUDA") == "1":
                raise
            failure = f"nvcc failed when the package was installed{error}"
            print(f"eap-kernels: {failure}: building without CUDA")
            self.compile(torch, Cuda(failure=failure))

    def compile(self, torch, cuda):
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        python = sysconfig.get_path("include")
        file = NinjaFile(compiler(), temp, cuda)
        for extension in self.extensions:
            output = Path(self.get_ext_fullpath(extension.name)).resolve()
            output.parent.mkdir(parents=True, exist_ok=True)
            if extension.name == "eap_kernels._C":
                flags = [*STABLE_ABI, *include_flags([f"{torch}/include", python])]
                # libtorch itself must stay needed: it is what brings a device's library along.
                libs = ["-Xlinker --no-as-needed", word(f"-L{torch}/lib"), "-ltorch", "-ltorch_cpu", "-lc10"]
                file.module(output, extension.sources + (CUDA_OPERATORS if cuda.nvcc else []), flags, libs)
            else:
                architectures = ",".join(map(json.dumps, cuda.architectures))
                flags = [
                    LIMITED_API,
                    define("EAP_VERSION", VERSION),
                    word(f"-DEAP_CUDA_ARCHITECTURES={architectures}"),
                    define("EAP_CUDA_FAILURE", cuda.failure),
                    *include_flags([python]),
                ]
                file.module(output, extension.sources, flags)
        (temp / "build.ninja").write_bytes(os.fsencode("\n".join(file.lines) + "\n"))
        run_ninja(temp / "build.ninja")


setup(
    ext_modules=[
        Extension("eap_kernels._C", [*OPERATORS, OLDER_LIBRARIES], py_limited_api=True, optional=not REQUIRED),
        Extension("eap_kernels._build_info", BUILD_INFO, py_limited_api=True, optional=not REQUIRED),
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
