"""Everything before an upload: build the distributions, try them in bare environments, and say what is in the way.

python tests/build/release.py [FOLDER]     # dist by default; `make release` in the tests' environment

The sources are those of the last commit. Their README gets links to `Source`, the repository's address in
pyproject.toml, as a registry's page has no files beside it; without an address nothing may be uploaded. A wheel is
built from the source distribution, so that it is tried as well. With EAP_CUDA=1, which needs nvcc but neither a GPU nor
a torch with CUDA, it holds the CUDA kernels, too, and works where there is no CUDA. auditwheel checks that it loads
wherever torch's own wheels do. Nothing is uploaded: the last line says with which command to.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = ("csrc", "eap_kernels", "python")
# What torch's own wheels ask of a system.
GLIBC = (2, 28)
PLATFORM = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
CUDA = os.environ.get("EAP_CUDA", "0")
OF_TORCH = ("libtorch*", "libc10*")
RELATIVE = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]]*)\]\((?!https?:|#)(?P<target>[^)]+)\)")
LAYOUTS = {
    "pip": "installed by pip",
    "uv": "installed by uv",
    "conda": "installed by pip where all lies as conda has it",
}
USED = """
import os, torch, transformers, eap_kernels, eap_circuits as eap
assert eap_kernels.backends()["cpu"] is None, eap_kernels.backends()["cpu"]
cuda = eap_kernels.backends()["cuda"]
assert os.environ["EAP_CUDA"] == "0" or cuda in (None, "torch sees no CUDA device"), cuda
assert eap.__version__ == eap_kernels.__version__
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
config = transformers.LlamaConfig(**sizes)
model = transformers.LlamaForCausalLM(config).eval()
tokens, corrupted, answers = (torch.tensor([each]) for each in ([1, 2, 3], [1, 4, 3], [5, 6]))
data = eap.PairedDataset.from_tokens(tokens, corrupted, lengths=torch.tensor([3]), answers=answers)
circuit = eap.attribute(model, data).select(20)
print(eap.evaluate(model, circuit, data))
"""


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> str:
    """What a command prints; what it prints on failure ends the script."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**os.environ, "PYTHONPATH": "", **env}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"release: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """The source distribution of the last commit, and the wheel that is built from it."""
    with tempfile.TemporaryDirectory() as copy:
        archive = Path(copy, "tree.tar")
        run("git", "archive", "-o", archive, "HEAD", cwd=ROOT)
        with tarfile.open(archive) as tree:
            tree.extractall(copy, filter="data")
        readme = Path(copy, "README.md")
        project = Path(copy, "pyproject.toml").read_text(encoding="utf-8")
        if source := re.search(r'^Source = "([^"]+)"', project, re.M):
            commit = run("git", "rev-parse", "HEAD", cwd=ROOT).strip()
            readme.write_text(absolute(readme.read_text(encoding="utf-8"), source[1], commit), encoding="utf-8")
        backend = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
        run(sys.executable, "-c", backend, cwd=Path(copy))
    (sdist,) = folder.glob("*.tar.gz")
    wheel = ("wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist)
    with tempfile.TemporaryDirectory() as older:
        linked = {"NVCC_PREPEND_FLAGS": older_functions(Path(older))} if CUDA == "1" and sys.platform == "linux" else {}
        run(sys.executable, "-m", "pip", *wheel, EAP_REQUIRE_EXT="1", EAP_CUDA=CUDA, **linked)
    (wheel,) = folder.glob("*.whl")
    if sys.platform == "linux":
        excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
        run("auditwheel", "repair", "--plat", PLATFORM, "--only-plat", *excluded, "-w", folder, wheel)
        wheel.unlink()
        (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def older_functions(folder: Path) -> str:
    """nvcc's options for linking its static runtime such that it needs no newer glibc than `GLIBC`.

    glibc 2.34 moved threads and `dlopen` into libc, under new versions of their names, and still has the old versions.
    The linker takes the newest that it finds, so it finds a library first that offers only the old ones, and is empty.
    Whatever glibc there is offers them when the wheel is loaded.
    """
    home = os.environ.get("CUDA_HOME")
    folders = [f"{home}/bin"] if home else [os.environ["PATH"], "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        sys.exit("release: EAP_CUDA=1 needs nvcc, which was not found")
    planned = subprocess.run([nvcc, "--dryrun", "-shared", "none.o"], capture_output=True, text=True).stderr
    places = [Path(found, "libcudart_static.a") for found in re.findall(r'"-L([^"]+)"', planned)]
    runtime = next((place for place in places if place.exists()), None)
    if runtime is None:
        sys.exit(f"release: {nvcc} links no libcudart_static.a")
    libc = run("g++", "-print-file-name=libc.so.6").strip()
    names = older_names(run("nm", "-u", runtime), run("nm", "-D", libc))
    if not names:
        return ""
    source, versions, library = (folder / name for name in ("older.s", "older.map", "older.so"))
    source.write_text("".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in names))
    of_each = {v: "".join(f" {name};" for name in names if names[name] == v) for v in names.values()}
    versions.write_text("".join(f"{version} {{{listed} }};\n" for version, listed in of_each.items()))
    # Every glibc has a libpthread.so.0, if only for older programs.
    named = ("-Wl,-soname,libpthread.so.0", f"-Wl,--version-script={versions}")
    run("g++", "-shared", "-nostdlib", *named, source, "-o", library)
    return f"-Xlinker --no-as-needed,{library}"


def older_names(needed: str, offered: str) -> dict[str, str]:
    """The functions that glibc has in a newer version than `GLIBC`, and in an older one as well: the newest of these.

    Args:
        needed: nm's list of what a library does not define.
        offered: nm's list of what glibc defines.
    """
    versions: dict[str, list[tuple[int, ...]]] = {}
    for name, version in re.findall(r" (\w+)@@?GLIBC_([\d.]+)$", offered, re.M):
        versions.setdefault(name, []).append(tuple(map(int, version.split("."))))
    found = {}
    for name in sorted(set(re.findall(r" U (\w+)$", needed, re.M)) & versions.keys()):
        older = [version for version in versions[name] if version <= GLIBC]
        if older and max(versions[name]) > GLIBC:
            found[name] = f"GLIBC_{'.'.join(map(str, max(older)))}"
    return found


def absolute(page: str, source: str, commit: str) -> str:
    """A page whose links lead to the repository's files, as they were at that commit."""

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found["picture"] else "blob"
        return f"{found['picture']}[{found['text']}]({source.rstrip('/')}/{kind}/{commit}/{found['target']})"

    return RELATIVE.sub(link, page)


def left_out(sdist: Path, tracked: list[str]) -> list[str]:
    """Files of the packages that git has and the source distribution lacks."""
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    return [name for name in tracked if name.split("/")[0] in PACKAGED and name not in packed]


def lacking(described: str, changelog: str) -> list[str]:
    """What the metadata and the changelog do not yet say of a release."""
    known = Parser().parsestr(described)
    wanted = (
        "Summary",
        "Keywords",
        "Classifier",
        "License-Expression",
        "License-File",
        "Project-URL",
        "Requires-Python",
    )
    found = [f"pyproject.toml has no {name}" for name in wanted if not known.get_all(name)]
    heading = next((line for line in changelog.splitlines() if line.startswith("## ")), "none")
    if not re.fullmatch(rf"## {re.escape(known['Version'])} — \d{{4}}-\d\d-\d\d", heading):
        found.append(f"CHANGELOG.md begins with {heading!r}, not with {known['Version']} and a date")
    relative = [link["target"] for link in RELATIVE.finditer(known.get_payload())]
    if relative:
        found.append(f"README.md has {len(relative)} links that a registry's page cannot follow, such as {relative[0]}")
    return found


def like_conda(place: Path) -> None:
    """An interpreter of its own, where conda has one, and no environment of another."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    hidden = shutil.ignore_patterns("site-packages", "test", "__pycache__", "config-*")
    shutil.copytree(Path(sys.base_prefix, "lib", version), place / "lib" / version, ignore=hidden)
    (place / "bin").mkdir()
    shutil.copy(Path(sys.base_prefix, "bin", version), place / "bin" / "python")
    run(place / "bin" / "python", "-m", "ensurepip")


def libraries_like_conda(place: Path) -> None:
    """Move torch's libraries to where conda-forge has them, beside all others."""
    for library in [path for path in place.glob("lib/*/site-packages/torch/lib/*.so*") if not path.is_symlink()]:
        library.rename(place / "lib" / library.name)
        library.symlink_to(place / "lib" / library.name)


def tried(wheel: Path, layout: str) -> None:
    """Install the wheel into an environment with nothing else, and use it there without a compiler."""
    versions = ROOT / "tests" / "versions" / "newest.txt"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "bare")
        like_conda(place) if layout == "conda" else venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        pip = [python, "-m", "pip", "install", "-q", "--no-compile"]
        uv = [shutil.which("uv") or "uv", "pip", "install", "-q", "--python", python]
        # The torch of this environment: uv may not know the index of its build.
        run(*pip, f"torch=={metadata.version('torch')}")
        if layout == "conda":
            libraries_like_conda(place)
        run(*(uv if layout == "uv" else pip), "-c", versions, f"{wheel}[circuits]")
        path = {"PATH": str(place / "bin"), "EAP_TUNE": "0", "EAP_CUDA": CUDA}
        run(python, "-c", USED, cwd=place, **path)
        for typed in (["--version"], ["--help"], ["tasks"], ["info"]):
            run(place / "bin" / "eap", *typed, cwd=place, **path)
        print(f"release: {wheel.name} works, {LAYOUTS[layout]}")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    in_the_way = ["there are changes that are not committed"] if run("git", "status", "--porcelain", cwd=ROOT) else []
    sdist, wheel = build(folder)
    print(f"release: built {sdist.name} and {wheel.name} in {folder}")
    in_the_way += [
        f"{sdist.name} lacks {name}" for name in left_out(sdist, run("git", "ls-files", cwd=ROOT).splitlines())
    ]
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        in_the_way += lacking(archive.read(name).decode(), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    for layout in LAYOUTS:
        tried(wheel, layout)
    if in_the_way:
        sys.exit("\n".join(f"release: {problem}" for problem in in_the_way))
    print(f"release: nothing is in the way: twine upload {sdist} {wheel}")


if __name__ == "__main__":
    main()
