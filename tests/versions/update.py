"""Write the versions that each supported set of packages installs, and say what changed.

python tests/versions/update.py [SET ...]     # newest alone by default; needs uv

A set is a file of constraints beside this one. pyproject.toml keeps ranges: these are the versions that were tested.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


class Set(NamedTuple):
    """What is fixed by hand; the rest are the newest versions that go with it, on one Python or from it on."""

    about: str
    fixed: tuple[str, ...]
    python: str
    every_python: bool = False
    extras: tuple[str, ...] = ("demo", "test")


SETS = {
    "newest": Set(
        "what `make demo`, `make test` and `make docs` install, on every Python; torch is renewed by hand",
        ("torch==2.13.0",),
        "3.10",
        every_python=True,
        extras=("demo", "test", "bridges", "docs"),
    ),
    "oldest": Set(
        "the oldest torch, transformers and Python supported", ("torch==2.10.0", "transformers==5.0.0"), "3.10"
    ),
    "gpu-machine": Set(
        "what the GPU machine of `make gpu` has", ("torch==2.11.0", "transformers==5.17.0", "numpy==2.5.2"), "3.12"
    ),
}


def resolved(chosen: Set) -> list[str]:
    """Constraints, sorted. `setuptools` is what the build needs besides."""
    command = ["uv", "pip", "compile", "-q", "--no-header", "--no-annotate", "--python-version", chosen.python]
    command += ["--universal"] if chosen.every_python else []
    command += [word for extra in chosen.extras for word in ("--extra", extra)]
    wanted = "\n".join([*chosen.fixed, "setuptools>=77", "triton; sys_platform == 'linux'"])
    done = subprocess.run(
        [*command, "pyproject.toml", "-"], input=wanted, capture_output=True, text=True, cwd=ROOT, check=False
    )
    if done.returncode:
        sys.exit(f"update: {done.stderr.strip()}")
    return done.stdout.splitlines()


def versions(lines: list[str]) -> dict[str, str]:
    """{package: its versions}, of which there are several where Pythons have different ones."""
    found: dict[str, str] = {}
    for line in lines:
        if not line.startswith("#"):
            name, _, version = line.partition(" ;")[0].partition("==")
            found[name] = f"{found[name]}, {version}" if name in found else version
    return found


def update(name: str) -> None:
    path = FOLDER / f"{name}.txt"
    before = versions(path.read_text().splitlines()) if path.exists() else {}
    lines = resolved(SETS[name])
    path.write_text("\n".join([f"# {name}: {SETS[name].about}. Written by `make update-locks`.", *lines]) + "\n")
    after = versions(lines)
    changed = sorted(package for package in {*before, *after} if before.get(package) != after.get(package))
    print(f"{name}: {len(changed)} of {len(after)} packages changed")
    for package in changed:
        print(f"  {package:<28}{before.get(package, '-'):>22}  ->  {after.get(package, '-')}")


def main() -> None:
    names = sys.argv[1:] or ["newest"]
    unknown = [name for name in names if name not in SETS]
    if unknown:
        sys.exit(f"update: expected sets of {', '.join(SETS)}, got {', '.join(unknown)}")
    for name in names:
        update(name)


if __name__ == "__main__":
    main()
