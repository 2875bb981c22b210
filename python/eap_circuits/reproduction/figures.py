"""The figures of the comparison, drawn only from its results; matplotlib's global state stays unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..methods import QUADRATURES
from ..report.curves import saved_curve
from ..report.figures import finish
from ..report.figures.style import FAINT, INK, LETTERS, MUTED, NEGATIVE, PAPER, POSITIVE, RC
from ..report.tables import number
from .experiment import GRADIENTS, LEFT_OUT, METHODS, STRONGEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

NAMES = {"eap": "EAP", "eap-ig-inputs": "EAP-IG", "exact": "exact patching"}
COLOURS = {"eap": NEGATIVE, "eap-ig-inputs": POSITIVE, "exact": INK}
_GRIDS = dict(zip(QUADRATURES, (POSITIVE, NEGATIVE, *LETTERS.values()), strict=False))
_COLUMNS = 3
_DARKEST = 1.4  # faithfulness may exceed 1; shares may not
_DARK = 0.95  # from here on light text is read more easily
# The paper's Pearson correlations of EAP and of EAP-IG with exact patching, on GPT-2 (arXiv 2403.17806, §4).
PAPER_PEARSON = {
    "ioi": (0.78, 0.95),
    "greater-than": (0.71, 0.97),
    "gender-bias": (0.84, 0.98),
    "subject-verb-agreement": (0.44, 0.88),
    "capital-country": (0.70, 0.96),
    "hypernymy": (0.34, 0.97),
}


def draw_faithfulness(results: Mapping[str, Any]) -> Figure:
    """(a) Faithfulness against edges kept, a panel for each task."""

    def panel(ax: Axes, name: str) -> None:
        curves = {method: saved_curve(results["tasks"][name]["curves"][method]) for method in METHODS}
        for level in (0.0, 1.0):
            ax.axhline(level, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        random = curves["eap-ig-inputs"].baselines["random"]
        ax.plot(
            curves["eap-ig-inputs"].n_edges,
            random.faithfulness,
            color=MUTED,
            linewidth=1.3,
            linestyle=(0, (1, 1.2)),
            label="random circuits",
        )
        for method, curve in curves.items():
            ax.plot(
                curve.n_edges,
                curve.faithfulness,
                color=COLOURS[method],
                linewidth=1.5,
                marker="o",
                markersize=3.5,
                markerfacecolor=PAPER,
                label=NAMES[method],
                zorder=3,
            )
        ax.set_xscale("symlog", linthresh=10)
        plain_numbers(ax.xaxis)
        # One circuit far out of the range must not hide the others.
        shown = [f for curve in curves.values() for f in curve.faithfulness if math.isfinite(f)]
        ax.set_ylim(max(min([*shown, 0.0]) - 0.1, -1.0), min(max([*shown, 1.0]) + 0.1, 2.0))

    return panels(list(results["tasks"]), panel, "edges kept", "faithfulness")


def draw_agreement(results: Mapping[str, Any]) -> Figure:
    """(b) Correlation of EAP's and EAP-IG's scores with exact ones, and the share of the strongest edges found."""
    names = list(results["tasks"])[::-1]
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(10.4, 0.9 + 0.36 * len(names)), layout="constrained")
        measures = (
            ("agreement", "pearson", "Pearson"),
            ("rest", "pearson", f"Pearson, all but {LEFT_OUT} edges"),
            ("agreement", "spearman", "Spearman (ranks)"),
            ("strongest", "found", f"strongest {100 / STRONGEST:g} % found"),
        )
        for index, (what, kind, title) in enumerate(measures):
            ax = figure.add_subplot(1, 4, index + 1)
            for row, name in enumerate(names):
                found = [results["tasks"][name][what][method][kind] for method in GRADIENTS]
                ax.plot(found, [row, row], color=FAINT, linewidth=2.5, zorder=1)
                for method, value in zip(GRADIENTS, found, strict=True):
                    label = NAMES[method] if row == 0 else None
                    ax.plot(value, row, "o", color=COLOURS[method], markersize=6, label=label, zorder=3)
                if index == 0 and name in PAPER_PEARSON:
                    for method, value in zip(GRADIENTS, PAPER_PEARSON[name], strict=True):
                        label = f"{NAMES[method]}, GPT-2 in the paper" if row == len(names) - 1 else None
                        mark: dict[str, Any] = {"color": COLOURS[method], "markersize": 6, "markeredgewidth": 1.6}
                        ax.plot(value, row - 0.28, "|", label=label, **mark)
            ax.set_yticks(range(len(names)), names if index == 0 else [""] * len(names))
            ax.set_ylim(-0.6, len(names) - 0.5)
            ax.set_xlim(right=1.02)
            finish(ax, "x")
            ax.tick_params(which="both", labelsize=8)
            ax.set_xlabel(title, color=INK)
            if index == 0:
                handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8, labelcolor=INK)
        return figure


def draw_quadrature(results: Mapping[str, Any]) -> Figure:
    """(c) Relative error of EAP-IG's scores against the number of steps, for each quadrature."""

    def panel(ax: Axes, name: str) -> None:
        for quadrature, points in results["tasks"][name]["quadrature"].items():
            steps = sorted(points, key=int)
            ax.plot(
                [int(m) for m in steps],
                [points[m]["error"] for m in steps],
                "o-",
                color=_GRIDS[quadrature],
                markersize=3,
                linewidth=1.2,
                label=quadrature,
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        ax.xaxis.set_minor_formatter(NullFormatter())

    return panels(list(results["tasks"]), panel, "steps M", "relative error")


def draw_cross(results: Mapping[str, Any]) -> Figure:
    """(d) What the tasks' circuits share, and the faithfulness of each on the others' prompts."""
    names = list(results["cross"])
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(4.2 + 0.95 * len(names), 1.9 + 0.42 * len(names)), layout="constrained")
        titles = {"edges": "edges shared", "nodes": "nodes shared", "faithfulness": "faithfulness"}
        for index, (kind, title) in enumerate(titles.items()):
            ax = figure.add_subplot(1, 3, index + 1)
            values = [[results["cross"][row][column][kind] for column in names] for row in names]
            # A number that could not be measured stays blank.
            grid = [[math.nan if value is None else value for value in row] for row in values]
            ax.imshow(grid, cmap="Blues", vmin=0, vmax=_DARKEST)
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    if value is not None:
                        colour = PAPER if value > _DARK else INK
                        ax.text(j, i, number(value, 2), ha="center", va="center", color=colour, fontsize=7)
            ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
            ax.set_yticks(range(len(names)), names if index == 0 else [""] * len(names))
            ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=7.5, length=0)
            ax.set_title(title, color=INK, fontsize=9)
            for spine in ax.spines.values():
                spine.set_visible(False)
            if index == 0:
                ax.set_ylabel("prompts of", color=INK)
            ax.set_xlabel("circuit of", color=INK)
        return figure


def panels(names: Sequence[str], panel: Callable[[Axes, str], None], x: str, y: str) -> Figure:
    columns = min(len(names), _COLUMNS)
    rows = -(-len(names) // columns)
    with matplotlib.rc_context(RC):
        figure = Figure(figsize=(max(2.9 * columns, 4.6), 2.1 * rows + 0.5), layout="constrained")
        for index, name in enumerate(names):
            ax = figure.add_subplot(rows, columns, index + 1)
            panel(ax, name)
            finish(ax, "y")
            ax.tick_params(which="both", labelsize=8)
            ax.set_title(name, color=INK, fontsize=9)
            if index + columns >= len(names):
                ax.set_xlabel(x, color=INK)
            if index % columns == 0:
                ax.set_ylabel(y, color=INK)
        handles, labels = ax.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8, labelcolor=INK)
        return figure


def plain_numbers(axis: Axis) -> None:
    """Label the ticks of a logarithmic axis by numbers, not by powers of ten."""
    axis.set_major_formatter(FuncFormatter(_thousands))
    axis.set_minor_formatter(NullFormatter())


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
