"""The writer and the raw reader: whole files or none, links and modes, every library's failure in one sentence."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eap_circuits import Circuit, EdgeScores, Graph, InputError, NodeScores, files
from eap_circuits.files import check_writable, digest, read_json, read_whole, write_json, write_whole
from eap_circuits.report import load_curve

GRAPH = Graph((2, 2), (1, 1), 4)
VALUES = torch.randn(GRAPH.edge_mask.shape, generator=torch.Generator().manual_seed(0)) * GRAPH.edge_mask
NAMES = ["r.safetensors", "r.json", "r.pt"]
LOADERS: list[Callable[[Path], Any]] = [EdgeScores.load, Circuit.load, NodeScores.load, load_curve]


def one_line(error: BaseException, path: Path) -> str:
    text = str(error)
    assert str(path) in text and "\n" not in text and text.endswith(".")
    return text


# Writing.


@pytest.mark.parametrize("name", NAMES)
def test_links_are_written_through_and_modes_stay(name: str, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    target, first, link = tmp_path / "store" / name, tmp_path / f"to_{name}", tmp_path / name
    link.symlink_to(first)
    first.symlink_to(target)  # a chain, whose end is not there yet
    scores = EdgeScores(GRAPH, VALUES)
    scores.save(link)
    assert link.is_symlink() and first.is_symlink() and not target.is_symlink()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for mode in (0o600, 0o640, 0o755):
        target.chmod(mode)
        EdgeScores(GRAPH, VALUES * 2).save(link)
        assert stat.S_IMODE(target.stat().st_mode) == mode
    assert torch.equal(EdgeScores.load(target).values, GRAPH.to_kv(GRAPH.to_query(VALUES * 2)))
    assert [x.name for x in target.parent.iterdir()] == [name]


def test_a_private_file_is_never_readable_to_others(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.touch(0o600)
    seen = []
    write_whole(path, lambda file: seen.append(stat.S_IMODE(file.stat().st_mode)))
    assert seen == [0o600]


def test_only_files_are_written_and_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "full.json").symlink_to("/dev/full")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    under, long = tmp_path / "file" / "x.json", tmp_path / ("x" * 300 + ".json")
    for path in [*(x for x in sorted(tmp_path.iterdir()) if x.suffix), under, long, tmp_path / "a\0.json"]:
        with pytest.raises(InputError):
            write_whole(path, lambda file: file.touch())
        for load in LOADERS[:2]:
            with pytest.raises(InputError):
                load(path)
    for wrong in (None, 3, b"r.json"):
        with pytest.raises(InputError, match="path: expected the name of a file"):
            EdgeScores.load(wrong)  # type: ignore[arg-type]
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)
    assert len(list(tmp_path.iterdir())) == 5


def test_what_may_not_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    monkeypatch.setattr(os, "access", lambda what, how: Path(what) != path)  # root may write everything
    with pytest.raises(InputError, match="found one that is read-only"):
        check_writable(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_keeps_the_old_file(name: str, tmp_path: Path) -> None:
    path, most = tmp_path / name, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    path.write_text("old")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, most))
    try:
        with pytest.raises(InputError) as caught:
            EdgeScores(GRAPH, VALUES).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, before)
    assert "cannot be written" in one_line(caught.value, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_failures_of_the_system_are_one_sentence(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, fail)
        with pytest.raises(InputError) as caught:
            write_whole(path, lambda file: file.write_text("new"))
    assert "cannot be written (Input/output error)" in one_line(caught.value, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(files.os, "fsync", note)
    monkeypatch.setattr(files.os, "replace", lambda *both: (done.append("replaced"), replace(*both)))
    write_whole(tmp_path / "r.json", lambda file: file.write_text("new"))
    assert done == ["file", "replaced", "folder"]


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    both = torch.stack([VALUES, VALUES.square()])
    EdgeScores(GRAPH, both[0], variance=both[1]).save(tmp_path / "r.safetensors")
    squares = VALUES.square()
    EdgeScores(GRAPH, squares, variance=squares).save(tmp_path / "s.safetensors")
    found = EdgeScores.load(tmp_path / "r.safetensors")
    assert torch.equal(found.values, VALUES) and torch.equal(found.variance, both[1])  # type: ignore[arg-type]


# Reading.


@pytest.mark.parametrize("name", NAMES)
def test_what_was_loaded_does_not_change_with_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    EdgeScores(GRAPH, VALUES).save(path)
    loaded = EdgeScores.load(path)
    before = loaded.values.clone()
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    os.truncate(path, 0)
    assert torch.equal(loaded.values, before)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fstat = tmp_path / "r.json", os.fstat
    path.write_bytes(b"x" * 100)

    def writing(handle: int) -> os.stat_result:
        found = fstat(handle)
        os.truncate(path, 40)
        return found

    monkeypatch.setattr(files.os, "fstat", writing)
    with pytest.raises(InputError, match="changed while it was read"):
        read_whole(path)


def test_a_file_larger_than_memory_is_not_read(tmp_path: Path) -> None:
    for name in NAMES:
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**43)  # a sparse file takes no room
        with pytest.raises(InputError, match="fits into memory, found 8,796,093,022,208 bytes"):
            EdgeScores.load(tmp_path / name)


# JSON and its checksum.


def test_json_comes_back_and_its_checksum_is_of_its_values(tmp_path: Path) -> None:
    path, content = tmp_path / "r.json", {"b": [1.5, None, True], "a": {"ü": "\ud800"}}
    write_json(path, content)
    assert read_json(path, "a result") == content
    text = path.read_text(encoding="utf-8")
    for same in (text.replace(", ", ",\n "), "\ufeff" + text, text.replace("1.5", "15e-1")):
        path.write_text(same, encoding="utf-8")
        assert read_json(path, "a result") == content
    for other, message in [
        (text.replace("1.5", "1.25"), "sha256: expected the content's checksum, found another"),
        (text.replace("true", "1"), "sha256: expected"),
        (text.replace('"sha256": "', '"sha256": "0'), "sha256: expected"),
        (text[:-2] + ', "b": 3}', "a result, found something else ('b' comes twice)"),
        ("[" * 100_000, "a result, found something else"),
        ("[1]", "a result, found something else (a list in place of an object)"),
    ]:
        path.write_text(other, encoding="utf-8")
        with pytest.raises(InputError) as caught:
            read_json(path, "a result")
        assert message in one_line(caught.value, path)
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(InputError, match="a byte that is not UTF-8"):
        read_json(path, "a result")


def test_a_digest_tells_tensors_apart() -> None:
    x = torch.arange(6.0)
    found = {
        digest({}, {"x": each})
        for each in (x, x.double(), x.view(2, 3), x.view(3, 2), x.bfloat16(), -x, x.view(torch.int32), x[:0], x[0])
    }
    assert len(found) == 9 and digest({}, {"x": x.view(2, 3).T.T}) == digest({}, {"x": x.view(2, 3)})
    assert len({digest({}, {"x": x}), digest({}, {"y": x}), digest({"x": 1}, {}), digest({})}) == 4
