"""The one kind of error that bad input raises, and the one sentence it carries."""

from __future__ import annotations

import warnings


class InputError(ValueError):
    """An argument or a file is not what was expected: `name: expected …, found …`.

    It is raised before any work is done, wherever that is possible. The model and the files are as they were.
    """


class InputWarning(UserWarning):
    """Something handed in works, but hardly as it is meant."""


def warn(message: str) -> None:
    """Warn of what was handed in."""
    warnings.warn(message, InputWarning, stacklevel=3)


def expected(name: str, wanted: str, found: object) -> InputError:
    """The error sentence `name: expected wanted, found found.`"""
    return InputError(f"{name}: expected {wanted}, found {found}.")


def reason(error: BaseException) -> str:
    """Another library's error as a clause of a sentence: the first line of its message, or the name of its type."""
    lines = str(error).splitlines()
    return (lines[0][:200] if lines else "") or type(error).__name__


def one_of(name: str, value: object, choices: object) -> None:
    """Refuse a value that is not among `choices` (a collection of strings)."""
    names = sorted(choices)  # type: ignore[call-overload]
    if value not in names:
        raise expected(name, "one of " + ", ".join(map(repr, names)), repr(value))
