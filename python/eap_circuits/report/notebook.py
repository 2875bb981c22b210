"""How results show themselves in a notebook: their line, a picture, and the first rows of a table."""

from __future__ import annotations

from functools import singledispatch
from html import escape
from typing import Any

from matplotlib.figure import Figure

from ..cards import FaithfulnessCard
from ..evaluation import Comparison, Curve, EvaluationResult
from ..graph import Circuit, EdgeScores, NodeScores
from ..tasks import PairedDataset
from .explorer import KEPT
from .figures.svg import to_svg
from .inline import EDGES, inline
from .tables import (
    Column,
    Table,
    areas_line,
    card_line,
    card_table,
    cost_table,
    count,
    curve_table,
    edge_table,
    number,
    percent,
)

_ROWS = 10
_FIRST = 100  # edges with which scores are shown first, and of a still picture
_SCORE = Column("score", "score", lambda value: f"{value:+.4g}", numeric=True)
_EDGES, _NODES = Column("edges", "edges", count, numeric=True), Column("nodes", "nodes", count, numeric=True)


@singledispatch
def html_of(result: Any) -> str:
    """A result as HTML, in which all texts of data and files are escaped."""
    raise TypeError(type(result))


@html_of.register
def _(scores: EdgeScores) -> str:
    circuit = scores.select(n_edges=min(_FIRST, scores.graph.n_edges))
    return _page(scores, *_explored(scores, circuit, scores.heatmap()), edge_table(scores, n=_ROWS))


@html_of.register
def _(scores: NodeScores) -> str:
    table = Table("Strongest nodes", (Column("node", "node"), _SCORE), tuple(scores.top_nodes(_ROWS)))
    return _page(scores, to_svg(scores.plot()), table)


@html_of.register
def _(circuit: Circuit) -> str:
    if circuit.values is None:
        return _page(circuit, to_svg(circuit.plot()))
    scores = EdgeScores(circuit.graph, circuit.values, circuit.info)
    return _page(circuit, *_explored(scores, circuit, circuit.plot(_FIRST)))


@html_of.register
def _(curve: Curve) -> str:
    return _page(curve, to_svg(curve.plot()), curve_table(curve), areas_line(curve))


@html_of.register
def _(result: EvaluationResult) -> str:
    columns = (Column("run", "run"), Column("mean", "mean metric", number, numeric=True))
    rows = (("whole model", result.clean), ("circuit", result.mean), ("all edges ablated", result.corrupted))
    return _page(result, Table("", columns, rows), f"Faithfulness {number(result.faithfulness)}.")


@html_of.register
def _(card: FaithfulnessCard) -> str:
    return _page(card, card_table(card), card_line(card), cost_table(card, _ROWS))


@html_of.register
def _(comparison: Comparison) -> str:
    nodes, edges = comparison.nodes, comparison.edges
    overlap = (
        ("first", edges.n_first, nodes.n_first),
        ("second", edges.n_second, nodes.n_second),
        ("both", edges.n_shared, nodes.n_shared),
    )
    tasks = tuple(Column(name, f"on the {name} task", _with_interval, numeric=True) for name in ("first", "second"))
    rows = tuple((name, *results) for name, results in zip(("first", "second"), comparison.results, strict=True))
    found = Table(
        "Faithfulness, and where it stays for 95 % of resamples", (Column("circuit", "circuit"), *tasks), rows
    )
    shared = f"Shared: {percent(edges.iou)} of all their edges, {percent(nodes.iou)} of all their nodes."
    both = Table("Overlap", (Column("circuit", "circuit"), _EDGES, _NODES), overlap)
    return _page(comparison, to_svg(comparison.plot()), both, shared, found)


def _with_interval(result: EvaluationResult) -> str:
    low, high = result.interval
    return f"{number(result.faithfulness)} ({number(low)} to {number(high)})"


@html_of.register
def _(data: PairedDataset) -> str:
    names = ("clean", "corrupted", "good", "bad")
    held = data[:_ROWS].to_dict()
    columns = tuple(Column(name, name) for name in names)
    table = Table("", columns, tuple(zip(*(held[name] for name in names), strict=True)))
    more = len(data) - len(table.rows)
    return _page(data, table, *([f"… and {count(more)} more"] if more else []))


def _explored(scores: EdgeScores, circuit: Circuit, still: Figure) -> list[str]:
    """The explorer, and what is said if it has not all edges; the still picture if it would be too large."""
    shown = inline(scores, circuit, still)
    if shown is None:
        return [to_svg(still)]
    n = scores.graph.base.n_edges
    said = f"The explorer holds the strongest {count(EDGES)} of {count(n)} edges; write_report holds {count(KEPT)}."
    return [shown, said] if n > EDGES else [shown]


def _page(result: object, *parts: Table | str) -> str:
    """The result's line, and below it pictures, tables and sentences."""
    shown = [_table(part) if isinstance(part, Table) else _block(part) for part in parts]
    return f"<div><p><code>{escape(repr(result))}</code></p>{''.join(shown)}</div>"


def _block(text: str) -> str:
    return text if text.startswith(("<svg", "<div")) else f"<p>{escape(text)}</p>"


def _table(table: Table) -> str:
    def row(cells: list[str], kind: str) -> str:
        aligned = zip(cells, table.columns, strict=True)
        sides = [(cell, "right" if column.numeric else "left") for cell, column in aligned]
        found = "".join(f'<{kind} style="text-align: {side}">{escape(cell)}</{kind}>' for cell, side in sides)
        return f"<tr>{found}</tr>"

    head = row([column.title for column in table.columns], "th")
    title = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    return f"<table>{title}<thead>{head}</thead><tbody>{''.join(row(c, 'td') for c in table.cells())}</tbody></table>"
