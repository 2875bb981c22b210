"""What an installation promises: metadata, entry point, licence, and the packages in a wheel."""

import importlib
import inspect
import itertools
import os
import pkgutil
import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import eap_circuits
import eap_kernels
from tests.build.building import ODD, ROOT, copy_of_the_sources


def test_metadata():
    assert metadata.version("eap-kernels") == eap_kernels.__version__
    requires = metadata.requires("eap-kernels")
    assert [r for r in requires if "extra ==" not in r] == ["torch>=2.10"], "the operators need torch alone"
    for extra in ("demo", "notebook", "optimal", "parquet", "test"):
        wanted = "eap-kernels[notebook]" if extra == "test" else "eap-kernels[circuits]"
        assert any(r.startswith(wanted) and f'"{extra}"' in r for r in requires)
    from eap_circuits import _NEEDED

    assert all(any(r.startswith(name) and '"circuits"' in r for r in requires) for name in _NEEDED)


def test_console_script():
    (script,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "eap"]
    assert script.value == "eap_circuits.cli:main"


@pytest.mark.parametrize("root", [eap_circuits, eap_kernels], ids=lambda package: package.__name__)
def test_no_public_name_hides_a_module(root):
    """`import package.name as x` gives the package's attribute where there is one, not the module."""
    found = pkgutil.walk_packages(root.__path__, f"{root.__name__}.")
    packages = [root, *(importlib.import_module(module.name) for module in found if module.ispkg)]
    for package in packages:
        for module in pkgutil.iter_modules(package.__path__):
            hidden_by = getattr(package, module.name, None)
            assert hidden_by is None or inspect.ismodule(hidden_by), f"{package.__name__}.{module.name}"


def test_the_headers_of_every_source_are_in_the_source_distribution():
    rules = (ROOT / "MANIFEST.in").read_text()
    for suffix in {path.suffix for path in (ROOT / "csrc").rglob("*.*")}:
        assert re.search(rf"recursive-include csrc .*\*\{suffix}\b", rules), suffix


def test_the_source_distribution_has_the_versions_that_its_makefile_installs():
    rules = (ROOT / "MANIFEST.in").read_text()
    assert "Makefile" in rules
    assert "tests/versions/$(VERSIONS).txt" in (ROOT / "Makefile").read_text()
    assert "recursive-include tests/versions *.txt" in rules


def build_wheel(folder: Path, python: Path | str = sys.executable, **env: str) -> subprocess.CompletedProcess[str]:
    """Builds a copy in a folder with an odd name."""
    source = folder / ODD / "source"
    if not source.exists():
        copy_of_the_sources(source)
    command = [str(python), "-m", "pip", "wheel", "--no-deps", "-w", str(folder), "."]
    return subprocess.run(command, cwd=source, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.slow
def test_isolated_wheel_has_both_packages_and_the_library(tmp_path):
    done = build_wheel(tmp_path, EAP_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    packed = zipfile.ZipFile(wheel)
    names = packed.namelist()
    for name in ("eap_kernels/py.typed", "eap_circuits/py.typed"):
        assert name in names
    assert not [n for n in names if n.startswith(("tests", "bench", "csrc"))]
    libraries = sorted(name for name in names if ".so" in name)
    assert libraries == ["eap_kernels/_C.abi3.so", "eap_kernels/_build_info.abi3.so"], "one build for every Python"
    # Of glibc and GCC's libraries they need no newer versions than manylinux_2_28 has, as torch's own wheels do.
    for name, library in itertools.product(libraries, (b"GLIBC_2", b"GLIBCXX_3.4", b"CXXABI_1.3")):
        found = {int(version) for version in re.findall(rb"%s\.(\d+)" % re.escape(library), packed.read(name))}
        assert max(found, default=0) <= {b"GLIBC_2": 28, b"GLIBCXX_3.4": 24, b"CXXABI_1.3": 11}[library], (
            name,
            library,
        )


@pytest.mark.slow
def test_without_a_compiler_the_reason_is_installed(tmp_path):
    done = build_wheel(tmp_path, PATH=str(tmp_path), CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    note = zipfile.ZipFile(wheel).read("eap_kernels/_build_failure.txt").decode()
    assert note == "no C++ compiler was found when the package was installed\n"
    required = build_wheel(tmp_path, PATH=str(tmp_path), CXX="no-such-compiler", EAP_REQUIRE_EXT="1")
    assert required.returncode != 0


@pytest.mark.slow
def test_without_torch_headers_the_reason_is_installed(tmp_path):
    venv.create(tmp_path / "bare", with_pip=True)
    # Nor does another environment offer some.
    others = dict.fromkeys(("VIRTUAL_ENV", "UV_PYTHON", "UV_PROJECT_ENVIRONMENT", "CONDA_PREFIX"), "")
    done = build_wheel(tmp_path, tmp_path / "bare/bin/python", PATH=str(tmp_path), **others)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    note = zipfile.ZipFile(wheel).read("eap_kernels/_build_failure.txt").decode()
    assert note == "the headers of torch >= 2.10 were not found when the package was installed\n"
