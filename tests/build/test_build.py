"""Building the native modules: where torch is found, odd paths, and the reason where something is missing."""

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.build.building import ODD, ROOT, build, torch_of, why_no_cuda


@pytest.mark.parametrize(
    ("cuda", "env", "why"),
    [
        ("13.0", {}, "nvcc failed when the package was installed"),
        (None, {}, "torch had no CUDA when the package was installed"),
        ("13.0", {"EAP_CUDA": "0"}, "EAP_CUDA was 0 when the package was installed"),
        ("13.0", {"CUDA_HOME": "/nowhere", "PATH": "none"}, "nvcc was not found when the package was installed"),
    ],
)
def test_without_cuda_the_library_is_built_for_the_cpu_and_the_reason_is_kept(tools, tmp_path, cuda, env, why):
    folder, found = tools
    env = {**found, "EAP_TORCH_DIR": torch_of(tmp_path / "torch", cuda), **env}
    if env.get("PATH"):
        # All that building needs, without nvcc.
        names = ("ninja", "touch", "sh")
        for name in names:
            target = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
            (tmp_path / "bin").mkdir(exist_ok=True)
            (tmp_path / "bin" / name).symlink_to(target)
        env["PATH"] = str(tmp_path / "bin")
    done = build(folder, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "eap_kernels/_build_failure.txt").exists(), done.stdout
    assert why_no_cuda(folder) == why


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        ("", ["sm_80", "sm_90a", "sm_100", "compute_100"]),
        ("8.0", ["sm_80", "compute_80"]),
        ("9.0", ["sm_90a", "compute_90"]),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ["sm_80", "sm_86", "sm_90a", "sm_100", "sm_120", "compute_120"]),
        ("Ampere;Hopper+PTX", ["sm_80", "sm_86", "sm_90a", "compute_90"]),
        ("10.0a;9.0a", ["sm_90a", "sm_100a", "compute_100"]),
    ],
)
def test_the_cards_that_pytorch_s_variable_names_are_compiled_for(tools, tmp_path, given, targets):
    folder, found = tools
    codes = "".join(f"echo sm_{code};" for code in (80, 86, 90, 100, 120))
    touch = 'while [ "$1" != -o ]; do shift; done; touch "$2"'
    (tmp_path / "cuda/bin/nvcc").write_text(f"#!/bin/sh\n[ $1 = --list-gpu-code ] && {{ {codes} exit 0; }}\n{touch}\n")
    env = {**found, "EAP_TORCH_DIR": torch_of(tmp_path / "torch", "13.0"), "EAP_REQUIRE_EXT": "1"}
    done = build(folder, **env, TORCH_CUDA_ARCH_LIST=given)
    assert done.returncode == 0, done.stdout + done.stderr
    (description,) = folder.glob("build/*/build.ninja")
    (flags,) = {*re.findall(r"rule nvcc\n.*", description.read_text())}
    assert re.findall(r"-gencode=arch=\S+,code=(\w+)", flags) == targets
    assert ("-DEAP_SM90A" in flags) == ("sm_90a" in targets), "elsewhere the kernel of 9.0 is empty"


@pytest.mark.parametrize("given", ["7.5", "sm_90", "9", "8.0;'x"])
def test_a_list_of_cards_that_cannot_be_read_leaves_the_cpu_s_kernels_and_the_reason(tools, tmp_path, given):
    folder, found = tools
    env = {**found, "EAP_TORCH_DIR": torch_of(tmp_path / "torch", "13.0"), "TORCH_CUDA_ARCH_LIST": given}
    done = build(folder, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert why_no_cuda(folder).startswith("TORCH_CUDA_ARCH_LIST: expected ")
    done = build(folder, **env, EAP_CUDA="1", EAP_REQUIRE_EXT="1")
    assert done.returncode != 0 and "TORCH_CUDA_ARCH_LIST: expected " in done.stdout + done.stderr


@pytest.mark.parametrize(
    "env",
    [{"EAP_REQUIRE_EXT": "1"}, {"EAP_REQUIRE_EXT": "1", "EAP_CUDA": "1"}, {"EAP_REQUIRE_EXT": "1", "EAP_CUDA": "2"}],
)
def test_where_it_is_required_a_failing_nvcc_is_an_error(tools, tmp_path, env):
    folder, found = tools
    done = build(folder, **found, **env, EAP_TORCH_DIR=torch_of(tmp_path / "torch", "13.0"))
    assert done.returncode != 0


def test_paths_with_anything_in_them_reach_the_compilers_whole(tools, tmp_path):
    folder, found = tools
    (tmp_path / ODD).mkdir()
    odd = folder.rename(tmp_path / ODD / "source: 1")
    torch = torch_of(tmp_path / ODD / "torch", "13.0")
    given = tmp_path / "given"
    record = f'printf "%s\\n" "$@" >>"{given}"; while [ "$1" != -o ]; do shift; done; touch "$2"'
    (tmp_path / "g++").write_text(f"#!/bin/sh\n{record}\n")
    nvcc = tmp_path / ODD / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --list-gpu-code ] && echo sm_80 && exit 0\n{record}\n")
    nvcc.chmod(0o755)
    env = {**found, "CUDA_HOME": str(nvcc.parents[1]), "EAP_TORCH_DIR": torch, "EAP_REQUIRE_EXT": "1"}
    done = build(odd, **env, TMPDIR=str(tmp_path / ODD))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(odd.glob("eap_kernels/*.so"))
    words = given.read_text().splitlines()
    assert {f"{torch}/include", f"-L{torch}/lib", "csrc/register.cpp", "csrc/cuda/masked_read.cu"} <= set(words)
    assert '-DEAP_CUDA_ARCHITECTURES="80"' in words


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("x.cpp:1:2: error: no such thing\n    1 | thing\n      | ^~~", ": x.cpp:1:2: error: no such thing"),
        ("/usr/bin/ld: cannot find -lx\ncollect2: error: ld returned 1 exit status", ": /usr/bin/ld: cannot find -lx"),
        ("", ""),
    ],
)
def test_the_compiler_s_own_last_line_is_kept(tools, tmp_path, printed, said):
    folder, found = tools
    (tmp_path / "g++").write_text(f"#!/bin/sh\ncat <<'END'\n{printed}\nEND\nexit 1\n")
    done = build(folder, **found, EAP_TORCH_DIR=torch_of(tmp_path / "torch", None))
    assert done.returncode == 0, done.stdout + done.stderr
    note = (folder / "eap_kernels/_build_failure.txt").read_text()
    assert note == f"the compiler failed when the package was installed{said}\n"


def test_a_compiler_that_links_its_own_libstdcxx_statically(tools, tmp_path):
    """It brings what csrc/older_libraries.cpp defines; the smaller of the modules shows that both get along."""
    compiler = shutil.which("g++") or pytest.skip("g++ was not found")
    asked = subprocess.run([compiler, "-print-file-name=libstdc++.a"], capture_output=True, text=True)
    if not Path(asked.stdout.strip()).is_absolute():
        pytest.skip("g++ has no static libstdc++")
    folder, found = tools
    # Only that module is compiled, quickly.
    really = f'case "$*" in *build_info*) exec "{compiler}" "$@" -O0 -static-libstdc++ ;; esac'
    script = tmp_path / "g++"
    script.write_text(script.read_text().replace("\n", f"\n{really}\n", 1))
    done = build(folder, **found, EAP_TORCH_DIR=torch_of(tmp_path / "torch", None), EAP_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    load = "import _build_info; print(_build_info.instruction_set() in _build_info.instruction_sets)"
    loaded = subprocess.run([sys.executable, "-c", load], cwd=folder / "eap_kernels", capture_output=True, text=True)
    assert loaded.stdout == "True\n", loaded.stderr


# setup.py in an interpreter without setuptools and torch, as in an isolated build: the folder of torch that it finds.
FIND = f"""
import os, runpy, sys, types
stand_in = types.ModuleType("setuptools")
stand_in.Extension = stand_in.setup = lambda *_, **__: None
stand_in.build_ext, stand_in.CompileError = object, Exception
for name in ("setuptools", "setuptools.command", "setuptools.command.build_ext", "setuptools.errors"):
    sys.modules[name] = stand_in
try:
    print(os.path.realpath(runpy.run_path({str(ROOT / "setup.py")!r})["torch_dir"]()))
except Exception as error:
    print(error)
"""


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """The interpreter of an isolated build, and the environment that it builds for, which has a torch."""
    folder = tmp_path_factory.mktemp("environments")
    for name in ("isolated", "my own"):
        venv.create(folder / name, symlinks=True)
    (packages,) = (folder / "my own").glob("lib/python*/site-packages")
    torch = Path(torch_of(packages / "torch", None))
    (torch / "__init__.py").touch()
    return folder / "isolated/bin/python", folder / "my own", torch


def found_by(python, words, cwd, **env):
    """What a build finds that a front end with this command line starts."""
    shell = 'build=$1 code=$2; "$build" -c "$code"; exit $?'
    command = ["sh", "-c", shell, "uv", str(python), FIND, *words]
    done = subprocess.run(command, cwd=cwd, env={"PATH": "/usr/bin:/bin", **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows a front end's command line")
def test_an_isolated_build_finds_the_torch_of_the_environment_that_it_is_for(environments, tmp_path):
    python, own, torch = environments
    for words in (["--python", str(own)], ["-p", str(own / "bin/python")], [f"--python={own}"]):
        assert found_by(python, words, tmp_path) == str(torch)
    for name in ("VIRTUAL_ENV", "UV_PYTHON", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX"):
        assert found_by(python, [], tmp_path, **{name: str(own)}) == str(torch)
    assert found_by(python, [], tmp_path, PATH=f"{own / 'bin'}:/usr/bin:/bin") == str(torch)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/.venv").symlink_to(own)
    assert found_by(python, [], tmp_path / "a/b") == str(torch)
    assert found_by(python, ["--python", "../.venv"], tmp_path / "a/b") == str(torch)


def test_a_torch_that_is_too_old_or_absent_is_not_found(environments, tmp_path):
    python, _, _ = environments
    missing = "the headers of torch >= 2.10 were not found when the package was installed"
    old = torch_of(tmp_path / "torch", None)
    Path(old, "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    bare = str(tmp_path)  # a PATH without any Python
    shutil.copy(shutil.which("sh"), tmp_path)
    assert found_by(python, [], tmp_path, PATH=bare, EAP_TORCH_DIR=old) == missing
