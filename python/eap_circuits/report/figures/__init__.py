"""Figures of faithfulness by circuit size and of a circuit; matplotlib's global state stays unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ...edges import layer_name
from ...evaluation import Comparison
from ...graph import Circuit, Graph
from ..curves import BaselineLike, CurveLike
from ..tables import BASELINE_NAMES, count, drawn_baselines, number
from .placement import HEIGHT, WIDTH, Line, Placement, place
from .style import FAINT, INK, LETTERS, MUTED, NEGATIVE, NODE, PAPER, POSITIVE, RC
from .svg import to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

_UNIT = (0.66, 0.46)  # inches of one column and one layer
_DIVERGING = LinearSegmentedColormap.from_list("scores", [NEGATIVE, PAPER, POSITIVE])


class _Picture(Figure):
    """A figure that a notebook shows, whatever backend matplotlib has."""

    def _repr_html_(self) -> str:
        return to_svg(self)


def draw_curve(curve: CurveLike, ax: Axes | None = None) -> Figure:
    """Faithfulness against the number of edges kept; 1 is the whole model, 0 the model with all edges ablated.

    The curve's baselines are drawn at the size of the circuit that they are compared with: the mean of the draws, and
    the band between the least and the greatest.

    Args:
        curve: what `faithfulness_curve` or `load_curve` returned.
        ax: axes to draw in; by default those of a new figure.
    """
    with matplotlib.rc_context(RC):
        if ax is None:
            figure = _Picture(figsize=(6.8, 4.0), layout="constrained", label="faithfulness by circuit size")
            ax = figure.add_subplot()
        order = sorted(range(len(curve.n_edges)), key=lambda i: curve.n_edges[i])
        sizes = [curve.n_edges[i] for i in order]
        if min(sizes) > 0:
            ax.set_xscale("log")
        else:
            ax.set_xscale("symlog", linthresh=1)
        for level, name in ((1.0, "whole model"), (0.0, "all ablated")):
            ax.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
            ax.annotate(
                name,
                (1, level),
                (4, 0),
                va="center",
                xycoords=ax.get_yaxis_transform(),
                textcoords="offset points",
                color=MUTED,
                fontsize=8,
            )
        drawn = drawn_baselines(curve)
        for name, baseline in curve.baselines.items():
            _draw_baseline(ax, name, baseline, name in drawn, sizes, order)
        ax.plot(
            sizes,
            [curve.faithfulness[i] for i in order],
            color=POSITIVE,
            linewidth=1.8,
            marker="o",
            markersize=5,
            markerfacecolor=PAPER,
            markeredgewidth=1.5,
            zorder=3,
            gid="curve",
            label="circuit",
        )
        if curve.baselines:
            handles, labels = ax.get_legend_handles_labels()
            ax.legend(
                handles[::-1],
                labels[::-1],
                loc="lower left",
                bbox_to_anchor=(0, 1),
                ncols=len(handles),
                frameon=False,
                fontsize=8,
                labelcolor=INK,
                borderaxespad=0.2,
            )
        ax.margins(x=0.06, y=0.1)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(round(value))))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xlabel(_curve_caption(curve), color=INK, linespacing=1.7)
        ax.set_ylabel("faithfulness", color=INK)
        finish(ax, "y")
        found = ax.get_figure(root=True)
        assert isinstance(found, Figure)
        return found


def finish(ax: Axes, grid: Literal["x", "y"]) -> None:
    """Style the ticks, spines and grid lines of axes that show a measurement."""
    ax.tick_params(which="both", colors=MUTED, labelcolor=INK)
    ax.grid(axis=grid, color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_facecolor("none")
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def _draw_baseline(
    ax: Axes, name: str, baseline: BaselineLike, drawn: bool, sizes: list[int], order: list[int]
) -> None:
    """Draw the mean of the draws, and the band that they span."""
    colour, dashes = (MUTED, (0, (1, 1.2))) if drawn else (NEGATIVE, (0, (5, 2)))
    mean = [baseline.faithfulness[i] for i in order]
    if len(baseline.draws) > 1:
        columns = [[row[i] for row in baseline.draws] for i in order]
        ax.fill_between(
            sizes, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.18, linewidth=0, zorder=1
        )
    ax.plot(
        sizes, mean, color=colour, linewidth=1.4, linestyle=dashes, zorder=2, gid=name, label=BASELINE_NAMES.get(name)
    )


def _curve_caption(curve: CurveLike) -> str:
    return f"edges kept\nCPR {number(curve.cpr)} · CMD {number(curve.cmd)}"


def draw_circuit(circuit: Circuit, max_edges: int = 300) -> Figure:
    """A picture of a circuit: `input` below, `logits` above, heads by index, MLPs at the right side.

    Blue edges raise the metric and orange ones lower it; width and opacity grow with the absolute score. The colour of
    an edge's tip tells which input of a head it enters: query, key or value. Layers and head indices without a node are
    left out, and so are heads that share a key or value with others but send nothing themselves.

    Args:
        circuit: the circuit to draw; without scores all edges look alike.
        max_edges: if the circuit has more, only the strongest are drawn, and the caption says so.

    Of a circuit by span the edges are drawn that are kept at any span.
    """
    circuit = circuit if circuit.graph.spans is None else circuit.across_spans()
    with matplotlib.rc_context(RC):
        placement = place(circuit, max_edges)
        left, right, bottom, top = -1.0, placement.right + 0.15, -1.3, placement.height + 0.45
        size = ((right - left) * _UNIT[0], (top - bottom) * _UNIT[1])
        # No narrower than the legend with all that it may hold.
        figure = _Picture(figsize=(max(size[0], 7.8), max(size[1], 2.6)), label="the circuit")
        ax = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        ax.set_axis_off()
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)
        _draw_bars(ax, placement)
        _draw_lines(ax, placement.lines)
        _draw_nodes(ax, placement)
        _draw_legend(ax, placement)
        ax.annotate(
            _circuit_caption(circuit, placement),
            (placement.width / 2, 0),
            (0, 8),
            xycoords=ax.get_xaxis_transform(),
            textcoords="offset points",
            ha="center",
            color=MUTED,
            fontsize=8,
        )
        return figure


def draw_heatmap(graph: Graph, values: Tensor) -> Figure:
    """Scores of nodes, by layer and head, with the MLPs at the right; blue raises the metric, orange lowers it.

    Args:
        graph: the graph whose nodes these are.
        values: [S], in the order of `graph.senders`; that of `input` is said above. Spans are added up.
    """
    graph, values = graph.base, values.unflatten(0, (-1, graph.n_spans)).sum(1)
    with matplotlib.rc_context(RC):
        columns = max(graph.n_heads)
        # An empty column sets the MLPs apart.
        grid = [[float("nan")] * (columns + 2) for _ in graph.n_heads]
        for layer, row in enumerate(grid):
            heads = values[graph.head_senders(layer)].tolist()
            row[: len(heads)] = heads
            row[-1] = float(values[graph.mlp_sender(layer)]) if graph.has_mlp(layer) else row[-1]
        largest = max((abs(x) for row in grid for x in row if x == x), default=0.0) or 1.0
        size = (1.9 + 0.28 * (columns + 2), 1.1 + 0.2 * len(grid))
        figure = _Picture(figsize=(max(size[0], 4.0), max(size[1], 2.0)), layout="constrained", label="nodes' scores")
        ax = figure.add_subplot()
        image = ax.imshow(grid, _DIVERGING, vmin=-largest, vmax=largest, origin="lower", aspect="auto")
        ax.set_xticks([*range(columns), columns + 1], [*map(str, range(columns)), "MLP"])
        ax.set_xlabel("head", color=INK)
        ax.set_ylabel("layer", color=INK)
        if graph.encoder or graph.per_layer or graph.beside:
            ax.set_yticks(range(len(grid)), [layer_name(graph, i).removeprefix("layer ") for i in range(len(grid))])
        else:
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        inputs = (f"{graph.senders[u]}: {float(values[u]):+.4g}" for u in graph.input_senders)
        ax.set_title(", ".join(inputs), loc="left", color=MUTED, fontsize=8)
        ax.tick_params(colors=MUTED, labelcolor=INK, length=0)
        ax.set_facecolor("none")
        ax.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=ax, label="score", fraction=0.05)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=MUTED, labelcolor=INK)
        return figure


def draw_comparison(comparison: Comparison) -> Figure:
    """What two circuits share, and the faithfulness of each on both tasks, with its intervals of resampled pairs.

    Args:
        comparison: what `eap.compare` returned.
    """
    parts = (("first circuit", POSITIVE), ("both", MUTED), ("second circuit", NEGATIVE))
    with matplotlib.rc_context(RC):
        figure = _Picture(figsize=(7.2, 2.6), layout="constrained", label="two circuits compared")
        shared, faithful = figure.subplots(1, 2, width_ratios=(1, 1.2))
        for y, overlap in enumerate((comparison.nodes, comparison.edges)):
            both, left = overlap.n_shared, 0
            for (_, colour), n in zip(parts, (overlap.n_first - both, both, overlap.n_second - both), strict=True):
                total = max(overlap.n_first + overlap.n_second - both, 1)
                shared.barh(y, n / total, 0.55, left / total, color=colour)
                if n > 0.08 * total:
                    middle = (left + n / 2) / total
                    shared.text(middle, y, count(n), ha="center", va="center_baseline", color=PAPER, fontsize=8)
                left += n
        shared.set_yticks((0, 1), ("nodes", "edges"))
        shared.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        shared.set_xlabel("of those in either circuit", color=INK)
        finish(shared, "x")
        for offset, (_, colour), row in zip((-0.2, 0.2), parts[::2], comparison.results, strict=True):
            for task, result in enumerate(row):
                faithful.bar(task + offset, result.faithfulness, 0.36, color=colour)
                faithful.plot([task + offset] * 2, result.interval, color=INK, linewidth=1.4)
        faithful.axhline(1, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        faithful.axhline(0, color=MUTED, linewidth=0.9, zorder=1)
        faithful.set_xticks((0, 1), ("on the first task", "on the second task"))
        faithful.set_ylabel("faithfulness", color=INK)
        finish(faithful, "y")
        handles = [Patch(color=colour, label=name) for name, colour in parts]
        figure.legend(handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=8, labelcolor=INK)
        return figure


def _circuit_caption(circuit: Circuit, placement: Placement) -> str:
    size = f"{count(circuit.n_edges)} of {count(circuit.graph.n_edges)} edges."
    if len(placement.lines) < circuit.n_edges:
        size += f" The {count(len(placement.lines))} strongest edges and their nodes are drawn."
    return size


def _box(ax: Axes, x: float, y: float, width: float, height: float, **style: Any) -> None:
    shape = "round,pad=0,rounding_size=0.1"
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle=shape, linewidth=0.8, **style))


def _draw_bars(ax: Axes, placement: Placement) -> None:
    middle = placement.width / 2
    bottom, top = placement.bars
    for y, name in ((bottom - 0.15, "input"), (top + 0.15, "logits")):
        _box(ax, middle, y, placement.width, 0.3, facecolor=NODE, edgecolor=MUTED, zorder=6)
        ax.text(middle, y, name, ha="center", va="center_baseline", color=INK, fontsize=8, zorder=7)
    for title, y in placement.layers:
        ax.text(-0.2, y, title, ha="right", va="center_baseline", color=MUTED, fontsize=7)
        ax.plot([-0.12, placement.width], [y, y], color=FAINT, linewidth=0.5, zorder=0)


def _draw_lines(ax: Axes, lines: list[Line]) -> None:
    largest = max((abs(line.score) for line in lines if line.score is not None), default=0.0)
    for order, line in enumerate(lines):
        size = 0.4 if line.score is None or not largest else (abs(line.score) / largest) ** 0.5
        colour = MUTED if line.score is None else POSITIVE if line.score >= 0 else NEGATIVE
        codes = [Path.MOVETO] + [Path.CURVE4] * (len(line.points) - 1)
        name = f"{line.sender} → {line.receiver}" + ("" if line.score is None else f"  {line.score:+.4g}")
        ax.add_patch(
            PathPatch(
                Path(list(line.points), codes),
                facecolor="none",
                edgecolor=colour,
                linewidth=0.5 + 2.1 * size,
                alpha=0.3 + 0.65 * size,
                capstyle="round",
                zorder=2 + order / max(len(lines), 1),  # strongest on top
                gid=f"edge {name}",
            )
        )
    for letter in ("", *LETTERS):
        tips = {line.points[-1] for line in lines if line.letter == letter and line.receiver != "logits"}
        if tips:
            ax.plot(
                [x for x, _ in sorted(tips)],
                [y - 0.05 for _, y in sorted(tips)],
                linestyle="none",
                marker="^",
                markersize=4.5,
                color=LETTERS.get(letter, MUTED),
                markeredgecolor=PAPER,
                markeredgewidth=0.4,
                zorder=5,
            )


def _draw_nodes(ax: Axes, placement: Placement) -> None:
    for (x0, y0), (x1, _) in placement.groups:
        ax.plot([x0, x1], [y0 + 0.035] * 2, color=MUTED, linewidth=1.6, solid_capstyle="round", zorder=5)
    for box in placement.boxes:
        mlp = ".h" not in box.name
        _box(ax, box.x, box.y, WIDTH, HEIGHT, facecolor=NODE if mlp else PAPER, edgecolor=MUTED, zorder=6)
        ax.text(box.x, box.y, box.name, ha="center", va="center_baseline", color=INK, fontsize=7, zorder=7)


def _draw_legend(ax: Axes, placement: Placement) -> None:
    signs = {line.score >= 0 for line in placement.lines if line.score is not None}
    letters = {line.letter for line in placement.lines}
    handles = [
        Line2D([], [], color=colour, linewidth=2, label=label)
        for sign, colour, label in ((True, POSITIVE, "raises the metric"), (False, NEGATIVE, "lowers it"))
        if sign in signs
    ]
    names = {"q": "into query", "k": "into key", "v": "into value"}
    handles += [
        Line2D([], [], linestyle="none", marker="^", markersize=5, color=LETTERS[letter], label=names[letter])
        for letter in LETTERS
        if letter in letters
    ]
    if placement.groups:
        handles.append(Line2D([], [], color=MUTED, linewidth=1.6, label="heads sharing keys and values"))
    if handles:
        ax.legend(
            handles=handles,
            loc="center",
            bbox_to_anchor=(placement.width / 2, -0.62),
            bbox_transform=ax.transData,
            ncols=len(handles),
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            handlelength=1.3,
            handletextpad=0.5,
            columnspacing=1.2,
        )
