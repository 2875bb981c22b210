"""Files are read whole and strictly, and written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import secrets
import shutil
import stat
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import InputError, expected, reason
from .ranks import follows

if TYPE_CHECKING:
    from torch import Tensor

# What json, safetensors and torch raise for a damaged file, a full disk or too little memory: torch makes an OSError of
# some truncated files, and asserts.
DAMAGED = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    SafetensorError, TypeError, ValueError, pickle.UnpicklingError, struct.error,
)  # fmt: skip
CHECKSUM = "sha256"


# Writing.


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return the path if a file can be written there, else raise `InputError`. Writes nothing."""
    path = _path(path)
    if follows():  # rank 0 writes
        return path
    target = _target(path)
    mode = _mode(str(path), target.lstat, "written")
    if mode is not None and not stat.S_ISREG(mode):
        raise expected(str(path), "a file to write", _kind(mode))
    folder = target.parent
    if not folder.is_dir():
        raise expected(str(path), "a folder that exists", f"no folder {str(folder)!r}")
    if not os.access(folder, os.W_OK):
        raise expected(str(path), "a folder that can be written to", f"{str(folder)!r}, which cannot")
    if mode is not None and not os.access(target, os.W_OK):
        raise expected(str(path), "a file that can be written to", "one that is read-only")
    return path


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Call `write` on a temporary file beside `path`, then move it into place in one step, safe from power loss.

    Of the ranks that share a call, only the first writes. Links are followed, and a file that is replaced passes on its
    mode. After an error or an interruption, a file that was at `path` before is unchanged.

    Raises:
        InputError: it cannot be written, whichever library says so.
    """
    path = check_writable(path)
    if follows():
        return path
    target = _target(path)
    mode = _mode(str(path), target.lstat, "written")
    spare = target.with_name(f".eap-{secrets.token_hex(8)}{path.suffix}")
    try:
        # A private file is never readable to others, not even for a moment; a new one is what the umask makes it.
        os.close(os.open(spare, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else 0o600))
        mode = mode or spare.stat().st_mode
        write(spare)  # safetensors puts a private file in its place
        _sync(spare, os.O_RDWR)
        os.chmod(spare, stat.S_IMODE(mode))
        os.replace(spare, target)
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be written ({_why(error)}).") from error
    finally:
        with contextlib.suppress(OSError):
            spare.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every file system can
        _sync(target.parent, os.O_RDONLY)
    return path


def check_folder(path: str | os.PathLike[str]) -> Path:
    """Return the path if a folder can be made there, or an empty one is, else raise `InputError`. Writes nothing."""
    path, wanted = _path(path), "a new or an empty folder"
    if follows():
        return path
    if path.is_dir():
        if any(path.iterdir()):
            raise expected(str(path), wanted, "one with files")
    elif check_writable(path).exists():
        raise expected(str(path), wanted, "a file")
    return path


def write_folder(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Call `write` on a temporary folder beside `path`, then move it into place: whole or not at all.

    Of the ranks that share a call, only the first writes.

    Raises:
        InputError: it cannot be written, whichever library says so, or a folder with files is there.
    """
    path = check_folder(path)
    if follows():
        return path
    target = _target(path)
    spare = target.with_name(f".eap-{secrets.token_hex(8)}")
    try:
        spare.mkdir()
        write(spare)
        if target.is_dir():
            target.rmdir()  # not every system puts a folder in the place of an empty one
        spare.rename(target)
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path}: cannot be written ({_why(error)}).") from error
    finally:
        shutil.rmtree(spare, ignore_errors=True)
    return path


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], indent: int | None = None) -> Path:
    """Write a JSON object and its checksum, whole or not at all."""
    text = json.dumps(sealed(content), indent=indent) + "\n"
    return write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def _path(path: object) -> Path:
    try:
        return Path(path)  # type: ignore[arg-type]
    except TypeError:
        raise expected("path", "the name of a file", repr(path)) from None


def _target(path: Path) -> Path:
    """The file that a link leads to."""
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise InputError(f"{str(path)!r}: cannot be a file's name ({reason(error)}).") from error


def _mode(name: str, look: Callable[[], os.stat_result], done: str) -> int | None:
    """The type and permissions of what stands there; None for nothing."""
    try:
        return look().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be {done} ({_why(error)}).") from error


def _kind(mode: int | None) -> str:
    if mode is None or stat.S_ISDIR(mode):
        return "nothing there" if mode is None else "a folder"
    return "a link that leads nowhere" if stat.S_ISLNK(mode) else "something that is no file"


def _sync(path: Path, how: int) -> None:
    handle = os.open(path, how)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or reason(error)


# Reading.


def suffix_of(path: str | os.PathLike[str], suffixes: Collection[str]) -> str:
    """The path's suffix in lower case; raises `InputError` if it is not one of these."""
    suffix = _path(path).suffix
    if suffix.lower() not in suffixes:
        raise expected(str(path), "a name ending in " + ", ".join(suffixes), repr(suffix))
    return suffix.lower()


def check_file(path: str | os.PathLike[str], name: str | None = None) -> Path:
    """Return the path if a file is there, else raise `InputError`; `name` is what the error calls it."""
    path = _path(path)
    mode = _mode(name or str(path), path.stat, "read")
    if mode is None or not stat.S_ISREG(mode):
        raise expected(name or str(path), "a file", _kind(mode))
    return path


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """A file's bytes, read at once, so that a later change of the file does not matter.

    Raises:
        InputError: no file, one that cannot be read, does not fit into memory, or changed while it was read.
    """
    path = check_file(path)
    try:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            if before.st_size > memory_bytes():
                raise expected(str(path), "a file that fits into memory", f"{before.st_size:,} bytes")
            data = file.read()
            after = os.fstat(file.fileno())
    except (OSError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read ({_why(error)}).") from error
    if len(data) != before.st_size or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise expected(str(path), "a file that is not being written", "one that changed while it was read")
    return data


def memory_bytes() -> float:
    """This machine's memory; infinity where it cannot be asked."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else float("inf")


def read_json(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """The JSON object in a file that `write_json` wrote, or one without a checksum; `what` says what was expected."""
    data = read_whole(path)
    try:
        return unsealed(parse_json(data))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except DAMAGED as error:
        raise expected(str(path), what, f"something else ({reason(error)})") from error


def parse_json(text: str | bytes) -> Any:
    """JSON, as text or in UTF-8, in which no object has two members of one name.

    Raises:
        ValueError, RecursionError: anything else.
    """
    return json.loads(decoded(text) if isinstance(text, bytes) else text, object_pairs_hook=each_once)


def decoded(data: bytes) -> str:
    """Text in UTF-8; raises ValueError for anything else."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"a byte that is not UTF-8, at {error.start}") from error


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members; of two members with the same name the parser by itself would drop one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} comes twice")
            seen.add(name)
    return found


# Checksums.


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum."""
    return {**content, CHECKSUM: digest(content)}


def unsealed(content: Any) -> dict[str, Any]:
    """A JSON object without its checksum, which must be right; older files and those of others have none.

    Raises:
        InputError, TypeError: a wrong checksum, or no object.
    """
    rest = {name: value for name, value in json_object(content).items() if name != CHECKSUM}
    if CHECKSUM in content:
        check_digest(content[CHECKSUM], rest)
    return rest


def json_object(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TypeError(f"a {type(content).__name__} in place of an object")
    return content


def check_digest(found: object, head: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Refuse content that is not what `digest` was taken of."""
    if found != digest(head, tensors):
        raise expected(CHECKSUM, "the content's checksum", "another: it was changed after it was written, or damaged")


def digest(head: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """The SHA-256 of plain JSON values and of tensors' names, dtypes, shapes and bytes."""
    found = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name, x in sorted((tensors or {}).items()):
        found.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        found.update(memoryview(_bytes(x)))
    return found.hexdigest()


def _bytes(x: Tensor) -> Any:
    import torch

    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
