"""The one kind of error that bad input raises, and the one sentence it carries."""

from __future__ import annotations

import difflib
import inspect
import math
import operator
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_PACKAGE = os.path.join(os.path.dirname(__file__), "")
SEEDS = -(2**63), 2**64 - 1  # what torch takes


class InputError(ValueError):
    """An argument or a file is not what was expected: `name: expected …, found …`.

    It is raised before any work is done, wherever that is possible. The model and the files are as they were.
    """


class InputWarning(UserWarning):
    """Something handed in works, but hardly as it is meant."""


def warn(message: str) -> None:
    """Warn of what was handed in, at the line that called the package, as Python shows a line's message only once."""
    frame, depth, level = inspect.currentframe(), 1, 1
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            level = depth + 1
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, InputWarning, stacklevel=level)


def expected(name: str, wanted: str, found: object) -> InputError:
    """The error sentence `name: expected wanted, found found.`; what was found may be long, and is shortened."""
    return InputError(f"{name}: expected {wanted}, found {shortened(str(found))}.")


def shortened(text: str, most: int = 160) -> str:
    """The text in one line, without its middle where it has more characters than `most`."""
    text = " ".join(line.strip() for line in text.splitlines()) if len(text.splitlines()) > 1 else text
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"


def shown(value: object) -> str:
    """A value as an error sentence shows it."""
    try:
        return shortened(repr(value))
    except Exception:  # what is handed in may have any __repr__; Python's own refuses numbers of 5,000 digits
        return f"a value of type {type(value).__name__}"


def reason(error: BaseException) -> str:
    """Another library's error as a clause of a sentence: its message's first sentence, or the name of its type."""
    text = re.sub(r"^\[enforce fail at [^]]*\] \. ", "", str(error))  # where in torch's sources
    return "".join(text.splitlines()[:1]).partition(". ")[0][:200] or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Is it for want of memory, on a GPU or on a CPU?"""
    import torch

    said = ("can't allocate memory", "bad_alloc")  # by torch's allocator, and by C++ that cannot say more
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in said)


def refuse_default_device() -> None:
    """Refuse `torch.set_default_device` and `with torch.device(...)`: indices and data are made on the CPU."""
    import torch

    if torch.get_default_device().type != "cpu":
        wanted = "the CPU (a model is put on another device by model.to)"
        raise expected("torch's default device", wanted, str(torch.get_default_device()))


def one_of(name: str, value: object, choices: Collection[str]) -> None:
    """Refuse a value that is not among `choices`, and say which of them is meant where that can be told."""
    names = sorted(choices)
    if not isinstance(value, str) or value not in names:
        meant = " or ".join(map(repr, near(value, names)))
        found = f"{shortened(shown(value), 60)} (did you mean {meant}?)" if meant else shown(value)
        raise expected(name, "one of " + ", ".join(map(repr, names)), found)


def near(value: object, names: list[str]) -> list[str]:
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
    """`call`, which refuses arguments that it does not have, and says the right spelling; too many by position, too."""
    every = inspect.signature(call).parameters
    names = [name for name in every if name != "self"]
    by_position = [name for name in names if every[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    unnamed = len(every) - len(names)

    @wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            one_of(f"{call.__name__}(), argument", name, names)
        if len(args) - unnamed > len(by_position):
            wanted = f"at most {', '.join(by_position)} by position, and the others by name"
            raise expected(f"{call.__name__}()", wanted, f"{len(args) - unnamed} by position")
        return call(*args, **kwargs)

    return checked


def instance(name: str, value: object, kind: type[T], wanted: str | None = None) -> T:
    """The value, if it is of this type; `wanted`, or else the type's name, says in the error sentence what it is."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise expected(name, wanted or f"{article} {kind.__name__}", type(value).__name__)
    return value


def whole(name: str, value: object, least: int | None = None, most: int | None = None, note: str = "") -> int:
    """A whole number of Python, numpy or torch as an `int`; refuses others, those out of range, True and False.

    Args:
        note: what else the error sentence says is expected, after the number.
    """
    try:
        found = None if _boolean(value) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None or (least is not None and found < least) or (most is not None and found > most):
        bounds = "" if least is None else f" of at least {least}" if most is None else f" from {least} to {most:,}"
        raise expected(name, f"a whole number{bounds}{note}", shown(value))
    return found


def number(name: str, value: object, wanted: str, least: float = -math.inf, most: float = math.inf) -> float:
    """A number of Python, numpy or torch as a `float`; refuses others, NaN, those out of range, True and False.

    Args:
        wanted: what the error sentence says is expected.
    """
    plain = None if _boolean(value) else _plain(value)
    if not isinstance(plain, (int, float)) or not least <= plain <= most:
        raise expected(name, wanted, shown(value))
    try:
        return float(plain)
    except OverflowError:
        raise expected(name, wanted, shown(value)) from None


def flag(name: str, value: object) -> bool:
    """True or False of Python, numpy or torch as a `bool`; refuses all else, such as 1 and "no"."""
    if not _boolean(value):
        raise expected(name, "True or False", shown(value))
    return bool(_plain(value))


def _plain(value: Any) -> Any:
    """A single number of numpy or torch as Python's."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _boolean(value: object) -> bool:
    return isinstance(_plain(value), bool)


def listed(name: str, value: object, wanted: str) -> list[Any]:
    """The members of a list, tuple, set, range, iterator, or array or tensor of one dimension; refuses all else."""
    one = getattr(value, "ndim", 1) == 1
    if not one or not isinstance(value, Iterable) or isinstance(value, (str, bytes, bytearray, Mapping)):
        raise expected(name, wanted, shown(value))
    return list(value)


def growing_shares(name: str, value: object) -> tuple[float, ...]:
    """One or more growing numbers in (0, 1] as a tuple of `float`; refuses all else."""
    wanted = "growing numbers in (0, 1]"
    found = tuple(number(name, each, wanted) for each in listed(name, value, wanted))
    if not found or not all(a < b for a, b in pairwise((0.0, *found))) or found[-1] > 1:
        raise expected(name, wanted, found)
    return found


def function(name: str, value: object, wanted: str) -> None:
    """Refuse what cannot be called with two arguments; a class or a model can be, but is not meant."""
    try:
        signature = inspect.signature(value) if callable(value) else None
        fits = signature is not None and bool(signature.bind(None, None))
    except TypeError:
        fits = False
    except ValueError:
        fits = True  # a callable that does not tell
    if not fits or isinstance(value, type) or hasattr(value, "get_input_embeddings"):
        raise expected(name, wanted, shown(value))
