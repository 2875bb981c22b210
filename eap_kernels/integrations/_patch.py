"""Replace attributes of another package's modules, and put them back."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import CodeType, ModuleType
from typing import Any, NamedTuple


class Replacement(NamedTuple):
    """An attribute, and the function that takes its place."""

    owner: Any
    name: str
    function: Callable[..., Any]


class Patch:
    """Replaced attributes, which stay until `restore()` or the end of a `with` block.

    An attribute that another patch has replaced is left to that patch, so nested and repeated patches are harmless.
    """

    def __init__(self, *replacements: Replacement) -> None:
        self._originals: list[tuple[Any, str, Any]] = []
        for owner, name, function in replacements:
            original = getattr(owner, name)
            if original.__module__ != function.__module__:
                self._originals.append((owner, name, original))
                setattr(owner, name, function)

    def restore(self) -> None:
        """Put back what this patch replaced. Further calls do nothing."""
        while self._originals:
            setattr(*self._originals.pop())

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


def load(op: str, *modules: str) -> ModuleType:
    """A module of the codebase to patch: the first of these names that is there."""
    module = next(filter(_there, modules), modules[0])
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{op}: expected {module} to be importable, got {error}") from error


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # imported, but from no file
        return True
    except ImportError:
        return False


def part(op: str, owner: Any, *names: str) -> Any:
    """What a module, or a class in it, has under a name: another version may have nothing there."""
    for name in names:
        if not hasattr(owner, name):
            raise RuntimeError(f"{op}: expected {owner.__name__} to have {name!r}, got another version of it")
        owner = getattr(owner, name)
    return owner


def expect(op: str, function: Any, *words: str) -> None:
    """Check that a function is the one a patch was written for: its code uses these names and strings."""
    missing = set(words) - set(_words(function.__code__))
    if missing:
        name = f"{function.__module__}.{function.__qualname__}"
        raise RuntimeError(f"{op}: expected {name} to use {sorted(missing)[0]!r}, got another version of it")


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words(constant)
