"""A report as one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ..errors import expected
from ..files import write_whole
from ..graph import Circuit, EdgeScores, edge_overlap
from .curves import CurveLike
from .explorer import names, other_of, page_data, same_prompts
from .figures import draw_circuit, draw_curve
from .figures.svg import to_svg
from .page import rendered
from .table import Table
from .tables import (
    card_line,
    card_table,
    cost_table,
    count,
    cross_table,
    curve_index,
    curve_table,
    drawn_baselines,
    edge_table,
    number,
    pairs_table,
    percent,
    settings,
    versions,
)

if TYPE_CHECKING:
    from ..cards import FaithfulnessCard
    from ..evaluation import Comparison
    from ..tasks import PairedDataset

N_EDGES = 40
N_PROMPTS = 5
N_PAIRS = 200


def write_report(
    path: str | os.PathLike[str],
    scores: EdgeScores,
    circuit: Circuit,
    curve: CurveLike | None = None,
    data: PairedDataset | None = None,
    title: str | None = None,
    files: Mapping[str, str] | None = None,
    against: Circuit | EdgeScores | None = None,
    tokenizer: Any = None,
    card: FaithfulnessCard | None = None,
    comparison: Comparison | None = None,
) -> None:
    """Write a report of a circuit: what was run, how faithful it is, and an explorer of its graph and edges.

    The page needs no network. It holds the strongest 200,000 edges and says how many are left out.

    Args:
        path: the HTML file; written whole or not at all.
        scores: the edge scores that the circuit was chosen by.
        circuit: the circuit.
        curve: faithfulness by circuit size, measured or read by `load_curve`.
        data: the prompts; a few of them are shown.
        title: the page's title; by default the model and the task.
        files: the names under which "scores" and perhaps "circuit" were saved, for the code that reads them back.
        against: a circuit to compare with or, of other scores, the circuit with as many edges.
        tokenizer: the model's, to spell answers and the tokens at positions; without it ids and numbers are shown.
        card: the circuit's faithfulness card.
        comparison: what `compare` found of `circuit` and `against`, in this order; their faithfulness is shown.

    Raises:
        InputError: a circuit of another graph than the scores, a comparison of other circuits, or a path that cannot
            be written.
    """
    for name, given in (("circuit", circuit), ("against", against)):
        if given is not None and given.graph != scores.graph:
            raise expected(name, f"one of {scores.graph!r}", f"one of {given.graph!r}")
    info = {**scores.info, "heads": scores.graph.heads, **circuit.info}
    run, measured = dict(settings(info)), getattr(curve, "info", {})
    title = title or _title(run)
    other = None if against is None else other_of(scores, circuit, against)
    page = rendered(
        "report.html",
        title,
        page_data(scores, circuit, curve, other, data, title, tokenizer),
        subtitle=_subtitle(run),
        headline=_headline(circuit, curve),
        picture=Markup(to_svg(draw_circuit(circuit))),
        chart=Markup(to_svg(draw_curve(curve))) if curve else None,
        sizes=curve_table(curve, circuit) if curve else None,
        meaning=_RANK if info.get("method") in _RANKED else _FALL,
        crossed=_crossed(comparison, circuit, other and other[0], info),
        card=[card_table(card), card_line(card), cost_table(card)] if card else None,
        edges=edge_table(scores, circuit, N_EDGES),
        by_span=scores.graph.spans is not None,
        prompts=_prompts(data, tokenizer, N_PROMPTS),
        pairs=_pairs(data, curve, circuit, tokenizer),
        settings=run,
        measured=dict(settings(measured)),
        measured_with=dict(versions(measured)),
        versions=dict(versions(info)),
        code=_code(circuit, files or {"scores": "scores.safetensors", "circuit": "circuit.json"}),
    )
    write_whole(path, lambda file: file.write_text(page, "utf-8", "backslashreplace"))


_FALL = "how much the metric is expected to fall when the edge is ablated"
_RANK = "its rank among all edges in a ranking that was learned: 1 is the strongest"
_RANKED = ("learned", "pruned")


def _title(run: Mapping[str, str]) -> str:
    parts = [run.get("model"), run.get("task") or run.get("data")]
    return "Circuit of " + " on ".join(part for part in parts if part) if any(parts) else "Circuit"


def _subtitle(run: Mapping[str, str]) -> str:
    parts = [run.get("method"), f"metric {run['metric']}" if "metric" in run else None]
    parts.append(f"{run['prompt pairs']} prompt pairs" if "prompt pairs" in run else None)
    return " · ".join(part for part in parts if part)


def _crossed(
    comparison: Comparison | None, circuit: Circuit, other: Circuit | None, info: Mapping[str, Any]
) -> Table | None:
    """How faithful both circuits are on the prompts of either."""
    if comparison is None:
        return None
    if other is None or comparison.edges != edge_overlap(circuit, other):
        found = f"one of circuits of {comparison.edges.n_first} and {comparison.edges.n_second} edges"
        raise expected("comparison", "what `compare` finds of `circuit` and `against`", found)
    return cross_table(comparison, *names(info, other.info))


def _headline(circuit: Circuit, curve: CurveLike | None) -> list[tuple[str, str, str]]:
    """(value, name, explanation) of the numbers at the top of the page."""
    total = circuit.graph.n_edges
    share = f"{percent(circuit.n_edges / total)} of {count(total)}"
    found = [
        (count(circuit.n_edges), "edges in the circuit", share),
        (count(len(circuit.nodes)), "nodes", f"of {count(circuit.graph.n_senders)}"),
    ]
    if curve is None:
        return found
    index = curve_index(curve, circuit)
    if index is not None:
        faithfulness = number(curve.faithfulness[index])
        found.insert(0, (faithfulness, "faithfulness", "1 is the whole model, 0 all edges ablated"))
    drawn = drawn_baselines(curve).items()
    cpr, cmd = ("".join(f" ({name} {number(getattr(x, area))})" for name, x in drawn) for area in ("cpr", "cmd"))
    return [
        *found,
        (number(curve.cpr), "CPR", "area under faithfulness; more is better" + cpr),
        (number(curve.cmd), "CMD", "area between it and 1; less is better" + cmd),
        (f"{number(curve.clean, 2)} / {number(curve.corrupted, 2)}", "mean metric", "whole model / all edges ablated"),
    ]


def _code(circuit: Circuit, files: Mapping[str, str]) -> str:
    """Python code that reads the scores, and reads the circuit or selects it again in the same way."""
    lines = ["import eap_circuits as eap", "", f"scores = eap.EdgeScores.load({files['scores']!r})"]
    chosen = circuit.info.get("selection")
    if "circuit" in files:
        lines.append(f"circuit = eap.Circuit.load({files['circuit']!r})")
    elif isinstance(chosen, Mapping) and "among" not in chosen:
        given = {key: value for key, value in chosen.items() if key != "gap" and value not in (None, False)}
        options = ", ".join(f"{key}={value!r}" for key, value in given.items())
        lines.append(f"circuit = scores.select({options})")
    return "\n".join(lines)


def _prompts(data: PairedDataset | None, tokenizer: Any, n: int) -> list[dict[str, str]]:
    """The first n prompt pairs: texts and answers."""
    if data is None or data.prompts is None:
        return []
    pairs = data[:n].to_dict()
    return [
        {
            "clean": clean,
            "corrupted": corrupted,
            "answers": f"{_spelled(good, tokenizer)} rather than {_spelled(bad, tokenizer)}",
        }
        for clean, corrupted, good, bad in zip(*(pairs[x] for x in ("clean", "corrupted", "good", "bad")), strict=True)
    ]


def _pairs(data: PairedDataset | None, curve: CurveLike | None, circuit: Circuit, tokenizer: Any) -> Table | None:
    """What the circuit keeps of each prompt pair, if it was measured on these."""
    index = None if curve is None else curve_index(curve, circuit)
    results = getattr(curve, "results", None)
    if data is None or index is None or not results or not same_prompts(getattr(curve, "info", {}), data):
        return None
    return pairs_table(results[index], _prompts(data, tokenizer, N_PAIRS))


def _spelled(answer: Any, tokenizer: Any) -> str:
    """One answer, or several: the tokens' texts or, without a tokenizer, their ids."""
    tokens = answer if isinstance(answer, list) else [answer]
    return ", ".join(str(t) if tokenizer is None or isinstance(t, str) else repr(tokenizer.decode(t)) for t in tokens)
