"""The leaderboard's page: tables and figures, written only from its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ..files import write_whole
from ..report.figures.style import INK, LETTERS, MUTED, NEGATIVE, PAPER, POSITIVE
from ..reproduction.figures import panels, plain_numbers
from ..reproduction.page import FORMATS, markdown
from .measure import FAITHFUL, IBCIRCUIT, LEARNED, PRUNED, PRUNED_LEARNED, START

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = "leaderboard.md"
_COLOURS = {"eap": NEGATIVE, START: POSITIVE, LEARNED: INK}
# Of EAP-IG's edges, what a ranking is hoped to need.
_SHARE = 0.2
Runs = Mapping[str, Mapping[str, Any]]  # seed -> ranking -> what was measured


def write_page(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write `leaderboard.md` and, in the folder `leaderboard`, its figures; returns the files written.

    Args:
        results: what `leaderboard` returned.
        folder: an existing folder.
    """
    beside = folder / "leaderboard"
    beside.mkdir(exist_ok=True)
    files = []
    for name, draw in {"faithfulness": draw_faithfulness, "cost": draw_cost}.items():
        figure = draw(results)
        for suffix, settings in FORMATS.items():
            save = partial(figure.savefig, facecolor="white", **settings)
            files.append(write_whole(beside / f"{name}{suffix}", save))
    text = page(results)
    files.append(write_whole(folder / PAGE, lambda file: file.write_text(text, encoding="utf-8")))
    return files


def page(results: Mapping[str, Any]) -> str:
    """The page's Markdown."""
    request, where = results["request"], results["environment"]
    settings = request["settings"]
    seeds = list(next(iter(results["tasks"].values())))
    over = f"means (least–most) over seeds {', '.join(seeds)}" if seeds[1:] else f"of seed {seeds[0]}"
    over += _fewer(results, seeds)
    more = settings.get("bisections")
    between = f" Between a curve's first such size and the one before, {more} more ran, by bisection in ratios."
    parts = [
        f"# Leaderboard on {request['model']['name']}, {settings['scored']} scored pairs",
        "Written by `eap leaderboard` from `leaderboard/leaderboard.json`. Every ranking sees the same "
        f"{settings['scored']} prompt pairs of a task; circuits are grown from the logits by absolute score and run on "
        f"{settings['pairs']} others, with the corrupted prompt's values outside. A seed is one of the pairs, and of "
        f"what learning draws. {_explained(_names(*results['tasks'].values()), settings['steps'])}".rstrip(),
        "\n".join(f"- {sentence}" for sentence in _verdicts(results)),
        "![Faithfulness against edges kept](leaderboard/faithfulness.png)",
        "![Cost against edges kept](leaderboard/cost.png)",
        markdown(_rows(results)),
        f"Beside `{START}`, in multiples of its edges, CMD and seconds. A ranking is less faithful at a size where its "
        "mean distance from faithfulness 1 is greater. Where it is greater by most is named, with the difference, and "
        f"in brackets the one between the most and the least faithful seed of `{START}` there.",
        markdown(_beside(results)),
        f'All numbers are {over}. "Edges" is the size of the smallest circuit that was run and is at least as '
        f"faithful; the whole model always is.{between if more else ''} CPR is the area under faithfulness over the "
        "share of edges kept (more is better), CMD the area between it and 1 (less is better), as MIB defines them "
        "([arXiv 2504.13151](https://arxiv.org/abs/2504.13151)). Cost is in seconds, and in the model's own forward "
        "passes over the same clean prompts; that of learning includes the scores it starts from.",
        f"Machine: {where['machine']}. {', '.join(f'{name} {version}' for name, version in where['versions'].items())}."
        + (f" Begun on {where['date']}." if "date" in where else ""),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rankings(results: Mapping[str, Any]) -> list[str]:
    """Those that every task has of some seed."""
    tasks = results["tasks"].values()
    return [name for name in _names(*tasks) if all(_having(runs, name) for runs in tasks)]


def _names(*tasks: Runs) -> list[str]:
    """The rankings that any of these tasks has."""
    return list(dict.fromkeys(name for runs in tasks for run in runs.values() for name in run))


def _having(runs: Runs, ranking: str) -> Runs:
    """The seeds that have this ranking."""
    return {seed: run for seed, run in runs.items() if ranking in run}


def _fewer(results: Mapping[str, Any], seeds: Sequence[str]) -> str:
    """Which rankings have not been measured with all seeds, or on all tasks."""
    tasks, found = results["tasks"].values(), []
    for ranking in _names(*tasks):
        measured = [list(runs) for runs in (_having(each, ranking) for each in tasks) if runs]
        least = min(measured, key=len)
        if len(least) < len(seeds) or len(measured) < len(tasks):
            where = f", on {len(measured)} of {len(tasks)} tasks" if len(measured) < len(tasks) else ""
            found.append(f"`{ranking}` of {', '.join(least)}{where}")
    return f" (except for {'; '.join(found)})" if found else ""


def edges_at(run: Mapping[str, Any], least: float) -> int:
    """The size of the smallest circuit that was run and is at least this faithful; that of the largest if none is."""
    curve = run["curve"]
    ran = [*zip(curve["n_edges"], curve["faithfulness"], strict=True), *run.get("between", ())]
    return min((n for n, f in ran if f is not None and f >= least), default=max(curve["n_edges"]))


def _of(runs: Runs, ranking: str, measure: Callable[[Mapping[str, Any]], float | None]) -> list[float]:
    """A number of each seed; those that could not be measured are left out."""
    return [x for x in (measure(seed[ranking]) for seed in _having(runs, ranking).values()) if x is not None]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")


_COLUMNS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "CPR": (".3f", lambda run: run["curve"]["cpr"]),
    "CMD": (".3f", lambda run: run["curve"]["cmd"]),
    **{f"edges at {f}": (",.0f", partial(lambda f, run: edges_at(run, f), f)) for f in FAITHFUL},
    "seconds": (",.1f", lambda run: run["seconds"]),
    "forwards": (",.0f", lambda run: run["forwards"]),
}


def _rows(results: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = [("task", "ranking", *_COLUMNS)]
    for task, runs in results["tasks"].items():
        for ranking in _names(runs):
            found = [(form, _of(runs, ranking, measure)) for form, measure in _COLUMNS.values()]
            rows.append((task, ranking, *(_cell(form, values) for form, values in found)))
    return rows


def _cell(form: str, values: Sequence[float]) -> str:
    if not values:
        return "–"
    texts = [format(x, form) for x in (statistics.fmean(values), min(values), max(values))]
    return texts[0] if len(set(texts)) == 1 else f"{texts[0]} ({texts[1]}–{texts[2]})"


def _explained(measured: Sequence[str], steps: int) -> str:
    """What the rankings are that are no methods of `attribute`."""
    meanings = {
        LEARNED: f"`learn_mask` for {steps} steps from the scores of `{START}`",
        PRUNED: f"`prune_gradually` from the scores of `{START}`",
        PRUNED_LEARNED: f"`learn_mask` for {steps} steps from what was pruned",
        IBCIRCUIT: f"`ibcircuit` of the next-token divergence for {steps} steps",
    }
    return " ".join(f'"{name}" is {meaning}.' for name, meaning in meanings.items() if name in measured)


@dataclass(frozen=True)
class _Beside:
    """A ranking beside EAP-IG on one task: its edges, CMD and time as shares of EAP-IG's, and how much further than
    EAP-IG's its circuits are from faithfulness 1, by size below the whole model's and seed: {edges: distances}."""

    edges: float
    cmd: float
    time: float
    further: Mapping[int, Sequence[float]]

    @property
    def worse(self) -> dict[int, float]:
        means = {size: _mean(by) for size, by in self.further.items()}
        return {size: by for size, by in means.items() if by > 0}


def _compared(runs: Runs, ranking: str) -> _Beside:
    """By means over the seeds that the ranking has."""
    shared = _having(runs, ranking)

    def ratio(measure: Callable[[Mapping[str, Any]], Any]) -> float:
        own, other = (_mean(_of(shared, name, measure)) for name in (ranking, START))
        return own / other if other else math.inf

    def further(index: int) -> list[float]:
        pairs = [[run[name]["curve"]["faithfulness"][index] for name in (ranking, START)] for run in shared.values()]
        return [abs(1 - own) - abs(1 - other) for own, other in pairs if own is not None and other is not None]

    return _Beside(
        ratio(lambda run: edges_at(run, FAITHFUL[0])),
        ratio(lambda run: run["curve"]["cmd"]),
        ratio(lambda run: run["seconds"]),
        {size: further(index) for index, size in enumerate(_sizes(shared, START)[:-1])},
    )


def _at(runs: Runs, ranking: str, index: int) -> list[float]:
    """Faithfulness of each seed's circuit of this size."""
    return _of(runs, ranking, lambda run: run["curve"]["faithfulness"][index])


def _sizes(runs: Runs, ranking: str) -> list[int]:
    """The circuits' edges, means over seeds."""
    curves = [run[ranking]["curve"] for run in _having(runs, ranking).values()]
    return [round(_mean(sizes)) for sizes in zip(*(curve["n_edges"] for curve in curves), strict=True)]


def _beside(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("task", "ranking", f"edges at {FAITHFUL[0]}", "CMD", "seconds", "less faithful at")]
    for task, runs in results["tasks"].items():
        for ranking in _names(runs):
            if ranking == START:
                continue
            found, less = _compared(runs, ranking), "no size"
            if found.worse:
                size = max(found.worse, key=lambda each: found.worse[each])
                own = _at(_having(runs, ranking), START, list(found.further).index(size))
                every = sum(min(by) > 0 for by in found.further.values() if by)
                always = f" ({every} in every seed)" if own[1:] else ""
                apart = f" ({max(own) - min(own):.3f})" if own[1:] else ""
                less = f"{len(found.worse)} of {len(found.further)} sizes{always}, most at {size:,}: "
                less += f"{found.worse[size]:.3f}{apart}"
            rows.append((task, ranking, f"{found.edges:.3f}", f"{found.cmd:.2f}", f"{found.time:.2g}", less))
    return rows


def _verdicts(results: Mapping[str, Any]) -> list[str]:
    """Each ranking beside EAP-IG, by means over the seeds that it has."""
    tasks, sentences = results["tasks"], []
    for ranking in _rankings(results):
        if ranking == START:
            continue
        found = {task: _compared(runs, ranking) for task, runs in tasks.items()}
        times = [each.time for each in found.values()]
        sentences.append(
            f"`{ranking}` beside `{START}`: at most a fifth of the edges at faithfulness {FAITHFUL[0]} on "
            f"{_among([task for task, each in found.items() if each.edges <= _SHARE], tasks)}, a lower CMD on "
            f"{_among([task for task, each in found.items() if each.cmd < 1], tasks)}, at no size less faithful on "
            f"{_among([task for task, each in found.items() if not each.worse], tasks)}, "
            f"{min(times):.2g} to {max(times):.2g} times its time."
        )
    return sentences


def _among(found: Sequence[str], tasks: Mapping[str, Any]) -> str:
    names = f" ({', '.join(found)})" if 0 < len(found) < len(tasks) else ""
    return f"{len(found)} of {len(tasks)} tasks{names}"


def _colours(rankings: Sequence[str]) -> dict[str, str]:
    others = iter([*LETTERS.values(), MUTED] * len(rankings))
    return {ranking: _COLOURS.get(ranking) or next(others) for ranking in rankings}


def draw_faithfulness(results: Mapping[str, Any]) -> Figure:
    """Faithfulness against edges kept, a panel for each task: means over seeds, and bands from least to most."""
    colours = _colours(_rankings(results))

    def panel(ax: Axes, task: str) -> None:
        runs = results["tasks"][task]
        ax.axhline(1.0, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        for ranking, colour in colours.items():
            curves = [seed[ranking]["curve"] for seed in _having(runs, ranking).values()]
            sizes = [_mean(ns) for ns in zip(*(curve["n_edges"] for curve in curves), strict=True)]
            values = [[f for f in fs if f is not None] for fs in zip(*(c["faithfulness"] for c in curves), strict=True)]
            ax.plot(sizes, [_mean(v) for v in values], "o-", color=colour, markersize=3, linewidth=1.3, label=ranking,
                    markerfacecolor=PAPER, zorder=3)  # fmt: skip
            if all(values):
                ax.fill_between(sizes, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12,
                                linewidth=0)  # fmt: skip
        ax.set_xscale("log")
        plain_numbers(ax.xaxis)
        ax.set_ylim(-0.2, 1.4)

    return panels(list(results["tasks"]), panel, "edges kept", "faithfulness")


def draw_cost(results: Mapping[str, Any]) -> Figure:
    """Edges at the first faithfulness of `FAITHFUL` against cost, a panel for each task; the line joins what no other
    ranking beats in both."""
    colours = _colours(_rankings(results))

    def panel(ax: Axes, task: str) -> None:
        runs, points = results["tasks"][task], []
        for ranking, colour in colours.items():
            cost = _mean(_of(runs, ranking, lambda run: run["forwards"]))
            size = _mean(_of(runs, ranking, lambda run: edges_at(run, FAITHFUL[0])))
            points.append((cost, size))
            ax.plot(cost, size, "o", color=colour, markersize=6, label=ranking, zorder=3)
        front = [p for p in sorted(points) if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]
        ax.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.2, drawstyle="steps-post", zorder=1)
        ax.loglog()
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            plain_numbers(axis)

    return panels(list(results["tasks"]), panel, "forward passes", f"edges at {FAITHFUL[0]}")
