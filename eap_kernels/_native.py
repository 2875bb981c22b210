"""Load the compiled operator library, or remember why it is missing."""

from __future__ import annotations

import functools
import importlib
import warnings
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
    """The module that describes the native build, or None where there is none."""
    try:
        return importlib.import_module("eap_kernels._build_info")
    except ImportError:
        return None


@functools.cache
def say_missing() -> None:
    """Warn, once in a process, that the compiled kernels are missing and how to get them."""
    warnings.warn(
        # Without its cache: there pip keeps the wheel without kernels.
        f"eap_kernels has no compiled kernels and computes more slowly: {failure}. To get them, install torch and a "
        "C++ compiler, then this package again, from its folder or with its name for the dot: "
        "`pip install --force-reinstall --no-deps --no-cache-dir .`, or `uv pip install --reinstall --no-deps "
        "--no-cache .`.",
        stacklevel=2,
    )


# None when the library is loaded, otherwise one clause that says why not.
failure: str | None = _load()
