"""Rows and number formats of the tables in the command line and in the HTML report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from ..cards import RESAMPLED, FaithfulnessCard
from ..evaluation import BASELINES, Comparison
from ..graph import Circuit, EdgeScores
from ..methods import Plan
from ..provenance import without_folder
from .curves import BaselineLike, CurveLike
from .table import Column, Table, count, number, percent

BASELINE_NAMES = {baseline.name: baseline.title for baseline in BASELINES.values()}
FREE = 1e-3  # an edge costs nothing if faithfulness falls by less without it


def edge_table(scores: EdgeScores, circuit: Circuit | None = None, n: int = 20) -> Table:
    """The n edges of largest absolute score, and whether the circuit has them."""
    edges = scores.top_edges(n)
    largest = abs(edges[0][2]) if edges else 0.0
    decimals = 4 if largest == 0 else min(max(3 - math.floor(math.log10(largest)), 2), 12)
    columns = [
        Column("sender", "sender"),
        Column("receiver", "receiver"),
        Column("score", "score", lambda value: f"{value:+.{decimals}f}", numeric=True),
    ]
    rows: list[tuple[Any, ...]] = [(sender, receiver, score) for sender, receiver, score in edges]
    if circuit is not None:
        kept = set(circuit.edges)
        columns.append(Column("in_circuit", "in circuit", lambda value: "yes" if value else "no"))
        rows = [(*row, row[:2] in kept) for row in rows]
    return Table("Strongest edges", tuple(columns), tuple(rows))


def plan_table(plan: Plan) -> Table:
    """The batches that attribution will run, equal ones in one row, and the memory that it will take."""
    rows: dict[tuple[int, int, int], int] = {}
    for batch in plan.batches:
        rows[batch] = rows.get(batch, 0) + 1
    columns = (
        Column("batches", "batches", count, numeric=True),
        Column("examples", "examples each", count, numeric=True),
        Column("tokens", "tokens to run", count, numeric=True),
        Column("steps", "steps at once", count, numeric=True),
    )
    title = f"{gibibytes(plan.bytes)} besides model and data, of {gibibytes(plan.budget)} allowed"
    if plan.gpus > 1:
        title += f" on each of {plan.gpus} GPUs, and {gibibytes(plan.weights // plan.gpus)} of the weights"
    if plan.seconds is not None and plan.rates is not None:
        passes, contraction = (f"{rate / 1e12:.0f} TFLOP/s" for rate in plan.rates)
        title += f"; about {duration(plan.seconds)} if passes run at {passes} and the contraction at {contraction}"
    return Table(title, columns, tuple((n, *batch) for batch, n in rows.items()))


def duration(seconds: float) -> str:
    """0.26 s, 39 s, 12 min or 3.4 h."""
    unit, size = next(((unit, size) for unit, size in (("h", 3600), ("min", 60)) if seconds >= 2 * size), ("s", 1))
    value = seconds / size
    return f"{value:.2g} {unit}" if value < 10 else f"{value:,.0f} {unit}"


def gibibytes(value: int) -> str:
    return f"{value / 2**30:.2f} GiB"


def curve_table(curve: CurveLike, circuit: Circuit | None = None) -> Table:
    """Faithfulness by circuit size, with the baselines' means; the row of `circuit` is marked if it has one."""
    columns = [
        Column("fraction", "share taken", percent, numeric=True),
        Column("n_edges", "edges kept", count, numeric=True),
        Column("faithfulness", "faithfulness", number, numeric=True),
        Column("mean", "mean metric", number, numeric=True),
    ]
    columns += [Column(name, BASELINE_NAMES.get(name, name), number, numeric=True) for name in curve.baselines]
    others = [baseline.faithfulness for baseline in curve.baselines.values()]
    rows = zip(curve.fractions, curve.n_edges, curve.faithfulness, curve.mean, *others, strict=True)
    return Table("Faithfulness by circuit size", tuple(columns), tuple(rows), curve_index(curve, circuit))


def areas_line(curve: CurveLike) -> str:
    """CPR and CMD of the curve, and of circuits drawn at random if they were measured."""
    areas = [f"CPR {number(curve.cpr)}, CMD {number(curve.cmd)}"]
    areas += [f"{BASELINES[name].title} {number(x.cpr)}, {number(x.cmd)}" for name, x in drawn_baselines(curve).items()]
    return "; ".join(areas) + "."


def drawn_baselines(curve: CurveLike) -> dict[str, BaselineLike]:
    """The curve's baselines whose circuits are drawn at random, by name."""
    return {name: x for name, x in curve.baselines.items() if name in BASELINES and BASELINES[name].drawn}


def cross_table(comparison: Comparison, first: str, second: str) -> Table:
    """How faithful each of two circuits, of these names, is on the prompts of either."""
    columns = (
        Column("circuit", "circuit"),
        Column("on_first", f"on {first}'s prompts", number, numeric=True),
        Column("on_second", f"on {second}'s prompts", number, numeric=True),
    )
    rows = zip((first, second), comparison.faithfulness, strict=True)
    return Table("Each circuit's faithfulness on both", columns, tuple((name, *row) for name, row in rows))


def result_table(result: Any, circuit: Circuit) -> Table:
    """The results of one circuit, of the whole model and of the run with all edges ablated."""
    columns = (
        Column("run", "run"),
        Column("n_edges", "edges kept", count, numeric=True),
        Column("mean", "mean metric", number, numeric=True),
        Column("faithfulness", "faithfulness", number, numeric=True),
    )
    rows = (
        ("whole model", circuit.graph.n_edges, result.clean, 1.0),
        ("circuit", circuit.n_edges, result.mean, result.faithfulness),
        ("all edges ablated", 0, result.corrupted, 0.0),
    )
    return Table("Faithfulness of the circuit", columns, rows, marked=1)


def pairs_table(result: Any, prompts: Sequence[Mapping[str, str]]) -> Table:
    """The metric of each of these prompt pairs, the first that were run, and the circuit's faithfulness on it alone."""
    columns = (
        Column("clean", "clean prompt"),
        Column("answers", "answers"),
        Column("model", "whole model", number, numeric=True),
        Column("circuit", "circuit", number, numeric=True),
        Column("ablated", "all edges ablated", number, numeric=True),
        Column("faithfulness", "faithfulness", number, numeric=True),
    )
    each = (x.tolist() for x in (result.clean_values, result.values, result.corrupted_values))
    rows = [
        (
            *(prompt[column.key] for column in columns[:2]),
            *(model, own, ablated, (own - ablated) / (model - ablated) if model != ablated else math.nan),
        )
        for prompt, model, own, ablated in zip(prompts, *each, strict=False)
    ]
    n = len(result.values)
    return Table(
        "Each prompt pair" if len(rows) == n else f"The first {len(rows)} of {n} prompt pairs", columns, tuple(rows)
    )


def card_table(card: FaithfulnessCard) -> Table:
    """Faithfulness of the circuit on all prompts and of the circuits beside it, and how far it goes up and down."""
    columns = (
        Column("what", "circuit"),
        Column("n_edges", "edges", count, numeric=True),
        Column("pairs", "prompt pairs", count, numeric=True),
        Column("faithfulness", "faithfulness", number, numeric=True),
        Column("low", "from", number, numeric=True),
        Column("high", "to", number, numeric=True),
    )
    rows: list[tuple[Any, ...]] = []
    for what, result in (("the circuit", card.result), *((f"on {name}", x) for name, x in card.others.items())):
        rows.append((what, card.circuit.n_edges, len(result.values), result.faithfulness, *result.interval))
    titles = {RESAMPLED: "chosen by resampled pairs", **BASELINE_NAMES}
    for name, baseline in card.beside.items():
        sizes, draws = [circuit.n_edges for (circuit,) in baseline.circuits], [draw for (draw,) in baseline.draws]
        size, pairs = round(sum(sizes) / len(sizes)), len(card.result.values)
        rows.append((titles[name], size, pairs, *baseline.faithfulness, min(draws), max(draws)))
    return Table("Faithfulness card", columns, tuple(rows), marked=0)


def cost_table(card: FaithfulnessCard, n: int = 10) -> Table:
    """The edges that the circuit needs least, and what it loses without each."""
    columns = (Column("edge", "edge"), Column("cost", "faithfulness lost without it", number, numeric=True))
    return Table("Edges that the circuit needs least", columns, tuple(card.cost.items())[:n])


def card_line(card: FaithfulnessCard) -> str:
    """What the tables of a card do not say."""
    said = []
    if card.shared:
        mean, low, high = (
            percent(x) for x in (sum(card.shared) / len(card.shared), min(card.shared), max(card.shared))
        )
        said.append(f"Circuits chosen by resampled pairs share {mean} of their edges with it ({low} to {high}).")
    if card.cost:
        free = sum(cost < FREE for cost in card.cost.values())
        said.append(f"Of {count(len(card.cost))} edges left out one at a time, {count(free)} cost less than {FREE}.")
    return " ".join([*said, f"{count(card.forwards)} prompts were run."])


def curve_index(curve: CurveLike, circuit: Circuit | None) -> int | None:
    """The index of the circuit's size in the curve, or None."""
    if circuit is None or circuit.n_edges not in tuple(curve.n_edges):
        return None
    return tuple(curve.n_edges).index(circuit.n_edges)


_LABELS = {
    "model": "model",
    "task": "task",
    "data": "data",
    "n_examples": "prompt pairs",
    "seed": "seed of the prompts",
    "metric": "metric",
    "method": "method",
    "steps": "steps",
    "quadrature": "quadrature",
    "ablation": "ablation",
    "heads": "heads",
    "compat": "compatibility",
    "selection": "selection",
    "call": "call",
    "date": "date",
    "device": "device",
    "dtype": "dtype",
    "backend": "operator",
    "replayed": "passes replayed",
    "revision": "revision of the model",
    "weights_sha256": "SHA-256 of the weights",
    "data_sha256": "SHA-256 of the data",
    "prompts_sha256": "SHA-256 of the prompts",
}
_ELSEWHERE = ("versions", "scores")


def settings(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, as (label, value) pairs: entries with a label first, then all others."""
    keys = [key for key in _LABELS if key in info] + [key for key in info if key not in _LABELS]
    pairs = []
    for key in keys:
        value = info[key]
        if value is None or value == {} or key in _ELSEWHERE:
            continue
        if key == "model":
            value = without_folder(str(value))
        if key == "spans" and isinstance(value, Mapping):
            value = value.get("names")
        pairs.append((_LABELS.get(key, str(key).replace("_", " ")), _shown(value)))
    return pairs


def versions(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The versions that a result was made with; those installed here say nothing of it."""
    carried = info.get("versions")
    return [(str(name), str(version)) for name, version in carried.items()] if isinstance(carried, Mapping) else []


def installed(package: str) -> str:
    """The version of a package, or "not installed", as for a source tree on the path."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(x)}" for key, x in value.items() if x not in (None, False))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_shown, value[:8])) + (" …" if len(value) > 8 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
