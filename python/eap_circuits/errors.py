"""The one kind of error that bad input raises, and the one sentence it carries."""

from __future__ import annotations

import difflib
import inspect
import operator
import re
import warnings
from collections.abc import Callable, Collection
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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


def refuse_default_device() -> None:
    """Refuse `torch.set_default_device` and `with torch.device(...)`: indices and data are made on the CPU."""
    import torch

    if torch.get_default_device().type != "cpu":
        wanted = "the CPU (a model is put on another device by model.to)"
        raise expected("torch's default device", wanted, str(torch.get_default_device()))


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a value that is not among `choices`, and say which of them is meant where that can be told."""
    names = sorted(choices)
    if value not in names:
        near = " or ".join(map(repr, _near(value, names)))
        found = f"{value!r} (did you mean {near}?)" if near else repr(value)
        raise expected(name, "one of " + ", ".join(map(repr, names)), found)


def _near(value: object, names: list[str]) -> list[str]:
    """The names that other packages or a slip of the pen may spell like this."""
    if not isinstance(value, str) or not value:
        return []

    def parts(text: str) -> list[str]:
        return re.split(r"[-_ ]", text.lower())

    said = parts(value)
    alike: tuple[Callable[[list[str]], bool], ...] = (
        lambda name: name == said,
        lambda name: name == said[-len(name) :] or said == name[: len(said)],  # ig_steps for steps, EAP-IG
        lambda name: len(name) > 1 and "".join(part[:1] for part in name) == value.lower(),  # ifr
    )
    found: list[str] = next((near for test in alike if (near := [n for n in names if test(parts(n))])), [])
    lower = {name.lower(): name for name in names}
    return found or [lower[name] for name in difflib.get_close_matches(value.lower(), lower, n=1)]


def known_arguments(call: Callable[P, T]) -> Callable[P, T]:
    """`call`, which refuses arguments that it does not have, and says the right spelling."""
    names = list(inspect.signature(call).parameters)

    @wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            one_of(f"{call.__name__}(), argument", name, names)
        return call(*args, **kwargs)

    return checked


def whole(name: str, value: object, least: int | None = None, most: int | None = None, note: str = "") -> int:
    """A whole number of Python, numpy or torch as an `int`; refuses others, those out of range, True and False.

    Args:
        note: what else the error sentence says is expected, after the number.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    boolean = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if number is None or boolean or (least is not None and number < least) or (most is not None and number > most):
        bounds = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most:,}"
        raise expected(name, f"a whole number{bounds}{note}", repr(value))
    return number
