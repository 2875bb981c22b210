"""What the leaderboard measures: edges are ranked on some pairs of a task, and circuits run on others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import bind
from ..checkpoint import data_identity
from ..errors import SEEDS, expected, growing_shares, listed, one_of, whole
from ..evaluation import FRACTIONS, Curve, evaluate, faithfulness_curve
from ..forward import TOKENS_PER_BATCH, borrowed
from ..graph import EdgeScores
from ..learning import ibcircuit, learn_mask, prune_gradually
from ..methods import METHODS, attribute
from ..metrics import METRICS
from ..ranks import together
from ..reproduction.experiment import HOW, Watch, environment, identity, unwatched
from ..reproduction.record import Record
from ..request import Progress, prepare
from ..tasks import PairedDataset, load_task

LEARNED, PRUNED, PRUNED_LEARNED, IBCIRCUIT = "learned", "pruned", "pruned-learned", "ibcircuit"
RANKINGS = (*METHODS, LEARNED, PRUNED, PRUNED_LEARNED, IBCIRCUIT)
START = "eap-ig-inputs"  # what learning starts from, and what all others are compared with
_FROM = {LEARNED: START, PRUNED: START, PRUNED_LEARNED: PRUNED}  # whose scores a ranking starts from
# Where none are named: exact patching takes hours, and IBCircuit as long as learning.
DEFAULT = ("eap", START, "eap-gp", "eap-ig-activations", "information-flow-routes", LEARNED, PRUNED, PRUNED_LEARNED)
FAITHFUL = (0.85, 0.95)  # of which the smallest circuits are looked for

Draw = Callable[[int], PairedDataset]  # seed -> pairs


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        scored: number of pairs of each task to rank edges on.
        pairs: number of other pairs to run circuits on.
        seeds: of the pairs, and of what learning draws; tables say mean, least and most over them.
        steps: steps of learning.
        fractions: sizes of the circuits, as shares of all edges.
        bisections: how many more sizes to try, for each of `FAITHFUL`, between the curve's first that is as faithful
            and the one before.
    """

    scored: int = 16
    pairs: int = 24
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    fractions: tuple[float, ...] = (0.0005, *FRACTIONS)
    bisections: int = 3

    def __post_init__(self) -> None:
        for name, least in {"scored": 1, "pairs": 1, "steps": 1, "bisections": 0}.items():
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        seeds = tuple(whole("seeds", seed, *SEEDS) for seed in listed("seeds", self.seeds, "a list of whole numbers"))
        if not seeds or len(set(seeds)) < len(seeds):
            raise expected("seeds", "one or more different ones", list(seeds) or "none")
        object.__setattr__(self, "seeds", seeds)
        object.__setattr__(self, "fractions", growing_shares("fractions", self.fractions))


def of_task(name: str, tokenizer: Any, settings: Settings) -> Draw:
    """Pairs of one of the package's tasks."""
    return lambda seed: load_task(name, tokenizer, n=settings.scored + settings.pairs, seed=seed)


def of_pairs(name: str, data: PairedDataset, settings: Settings) -> Draw:
    """A user's pairs, in an order that the seed draws."""
    wanted = settings.scored + settings.pairs
    if len(data) < wanted:
        raise expected(name, f"at least {wanted} pairs, {settings.scored} to rank edges on", len(data))
    one_of(f"metric of {name}", data.metric, [m.name for m in METRICS.values() if m.differentiable])
    return lambda seed: data[torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:wanted]]


@together
def leaderboard(
    model: nn.Module,
    tasks: Mapping[str, Draw],
    folder: Path,
    *,
    rankings: Sequence[str] = DEFAULT,
    settings: Settings | None = None,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Measure what `folder / "leaderboard.json"` does not have yet, and return its results for these tasks.

    Every ranking of every task and seed is written as soon as it is done; after an interruption the same call
    continues.

    Args:
        model: a Hugging Face causal language model.
        tasks: the pairs of each by seed, as of `of_task` and `of_pairs`.
        folder: an existing folder.
        rankings: names in `METHODS`; "learned" and "pruned" are `learn_mask` and `prune_gradually` of the data's own
            metric, from the scores of EAP-IG, which is always measured; "pruned-learned" is `learn_mask` from what was
            pruned; "ibcircuit" is `ibcircuit` of the divergence, as it was published.
        settings: what to measure.
        watch: called with the name of the next step; its context yields a function of (examples done, examples in all).

    Raises:
        InputError: a folder with results of another model, other data or settings, an unknown ranking, or anything
            that `attribute`, `learn_mask`, `ibcircuit` and `faithfulness_curve` refuse.
    """
    settings = settings or Settings()
    rankings = listed("rankings", rankings, "a list of names")
    for name in rankings:
        one_of("rankings", name, RANKINGS)
    if not tasks:
        raise expected("tasks", "at least one", "none")
    model = bind(model).model  # the model inside any wrapper
    # Seeds can be added to a folder: each stands for itself.
    asked = {name: value for name, value in asdict(settings).items() if name != "seeds"}
    request = {**identity(model), "settings": asked}
    record = Record(folder / "leaderboard.json", request, "leaderboard")
    record.get("environment", lambda: environment(model))
    wanted = tuple(dict.fromkeys((START, *rankings)))
    found: dict[str, dict[str, dict[str, Any]]] = {task: {} for task in tasks}
    drawn = {task: {seed: draw(seed) for seed in settings.seeds} for task, draw in tasks.items()}
    for data in (data for by_seed in drawn.values() for data in by_seed.values()):
        prepare(model, data, None)  # what is wrong with any is said before the work on the first
    for task, by_seed in drawn.items():
        for seed, data in by_seed.items():
            few, others = data[: settings.scored], data[settings.scored :]
            record.at("data", task).require(str(seed), data_identity(data))
            entry, runs = record.at("tasks", task, str(seed)), found[task].setdefault(str(seed), {})
            ranked = _Ranked(model, few, seed, settings.steps)
            for ranking in wanted:
                with watch(f"{task}, seed {seed}: {ranking}") as bar:
                    runs[ranking] = entry.get(ranking, partial(_measured, ranked, ranking, others, settings, bar))
    return {**record.content, "tasks": found}


def _measured(
    ranked: _Ranked, ranking: str, others: PairedDataset, settings: Settings, progress: Progress
) -> dict[str, Any]:
    """A ranking's cost and its circuits."""
    model, few = ranked.model, ranked.data
    seconds, scores = ranked(ranking, progress)
    forward = min(_timed(lambda: _forward(model, few))[0] for _ in range(3))
    curve = faithfulness_curve(model, scores, others, settings.fractions, how=HOW)
    found = {name: value for name, value in curve.to_dict().items() if name not in ("info", "baselines")}
    between = _between(model, scores, others, curve, settings.bisections)
    return {"seconds": seconds, "forwards": seconds / forward, "curve": found, "between": between}


def _between(
    model: nn.Module, scores: EdgeScores, data: PairedDataset, curve: Curve, bisections: int
) -> list[tuple[int, float]]:
    """(edges, faithfulness) of circuits that narrow down where a curve first is as faithful as each of `FAITHFUL`."""
    sizes = [int(f * scores.graph.n_edges) for f in curve.fractions]
    ends: dict[float, tuple[int, int]] = {}
    found: list[tuple[int, float]] = []
    for least in FAITHFUL:
        first = next((i for i, f in enumerate(curve.faithfulness) if f >= least), 0)
        if first > 0:
            ends[least] = sizes[first - 1], sizes[first]
    for _ in range(bisections if ends else 0):
        middles = {least: round(math.sqrt(low * high)) for least, (low, high) in ends.items()}
        wanted = sorted(set(middles.values()))
        circuits = scores.select_sizes(wanted, HOW)
        values = [result.faithfulness for result in evaluate(model, circuits, data)]
        found += zip((circuit.n_edges for circuit in circuits), values, strict=True)
        faithfulness = dict(zip(wanted, values, strict=True))
        for least, middle in middles.items():
            low, high = ends[least]
            ends[least] = (low, middle) if faithfulness[middle] >= least else (middle, high)
    return found


class _Ranked:
    """Rankings of these pairs, each made once, with the seconds that it took; those of what it starts from are part of
    them."""

    def __init__(self, model: nn.Module, data: PairedDataset, seed: int, steps: int) -> None:
        self.model, self.data, self._seed, self._steps = model, data, seed, steps
        self._made: dict[str, tuple[float, EdgeScores]] = {}

    def __call__(self, ranking: str, progress: Progress | None = None) -> tuple[float, EdgeScores]:
        if ranking not in self._made:
            before, start = self(_FROM[ranking]) if ranking in _FROM else (0.0, None)
            seconds, scores = _timed(lambda: self._rank(ranking, start, progress))
            self._made[ranking] = before + seconds, scores
        return self._made[ranking]

    def _rank(self, ranking: str, start: EdgeScores | None, progress: Progress | None) -> EdgeScores:
        model, data = self.model, self.data
        learning: Any = {"steps": self._steps, "seed": self._seed, "progress": progress}
        if start is None:
            if ranking == IBCIRCUIT:
                return ibcircuit(model, data, "kl_divergence", **learning)
            return attribute(model, data, method=ranking, progress=progress)
        if ranking == PRUNED:
            return prune_gradually(model, data, start=start, progress=progress)
        return learn_mask(model, data, start=start, **learning)


def _forward(model: nn.Module, data: PairedDataset) -> None:
    """The model's own pass over the clean prompts, the unit of cost."""
    request = prepare(model, data, None)
    with torch.no_grad(), borrowed(request.arch.model):
        for batch in request.batches(TOKENS_PER_BATCH):
            runner = request.runner(request.arch.graph("kv"), batch)
            runner.logits(runner.embed(batch.clean))


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the call returned."""
    waits = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    waits()
    began = time.perf_counter()
    result = call()
    waits()
    return time.perf_counter() - began, result
