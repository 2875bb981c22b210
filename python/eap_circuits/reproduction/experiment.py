"""The comparison of EAP, EAP-IG and exact patching of Hanna et al. 2024 (arXiv 2403.17806), on any model and task.

All three methods score edges on the same few pairs of each task; circuits run on other pairs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eap_kernels.info import processor

from ..adapters import bind
from ..checkpoint import Checkpoint, Where, data_identity, model_identity, model_name, opened
from ..errors import expected, growing_shares, one_of, whole
from ..evaluation import FRACTIONS, EvaluationResult, evaluate, faithfulness_curve
from ..graph import Circuit, EdgeScores, edge_overlap, node_overlap, score_agreement
from ..methods import QUADRATURES, attribute
from ..metrics import METRICS
from ..provenance import versions
from ..ranks import exchange, together
from ..report.curves import saved_curve, smallest_faithful
from ..request import Progress
from ..tasks import PairedDataset, load_task
from .record import Record

METHODS = ("eap", "eap-ig-inputs", "exact")
GRADIENTS = METHODS[:2]
HOW = "greedy"  # the paper's selection
LEFT_OUT = 10  # strongest edges, to see how methods agree on the others
SHOWN = 3
STRONGEST = 100  # one edge in this many is among the strongest

Watch = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Args:
        scored: number of pairs to score edges on; the time grows with it, mostly for exact scores.
        pairs: number of pairs to run circuits on.
        seed: seed of the pairs that score edges; those that circuits run on take the next seed.
        steps: steps of EAP-IG.
        draws: random circuits of each size.
        faithful: the circuit of a task is the smallest of its curve with this faithfulness (the paper's 85 %).
        grid: numbers of steps M at which quadratures are compared.
        reference: number of Gauss–Legendre steps that they are compared with.
        fractions: sizes of the circuits, as shares of all edges.
    """

    scored: int = 4
    pairs: int = 32
    seed: int = 0
    steps: int = 5
    draws: int = 3
    faithful: float = 0.85
    grid: tuple[int, ...] = (1, 2, 3, 5, 10, 20)
    reference: int = 50
    fractions: tuple[float, ...] = FRACTIONS

    def __post_init__(self) -> None:
        for name in ("scored", "pairs", "seed", "steps", "draws", "reference"):
            object.__setattr__(self, name, whole(name, getattr(self, name), None if name == "seed" else 1))
        object.__setattr__(self, "grid", tuple(whole("grid", steps, 1) for steps in self.grid))
        object.__setattr__(self, "fractions", growing_shares("fractions", self.fractions))


@dataclass(frozen=True)
class Experiment:
    """A task: pairs to score edges on, and other pairs to run circuits on."""

    name: str
    scored: PairedDataset
    held_out: PairedDataset

    @classmethod
    def from_task(cls, name: str, tokenizer: Any, settings: Settings) -> Experiment:
        """One of the package's tasks."""
        scored = load_task(name, tokenizer, n=settings.scored, seed=settings.seed)
        return cls(name, scored, load_task(name, tokenizer, n=settings.pairs, seed=settings.seed + 1))

    @classmethod
    def from_data(cls, name: str, data: PairedDataset, settings: Settings) -> Experiment:
        """A user's pairs: edges are scored on the first ones, at most half of them; circuits run on the next ones."""
        if len(data) < 2:
            raise expected(name, "at least 2 pairs, to score edges and to run circuits on", len(data))
        one_of(f"metric of {name}", data.metric, [m.name for m in METRICS.values() if m.differentiable])
        first = min(settings.scored, len(data) // 2)
        return cls(name, data[:first], data[first : first + settings.pairs])


@contextlib.contextmanager
def unwatched(_: str) -> Iterator[Progress]:
    """Nobody looks on."""
    yield lambda done, total: None


@together
def reproduce(
    model: nn.Module,
    experiments: Sequence[Experiment],
    folder: Path,
    settings: Settings | None = None,
    watch: Watch = unwatched,
    checkpoint: Where = None,
) -> dict[str, Any]:
    """Measure what `folder / "results.json"` does not have yet, and return its results for these tasks.

    Every stage is written as soon as it is done, and the one in progress after every batch; after an interruption the
    same call continues.

    Args:
        model: a Hugging Face causal language model.
        experiments: one or more tasks with different names.
        folder: an existing folder, used only for this comparison.
        settings: what to measure.
        watch: called with the name of the next step; its context yields a function of (examples done, examples in all).
        checkpoint: the file of the stage in progress, which is removed at the end; by default
            `folder / "checkpoint.safetensors"`.

    Raises:
        InputError: a folder with results of another model, other data or settings, or anything that `attribute` and
            `evaluate` refuse.
    """
    settings = settings or Settings()
    names = [experiment.name for experiment in experiments]
    if not names or len(set(names)) < len(names):
        raise expected("tasks", "one or more, with different names", ", ".join(names) or "none")
    model = bind(model).model  # the model inside any wrapper
    request = {**identity(model), "settings": asdict(settings)}
    record = Record(folder / "results.json", request)
    for experiment in experiments:
        record.at("tasks", experiment.name).require("facts", _facts(experiment))
    record.get("environment", lambda: environment(model))
    (folder / "scores").mkdir(exist_ok=True)
    file = folder / "checkpoint.safetensors" if checkpoint is None else checkpoint
    with opened(file, model, lambda: {"call": "reproduce", "settings": request["settings"]}) as kept:
        _Stages(model, folder / "scores", settings, watch, kept).measure(record, experiments)
    if not isinstance(file, Checkpoint):
        Path(file).unlink(missing_ok=True)
    return {
        **record.content,
        "tasks": {name: record.content["tasks"][name] for name in names},
        "cross": {a: {b: record.content["cross"][a][b] for b in names} for a in names},
    }


def identity(model: nn.Module) -> dict[str, Any]:
    """What a record of results says of the model they are of."""
    found = model_identity(model)
    software = found.pop("versions")
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return {"model": {"name": model_name(model), "digest": digest}, "software": software}


def _facts(experiment: Experiment) -> dict[str, Any]:
    scored, held_out = experiment.scored, experiment.held_out
    facts = [data_identity(pairs) for pairs in (scored, held_out)]
    return {"data": facts, "metric": scored.metric, "scored": len(scored), "held_out": len(held_out)}


def environment(model: nn.Module) -> dict[str, Any]:
    """The machine that a model is on, and the versions of the packages."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return {"machine": machine, "versions": versions(), "date": date.today().isoformat()}


@dataclass(frozen=True)
class _Stages:
    """The stages of a comparison; each measures what the record does not have yet."""

    model: nn.Module
    folder: Path  # of the scores
    settings: Settings
    watch: Watch
    checkpoint: Checkpoint

    def measure(self, record: Record, experiments: Sequence[Experiment]) -> None:
        circuits = {}
        for experiment in experiments:
            entry = record.at("tasks", experiment.name)
            scores = {method: self._scores(entry, experiment, method) for method in METHODS}
            _agree(entry, scores)
            self._integrate(entry, experiment, scores["exact"])
            self._run(entry.at("curves"), experiment, scores)
            circuits[experiment.name] = self._circuit(entry, scores["eap-ig-inputs"])
        self._cross(record, experiments, circuits)

    def _kept(self, entry: Record, name: str, what: str, score: Callable[[], EdgeScores]) -> EdgeScores:
        """Scores that are measured once, and then read from their file."""
        path = self.folder / f"{name}-{what}.safetensors"
        # Rank 0's files count: it writes while others look.
        there = what in entry.at("scores").content and path.is_file()
        if exchange(there)[0]:
            return EdgeScores.load(path)
        found = score()
        found.save(path)
        entry.at("scores").get(what, lambda: path.name)
        return found

    def _attributed(self, experiment: Experiment, method: str, steps: int, **asked: Any) -> EdgeScores:
        data = experiment.scored
        return attribute(self.model, data, data.metric, method=method, steps=steps, checkpoint=self.checkpoint, **asked)

    def _scores(self, entry: Record, experiment: Experiment, method: str) -> EdgeScores:
        def score() -> EdgeScores:
            with self.watch(f"{experiment.name}: {method} scores") as bar:
                return self._attributed(experiment, method, self.settings.steps, progress=bar)

        return self._kept(entry, experiment.name, method, score)

    def _integrate(self, entry: Record, experiment: Experiment, exact: EdgeScores) -> None:
        """Each quadrature's distance from the integral, relative to it, and its correlation with exact scores."""
        grids, settings = entry.at("quadrature"), self.settings
        wanted = [(q, m) for q in QUADRATURES for m in settings.grid if str(m) not in grids.at(q).content]
        if not wanted:
            return

        def score(quadrature: str, steps: int) -> EdgeScores:
            return self._attributed(experiment, "eap-ig-inputs", steps, quadrature=quadrature)

        def compare(quadrature: str, steps: int) -> dict[str, float]:
            found = score(quadrature, steps)
            error = (found.values - integral.values).norm() / integral.values.norm()
            return {"error": float(error), "pearson": score_agreement(found, exact).pearson}

        with self.watch(f"{experiment.name}: steps of integration") as bar:
            reference = partial(score, "gauss-legendre", settings.reference)
            integral = self._kept(entry, experiment.name, "integral", reference)
            for done, (quadrature, steps) in enumerate(wanted, 1):
                grids.at(quadrature).get(str(steps), partial(compare, quadrature, steps))
                bar(done, len(wanted))

    def _run(self, entry: Record, experiment: Experiment, scores: dict[str, EdgeScores]) -> None:
        data, settings = experiment.held_out, self.settings

        def measure(method: str) -> dict[str, Any]:
            # Random circuits depend only on their size, so they are measured only with EAP-IG's circuits.
            baselines = ("random",) if method == "eap-ig-inputs" else ()
            with self.watch(f"{experiment.name}: circuits of {method}") as bar:
                curve = faithfulness_curve(
                    self.model,
                    scores[method],
                    data,
                    settings.fractions,
                    metric=data.metric,
                    how=HOW,
                    progress=bar,
                    baselines=baselines,
                    seeds=range(settings.draws),
                    checkpoint=self.checkpoint,
                )
            # What ran, and when, is in the record's own request and environment.
            return {name: value for name, value in curve.to_dict().items() if name != "info"}

        for method in METHODS:
            entry.get(method, partial(measure, method))

    def _circuit(self, entry: Record, scores: EdgeScores) -> Circuit:
        """The task's circuit: the smallest one that is faithful."""
        curve = saved_curve(entry.content["curves"]["eap-ig-inputs"])
        index = smallest_faithful(curve, self.settings.faithful)
        circuit = scores.select(int(curve.fractions[index] * scores.graph.n_edges), HOW)
        entry.get("circuit", lambda: {"n_edges": circuit.n_edges, "n_nodes": len(circuit.nodes)})
        return circuit

    def _cross(self, record: Record, experiments: Sequence[Experiment], circuits: dict[str, Circuit]) -> None:
        """What each task's circuit shares with the others, and how faithful it is on their prompts."""
        for experiment in experiments:
            entry, data = record.at("cross", experiment.name), experiment.held_out
            names = [name for name in circuits if name not in entry.content]
            if not names:
                continue
            with self.watch(f"{experiment.name}: the other tasks' circuits") as bar:
                others = [circuits[name] for name in names]
                results = evaluate(self.model, others, data, data.metric, progress=bar, checkpoint=self.checkpoint)
            own = circuits[experiment.name]
            for name, result in zip(names, results, strict=True):
                entry.get(name, partial(_share, own, circuits[name], result))


def _agree(entry: Record, scores: dict[str, EdgeScores]) -> None:
    exact = scores["exact"]
    rest = ~exact.select(LEFT_OUT, prune=False).mask
    count = max(1, exact.graph.n_edges // STRONGEST)
    strongest = exact.select(count, prune=False)

    def of_strongest(found: EdgeScores) -> dict[str, float]:
        shared = edge_overlap(found.select(count, prune=False), strongest).of_second
        return {"found": shared, "spearman": score_agreement(found, exact, among=strongest.mask).spearman}

    for method in GRADIENTS:
        entry.at("agreement").get(method, partial(_agreement, scores[method], exact))
        entry.at("rest").get(method, partial(_agreement, scores[method], exact, rest))
        entry.at("strongest").get(method, partial(of_strongest, scores[method]))
    entry.get("edges", partial(_edges, scores))


def _edges(scores: dict[str, EdgeScores]) -> list[dict[str, Any]]:
    """The strongest edges by exact patching, and each method's scores of them."""
    graph, found = scores["exact"].graph, []
    for sender, receiver, _ in scores["exact"].top_edges(SHOWN):
        place = graph.senders.index(sender), graph.receivers.index(receiver)
        values = {method: float(scores[method].values[place]) for method in METHODS}
        found.append({"sender": sender, "receiver": receiver, **values})
    return found


def _agreement(first: EdgeScores, second: EdgeScores, among: Tensor | None = None) -> dict[str, float]:
    return asdict(score_agreement(first, second, among=among))


def _share(own: Circuit, other: Circuit, result: EvaluationResult) -> dict[str, float]:
    edges, nodes = edge_overlap(own, other), node_overlap(own, other)
    return {"faithfulness": result.faithfulness, "edges": edges.iou, "nodes": nodes.iou}
