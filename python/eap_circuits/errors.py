"""The one kind of error that bad input raises, and the one sentence it carries."""

from __future__ import annotations

import warnings


class InputError(ValueError):
    """Something handed in is not what was expected: `name: expected …, found …`.

    Raised before any work is done wherever that is possible; the model and the files are as they were.
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
    """What another library's error says, as a clause of a sentence: its first line, or the kind of error."""
    lines = str(error).splitlines()
    return (lines[0][:200] if lines else "") or type(error).__name__


def one_of(name: str, value: object, choices: object) -> None:
    """Refuse a value that is not among `choices` (a collection of strings)."""
    names = sorted(choices)  # type: ignore[call-overload]
    if value not in names:
        raise expected(name, "one of " + ", ".join(map(repr, names)), repr(value))
