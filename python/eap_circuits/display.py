"""What results have in common: equality, and how they show themselves in a notebook.

Drawing stands above the rooms whose results it draws. It is looked up only when something is to be shown.
"""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import expected, instance

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Result:
    """A dataclass of results, each with an `info` of its own: equal to others of the same numbers, whatever that says;
    a table or a picture in a notebook."""

    def __post_init__(self) -> None:
        if hasattr(self, "info"):
            object.__setattr__(self, "info", dict(instance("info", self.info, dict, "a dictionary")))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        names = (field.name for field in fields(self) if field.name != "info")  # type: ignore[arg-type]
        return all(_same(getattr(self, name), getattr(other, name)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    def _repr_html_(self) -> str:
        return str(_report("notebook").html_of(self))


def drawn(how: str, *args: Any) -> Figure:
    """The figure that one of `report.figures`' functions draws."""
    figure: Figure = getattr(_report("figures"), how)(*args)
    return figure


def library(name: str, call: str, package: str = "") -> Any:
    """A library that only this call needs; raises InputError with the package, by default of its name, to install."""
    try:
        return import_module(name)
    except ImportError as error:
        raise expected(call, f"{name} (pip install {package or name})", "none") from error


def _report(module: str) -> Any:
    return import_module(f"{__package__}.report.{module}")


def _same(one: Any, other: Any) -> bool:
    from torch import Tensor, equal

    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and equal(one, other)
    return type(one) is type(other) and bool(one == other)
