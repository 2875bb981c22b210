"""The page of the comparison: what was found, in tables and figures, written only from its results."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..report.curves import saved_curve, smallest_faithful
from ..report.table import NONE, count, number
from .experiment import GRADIENTS, HOW, LEFT_OUT, METHODS, SHOWN, STRONGEST
from .figures import NAMES, PAPER_PEARSON, draw_agreement, draw_cross, draw_faithfulness, draw_quadrature

PAGE = "reproduction.md"
FIGURES = {
    "faithfulness": draw_faithfulness,
    "agreement": draw_agreement,
    "quadrature": draw_quadrature,
    "cross": draw_cross,
}
_VERDICTS = {
    ("agreement", "pearson"): "By Pearson's correlation",
    ("rest", "pearson"): f"By Pearson's correlation without each task's {LEFT_OUT} strongest edges",
    ("agreement", "spearman"): "By Spearman's correlation",
    ("strongest", "found"): f"By the share of the strongest {100 / STRONGEST:g} % of edges that it finds",
}
FORMATS: dict[str, dict[str, Any]] = {".png": {"dpi": 110}, ".pdf": {"metadata": {"CreationDate": None}}}
Row = tuple[Any, ...]


def write_page(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the page, its figures (.png and .pdf) and its tables (.csv).

    Args:
        results: what `reproduce` returned.
        folder: gets `reproduction.md`; its folder `reproduction` gets the rest.

    Returns:
        The files written.
    """
    beside = folder / "reproduction"
    beside.mkdir(exist_ok=True)
    files = []
    for name, draw in FIGURES.items():
        if name == "cross" and len(results["tasks"]) < 2:
            continue
        figure = draw(results)
        for suffix, settings in FORMATS.items():
            save = partial(figure.savefig, facecolor="white", **settings)
            files.append(write_whole(beside / f"{name}{suffix}", save))
    for name, rows in _tables(results).items():
        files.append(write_whole(beside / f"{name}.csv", partial(_write_csv, rows=rows)))
    text = page(results)
    files.append(write_whole(folder / PAGE, lambda file: file.write_text(text, encoding="utf-8")))
    return files


def page(results: Mapping[str, Any]) -> str:
    """The page's Markdown."""
    request, where = results["request"], results["environment"]
    settings, tables = request["settings"], _tables(results)
    several = len(results["tasks"]) > 1
    model = request["model"]["name"]
    parts = [
        f"# EAP, EAP-IG and exact patching on {model}",
        "Written by `eap reproduce` from `reproduction/results.json`: the comparison of Hanna et al. 2024 "
        "([arXiv 2403.17806](https://arxiv.org/abs/2403.17806)), whose own numbers are for GPT-2 small.",
        _settings(results),
        f"## Agreement with exact patching\n\n{_verdict(results)}",
        "![Correlation with exact scores](reproduction/agreement.png)",
        markdown(tables["agreement"]),
        "The correlations are over all edges: Pearson's of the scores, Spearman's of their ranks. "
        "The two columns at the right are the paper's, for GPT-2 small and its own prompts.",
        "Pearson's correlation gives most weight to the few edges of greatest effect. Patching an edge of little "
        "effect is a small step away from the clean prompt; to first order its effect is the gradient there, which is "
        "what EAP takes. EAP-IG takes a mean over points further away. "
        f"These are the {SHOWN} strongest edges of each task by exact patching:",
        markdown(tables["edges"]),
        f'"Others\' Pearson" leaves out the {LEFT_OUT} strongest edges by exact patching. "Found" is the share of the '
        f"strongest {100 / STRONGEST:g} % by exact patching that are also among the strongest {100 / STRONGEST:g} % "
        "by EAP or EAP-IG.",
        markdown(tables["strongest"]),
        "## Faithfulness by circuit size\n\n"
        f"Circuits are grown from the logits by absolute score ({HOW} selection) and run on pairs that were not used "
        "to score them; every other edge carries the corrupted prompt's value. They are compared with "
        f"{settings['draws']} random connected circuits of each size.",
        "![Faithfulness against edges kept](reproduction/faithfulness.png)",
        markdown(tables["areas"]),
        f'"Edges" is the size of the smallest circuit of a curve with a faithfulness of {settings["faithful"]} or '
        "more. CPR is the area under faithfulness over the share of edges kept (more is better), CMD the area between "
        "it and 1 (less is better), as the MIB benchmark defines them ([arXiv 2504.13151](https://arxiv.org/abs/2504.13151)).",
        "## Steps of integration\n\nThe table shows the distance of the scores from those of "
        f"{settings['reference']} Gauss–Legendre steps, relative to the norm of these.",
        "![Relative error against steps](reproduction/quadrature.png)",
        markdown(_errors(results)),
        "Distances are geometric means over the tasks; brackets hold the mean Pearson correlation of these scores with "
        'exact ones. One step of the "right" grid is EAP.',
    ]
    if several:
        parts += [
            "## Overlap and cross-task faithfulness\n\n"
            "The circuit of a task is the smallest one of its EAP-IG curve with a faithfulness of "
            f"{settings['faithful']} or more, or else the largest one that is not the whole model. "
            f"{_cross_verdict(results)}",
            "![Overlap and cross-task faithfulness](reproduction/cross.png)",
            markdown(tables["circuits"]),
        ]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    begun = f" Begun on {where['date']}." if "date" in where else ""  # which older results do not say
    parts.append(f"Machine: {where['machine']}. {versions}.{begun}")
    return "\n\n".join(parts) + "\n"


def _settings(results: Mapping[str, Any]) -> str:
    settings, tasks = results["request"]["settings"], results["tasks"]
    scored = _span(entry["facts"]["scored"] for entry in tasks.values())
    held_out = _span(entry["facts"]["held_out"] for entry in tasks.values())
    return (
        f"Every method scores edges on the same {scored} prompt pairs of a task; circuits run on {held_out} other "
        f"pairs. EAP-IG takes {settings['steps']} steps; the seed is {settings['seed']}."
    )


def _verdict(results: Mapping[str, Any]) -> str:
    tasks = results["tasks"]
    sentences: list[str] = []
    for (where, kind), what in _VERDICTS.items():
        better = [t for t, e in tasks.items() if _higher(e[where], kind)]
        worse = [name for name in tasks if name not in better]
        claim = "it does so" if sentences else "EAP-IG agrees better with exact patching than EAP"
        start = f"{what}, {claim} on {len(better)} of {len(tasks)} tasks"
        sentences.append(start + (f" (not on {', '.join(worse)})." if worse and better else "."))
    return " ".join(sentences)


def _higher(agreement: Mapping[str, Mapping[str, float | None]], kind: str) -> bool:
    eap, ig = (agreement[method][kind] for method in GRADIENTS)
    return eap is not None and ig is not None and ig > eap


def _cross_verdict(results: Mapping[str, Any]) -> str:
    cross = results["cross"]
    pairs = [cross[a][b] for a in cross for b in cross if a != b and cross[a][b]["faithfulness"] is not None]
    faithfulness = [pair["faithfulness"] for pair in pairs]
    found = {kind: _correlation([pair[kind] for pair in pairs], faithfulness) for kind in ("edges", "nodes")}
    return (
        f"Over the {len(pairs)} ordered pairs of different tasks, the faithfulness of one task's circuit on the "
        f"other's prompts has a correlation of {number(found['edges'], 2)} with the share of edges that the two "
        f"circuits have in common (intersection over union), and of {number(found['nodes'], 2)} with the share of "
        "nodes."
    )


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    try:
        return statistics.correlation(a, b)
    except statistics.StatisticsError:  # fewer than two pairs, or constant values
        return math.nan


def _errors(results: Mapping[str, Any]) -> list[Row]:
    """The error of each quadrature for each number of steps, over all tasks."""
    entries = [entry["quadrature"] for entry in results["tasks"].values()]
    steps = sorted(next(iter(entries[0].values())), key=int)
    rows: list[Row] = [("quadrature", *(f"M = {m}" for m in steps))]
    for quadrature in entries[0]:
        cells = []
        for m in steps:
            points = [entry[quadrature][m] for entry in entries]
            error = math.exp(statistics.fmean(math.log(max(point["error"], 1e-12)) for point in points))
            agreement = statistics.fmean(point["pearson"] for point in points)
            cells.append(f"{cell(error)} ({number(agreement, 2)})")
        rows.append((quadrature, *cells))
    return rows


def _tables(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Each table as rows of plain values, headings first."""
    tasks, faithful = results["tasks"], results["request"]["settings"]["faithful"]
    correlations = tuple(f"{NAMES[m]} {kind}" for kind in ("Pearson", "Spearman") for m in GRADIENTS)
    published = tuple(f"{NAMES[m]} Pearson, paper" for m in GRADIENTS)
    agreement: list[Row] = [("task", "metric", "clean", "corrupted", *correlations, *published)]
    edges: list[Row] = [("task", "edge", *(NAMES[m] for m in METHODS[::-1]))]
    parts = {"others' Pearson": ("rest", "pearson"), "found": ("strongest", "found")}
    parts["Spearman among the strongest"] = "strongest", "spearman"
    strongest: list[Row] = [("task", *(f"{NAMES[m]}: {part}" for part in parts for m in GRADIENTS))]
    areas: list[Row] = [
        (
            "task",
            *(f"{NAMES[m]} {area}" for area in ("edges", "CPR", "CMD") for m in METHODS),
            "random CPR",
            "random CMD",
        )
    ]
    quadrature: list[Row] = [("task", "quadrature", "steps", "relative error", "Pearson with exact")]
    curves: list[Row] = [("task", "circuits of", "share of edges", "edges", "faithfulness")]
    circuits: list[Row] = [("task", "edges of its circuit", "nodes", "faithfulness on its own prompts")]
    cross: list[Row] = [("prompts of", "circuit of", "faithfulness", "edge overlap (IoU)", "node overlap (IoU)")]
    for task, entry in tasks.items():
        first = entry["curves"]["exact"]
        found = [entry["agreement"][method][kind] for kind in ("pearson", "spearman") for method in GRADIENTS]
        said = PAPER_PEARSON.get(task, (None, None))
        agreement.append((task, entry["facts"]["metric"], first["clean"], first["corrupted"], *found, *said))
        strongest.append((task, *(entry[where][m][what] for where, what in parts.values() for m in GRADIENTS)))
        edges += [
            (task, f"{edge['sender']} → {edge['receiver']}", *(edge[m] for m in METHODS[::-1]))
            for edge in entry["edges"]
        ]
        random = entry["curves"]["eap-ig-inputs"]["baselines"]["random"]
        own = [entry["curves"][method][area] for area in ("cpr", "cmd") for method in METHODS]
        sizes = [_faithful_size(entry["curves"][method], faithful) for method in METHODS]
        areas.append((task, *sizes, *own, random["cpr"], random["cmd"]))
        for name, points in entry["quadrature"].items():
            quadrature += [(task, name, int(m), points[m]["error"], points[m]["pearson"]) for m in points]
        for name, curve in {**entry["curves"], "random": None}.items():
            values = random["faithfulness"] if curve is None else curve["faithfulness"]
            sizes = entry["curves"]["eap-ig-inputs"] if curve is None else curve
            curves += [(task, name, *row) for row in zip(sizes["fractions"], sizes["n_edges"], values, strict=True)]
        own_prompts = results["cross"][task][task]["faithfulness"]
        circuits.append((task, entry["circuit"]["n_edges"], entry["circuit"]["n_nodes"], own_prompts))
        cross += [(task, o, f["faithfulness"], f["edges"], f["nodes"]) for o, f in results["cross"][task].items()]
    return {
        "agreement": agreement,
        "strongest": strongest,
        "edges": edges,
        "areas": areas,
        "quadrature": quadrature,
        "curves": curves,
        "circuits": circuits,
        "cross": cross,
    }


def _faithful_size(curve: Any, at_least: float) -> int:
    found = saved_curve(curve)
    return found.n_edges[smallest_faithful(found, at_least)]


def markdown(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NONE
    if isinstance(value, float):
        return number(value, 3) if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
    return count(value) if isinstance(value, int) else str(value).replace("|", r"\|")


def _span(values: Iterable[int]) -> str:
    low, *_, high = sorted([*values] * 2)
    return str(low) if low == high else f"{low} to {high}"


def _write_csv(file: Path, rows: Sequence[Row]) -> None:
    with file.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out, lineterminator="\n").writerows(rows)
