"""Files are written whole or not at all."""

from __future__ import annotations

import os
import pickle
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .errors import InputError, expected

# What json, safetensors and torch raise for damaged files; for some truncated ones torch raises OSError or asserts.
DAMAGED = (
    AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError, SafetensorError, TypeError,
    ValueError, pickle.UnpicklingError, struct.error,
)  # fmt: skip


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return the path if a file can be written there, else raise `InputError`. Writes nothing."""
    path = Path(path)
    if path.is_dir():
        raise expected(str(path), "a file to write", "a folder")
    folder = path.parent
    if not folder.is_dir():
        raise expected(str(path), "a folder that exists", f"no folder {str(folder)!r}")
    if not os.access(folder, os.W_OK):
        raise expected(str(path), "a folder that can be written to", f"{str(folder)!r}, which cannot")
    return path


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Call `write` on a temporary file beside `path`, then move it into place in one step.

    After an error or an interruption, a file that was at `path` before is unchanged.
    """
    path = check_writable(path)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from error
    os.close(handle)
    try:
        write(Path(name))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(name, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}).") from error
    finally:
        Path(name).unlink(missing_ok=True)
    return path
