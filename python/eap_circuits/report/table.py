"""What a table is, and how numbers are shown in one; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .curves import jsonable

NONE = "–"


@dataclass(frozen=True)
class Column:
    """One column: its key in JSON, its heading, and how a value is shown."""

    key: str
    title: str
    show: Callable[[Any], str] = str
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of raw values; `cells` is for readers, `records` for programs."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    marked: int | None = None

    def cells(self) -> list[list[str]]:
        return [[c.show(value) for c, value in zip(self.columns, row, strict=True)] for row in self.rows]

    def records(self) -> list[dict[str, Any]]:
        return [{c.key: jsonable(value) for c, value in zip(self.columns, row, strict=True)} for row in self.rows]


def number(value: float, decimals: int = 3) -> str:
    """A number with fixed decimals and no minus before zeros; a dash if it is not finite."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}" if math.isfinite(value) else NONE


def count(value: int) -> str:
    return f"{value:,}"


def percent(value: float) -> str:
    """A share with three significant digits: 0.1 %, 12.3 %."""
    return f"{100 * value:.3g} %" if math.isfinite(value) else NONE
