"""Load the compiled operator library, or remember why it is missing."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

_NOTE = Path(__file__).with_name("_build_failure.txt")


def _load() -> str | None:
    try:
        importlib.import_module("eap_kernels._C")
    except ImportError as error:
        if _NOTE.exists():
            return _NOTE.read_text().strip()
        return f"the compiled library could not be loaded ({error})"
    return None


def build_info() -> ModuleType | None:
    """The module that describes the native build, or None where it was not built for this Python."""
    try:
        return importlib.import_module("eap_kernels._build_info")
    except ImportError:
        return None


# None when the library is loaded, otherwise one clause that says why not.
failure: str | None = _load()
