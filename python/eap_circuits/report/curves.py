"""What the report needs from a faithfulness curve, whether just measured or read from a file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Union

from ..errors import InputError, expected, growing_shares, reason
from ..files import DAMAGED, read_json, write_json

if TYPE_CHECKING:
    from ..evaluation import Baseline, Curve


@dataclass(frozen=True)
class SavedBaseline:
    """A baseline read back from JSON: `faithfulness` [size], the mean of `draws` [draw][size]."""

    faithfulness: tuple[float, ...]
    draws: tuple[tuple[float, ...], ...]
    cpr: float
    cmd: float


@dataclass(frozen=True)
class SavedCurve:
    """A curve read back from JSON: only its numbers, without circuits and per-example values."""

    fractions: tuple[float, ...]
    n_edges: tuple[int, ...]
    faithfulness: tuple[float, ...]
    mean: tuple[float, ...]
    clean: float
    corrupted: float
    cpr: float
    cmd: float
    baselines: Mapping[str, SavedBaseline] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = [len(self.fractions), len(self.n_edges), len(self.faithfulness), len(self.mean)]
        if len(set(lengths)) > 1:
            raise expected("curve", "as many fractions as edge counts, faithfulness values and means", lengths)
        for name, baseline in self.baselines.items():
            sizes = {len(row) for row in (baseline.faithfulness, *baseline.draws)}
            if sizes != {len(self.fractions)}:
                raise expected(f"baseline {name!r}", f"{len(self.fractions)} values, as the curve", sorted(sizes))
        growing_shares("fractions", self.fractions)


BaselineLike = Union["Baseline", SavedBaseline]
CurveLike = Union["Curve", SavedCurve]


def save_curve(path: str | os.PathLike[str], curve: Curve) -> None:
    """Write an `eap_circuits.Curve` as JSON, for `load_curve`; whole or not at all."""
    write_json(path, jsonable(curve.to_dict()), indent=2)


def load_curve(path: str | os.PathLike[str]) -> SavedCurve:
    """Read the JSON that `save_curve` and `eap curve -o` write. Raises `InputError` for anything else."""
    what = "a curve written by `eap curve -o`"
    content = read_json(path, what)
    try:
        return saved_curve(content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except DAMAGED as error:
        raise expected(str(path), what, f"something else ({reason(error)})") from error


def saved_curve(content: Any) -> SavedCurve:
    """The curve that `Curve.to_dict` wrote; LookupError, TypeError or ValueError for anything else."""
    fractions, faithfulness, mean = (
        tuple(_number(x) for x in content[name]) for name in ("fractions", "faithfulness", "mean")
    )
    clean, corrupted, cpr, cmd = (_number(content[name]) for name in ("clean", "corrupted", "cpr", "cmd"))
    n_edges = tuple(content["n_edges"])
    if not all(type(n) is int and n >= 0 for n in n_edges):
        raise ValueError("numbers of edges that are not whole")
    # Older files have no baselines, and no info.
    baselines = {str(name): _baseline(entry) for name, entry in content.get("baselines", {}).items()}
    info = dict(content.get("info", {}))
    return SavedCurve(fractions, n_edges, faithfulness, mean, clean, corrupted, cpr, cmd, baselines, info)


def _baseline(content: Any) -> SavedBaseline:
    faithfulness, *draws = (tuple(_number(x) for x in row) for row in (content["faithfulness"], *content["draws"]))
    return SavedBaseline(faithfulness, tuple(draws), _number(content["cpr"]), _number(content["cmd"]))


def smallest_faithful(curve: CurveLike, at_least: float = 0.8) -> int:
    """Index of the smallest circuit with faithfulness ≥ `at_least`, else of the largest that is not the whole model."""
    sizes = sorted(range(len(curve.n_edges)), key=lambda i: curve.n_edges[i])
    partial = [i for i in sizes if curve.fractions[i] < 1 and curve.n_edges[i] > 0] or sizes[-1:]
    return next((i for i in partial if curve.faithfulness[i] >= at_least), partial[-1])


def jsonable(value: Any) -> Any:
    """Plain JSON values: NaN and infinities become null, tensors and tuples become lists."""
    if isinstance(value, dict):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def _number(value: Any) -> float:
    """A number that `jsonable` wrote."""
    if value is None:
        return math.nan
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]!r} in place of a number")
    return float(value)
