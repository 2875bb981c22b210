"""One ranking of edges, learned for circuits of every size at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from ...checkpoint import Checkpoint, Where, opened, settings_of
from ...errors import SEEDS, expected, flag, instance, known_arguments, number, one_of, whole
from ...forward import Constants, borrowed, one_want_of_memory
from ...graph import EdgeScores
from ...modules.loans import gives_back
from ...provenance import called
from ...ranks import together
from ...request import Progress, Request, prepare, watched
from ...tasks import PairedDataset
from ..asked import check_gradient, check_start, origin, ranking, sizes_of
from .gates import GATES, draw_sizes, open_gates, starting_places
from .steps import DECAY, Descent

WARM_UP, LAST_RATE = 10, 0.1  # steps until the full rate, and what share of it is left at the end
LAST_SHARPNESS = 2.0  # of gates at the end; they begin with 1
_LEAST = 1e-8  # what is added to a gradient's size before the first step
_SHARES = 0.001, 0.2  # of all edges, between which sizes are drawn


@dataclass(frozen=True)
class _Asked:
    """How to learn, as `learn_mask` takes it; `smallest` and `largest` are the sizes."""

    steps: int
    rate: float
    circuits: int
    examples: int
    smallest: int
    largest: int
    gates: str


@overload
def learn_mask(
    model: nn.Module,
    data: PairedDataset,
    metric: Any = ...,
    *,
    start: EdgeScores,
    target: Tensor | None = ...,
    steps: int = ...,
    rate: float = ...,
    circuits: int = ...,
    examples: int = ...,
    n_edges: int | tuple[int, int] | None = ...,
    gates: str = ...,
    seed: int = ...,
    ablation: str | Constants = ...,
    ablation_data: PairedDataset | None = ...,
    reuse_prefix: bool = ...,
    memory: int | str | None = ...,
    progress: Progress | bool | None = ...,
    checkpoint: Where = ...,
) -> EdgeScores: ...
@overload
def learn_mask(
    model: nn.Module,
    data: PairedDataset,
    metric: Any = ...,
    *,
    start: EdgeScores,
    target: Tensor | None = ...,
    steps: int = ...,
    rate: float = ...,
    circuits: int = ...,
    examples: int = ...,
    n_edges: int | tuple[int, int] | None = ...,
    gates: str = ...,
    seed: Sequence[int],
    ablation: str | Constants = ...,
    ablation_data: PairedDataset | None = ...,
    reuse_prefix: bool = ...,
    memory: int | str | None = ...,
    progress: Progress | bool | None = ...,
    checkpoint: Where = ...,
) -> list[EdgeScores]: ...
@together
@gives_back
@one_want_of_memory
@known_arguments
def learn_mask(
    model: nn.Module,
    data: PairedDataset,
    metric: Any = None,
    *,
    start: EdgeScores,
    target: Tensor | None = None,
    steps: int = 200,
    rate: float = 0.08,
    circuits: int = 2,
    examples: int = 4,
    n_edges: int | tuple[int, int] | None = None,
    gates: str = "hard-concrete",
    seed: int | Sequence[int] = 0,
    ablation: str | Constants = "patching",
    ablation_data: PairedDataset | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
    progress: Progress | bool | None = None,
    checkpoint: Where = None,
) -> EdgeScores | list[EdgeScores]:
    """Learn one ranking of all edges such that its circuits of every size do best.

    Each step draws sizes, opens every edge's gate according to how far it stands above or below the place at which
    circuits of that size end, runs these circuits and moves the edges such that their metric comes nearer to the
    target on each pair; docs/learning.md.

    Args:
        model: a Hugging Face language model, causal or masked, or a classifier of prompts; it comes back as it was.
        data: prompt pairs to learn from. Measure what was learned on others.
        metric: what circuits keep, differentiable: a name in `METRICS` or a callable as in `attribute`; by default the
            data's own, `data.metric`. What is minimised is |m(circuit) − target|; for "kl_divergence" that is the
            divergence itself.
        start: the ranking to start from, by absolute score, such as those of `attribute`; on its graph masks are
            learned.
        target: what the metric is to be on each pair, [E]; by default the model's own value.
        steps: how many steps.
        rate: Adam's learning rate, in units of the logarithm of a circuit's size.
        circuits: how many circuits run in a step, one from each of as many equal parts of the sizes' logarithms.
        examples: how many pairs each step runs them on.
        n_edges: the size to learn, or the smallest and the largest of the sizes; by default 0.1 % and 20 % of all
            edges. What lies beyond keeps the order in which it was.
        gates: how open edges are in a step: "hard-concrete", or "uniform" for uniform gradient sampling (Li & Janson
            2024, arXiv 2409.09951), which opens fewer of them in part.
        seed: of the sizes and of the noise of gates; or several, whose rankings are learned side by side, the same as
            one by one, up to rounding.
        ablation, ablation_data: what edges outside the circuit carry, as in `evaluate`; not "optimal".
        reuse_prefix: as in `attribute`.
        memory: what learning may take besides the model and the data, in bytes or as "8GiB"; by default half of what is
            free. A step's circuits and pairs run in as many passes as fit into it.
        progress: called with (steps done, steps in all); True shows a bar.
        checkpoint: as in `attribute`; written after a step.

    Returns:
        EdgeScores whose values are ranks: the weakest edge has 1/n, the strongest 1. For several seeds a list of them.

    Raises:
        InputError: scores of another graph, numbers out of range, or anything that `attribute` refuses.

    Example:
        >>> ranking = eap.learn_mask(model, data, start=scores, steps=20)
        >>> curve = eap.faithfulness_curve(model, ranking, other_data, (0.1, 0.5, 1))
        >>> first, second = eap.learn_mask(model, data, start=scores, steps=5, seed=[0, 1])  # side by side
    """
    call = called(learn_mask, locals())
    steps, rate = whole("steps", steps, 1), number("rate", rate, "a positive number", 5e-324, 1e308)
    circuits, examples = whole("circuits", circuits, 1), whole("examples", examples, 1)
    seeds = [whole("seed", each, 0, SEEDS[1]) for each in (seed if isinstance(seed, Sequence) else [seed])]
    if not seeds:
        raise expected("seed", "at least one", "none")
    one_of("gates", gates, GATES)
    progress, reuse_prefix = watched(progress), flag("reuse_prefix", reuse_prefix)
    request = prepare(model, data, metric, ablation, None, ablation_data, reuse_prefix, memory)
    check_gradient(request)
    check_start(start, request)
    graph = start.graph
    if target is not None:
        instance("target", target, Tensor)
        if target.shape != (len(data),) or not target.isfinite().all():
            raise expected("target", f"{len(data)} finite values, one a pair", f"shape {list(target.shape)}")
    smallest, largest = sizes_of(n_edges, graph.n_edges, _SHARES)
    asked = _Asked(steps, rate, circuits, examples, smallest, largest, gates)
    info = {**origin(request, call, graph, "learned", request.arch.accumulate), "additive": False}
    learning = {**asdict(asked), "start": start.info.get("method")}
    given = {"start": start.values, "target": target, "heads": graph.heads, "seeds": seeds}
    settings = partial(settings_of, request, call="learn_mask", **given, **asdict(asked))
    with opened(checkpoint, request.arch.model, settings) as kept, borrowed(request.arch.model):
        request = request.verified(graph.heads).with_constants()
        orders = _learn(request, start, target, asked, seeds, kept, progress)
    rankings = [
        ranking(graph, order, {**info, "learning": {**learning, "seed": each}})
        for each, order in zip(seeds, orders, strict=True)
    ]
    return rankings if isinstance(seed, Sequence) else rankings[0]


def _learn(
    request: Request,
    start: EdgeScores,
    target: Tensor | None,
    asked: _Asked,
    seeds: list[int],
    checkpoint: Checkpoint,
    progress: Progress | None,
) -> list[Tensor]:
    """Of each seed the edges' numbers [n], from the weakest to the strongest."""
    places = starting_places(start.values[start.graph.edge_mask])
    (widest,) = open_gates(places, [asked.largest], None)
    descent = Descent(request, start.graph, places.repeat(len(seeds), 1), widest, asked.examples, 0, checkpoint)
    for step in descent.steps(asked.steps, progress):
        sharpness, opened_gates = LAST_SHARPNESS ** (step / asked.steps), []
        for seed, own in zip(seeds, descent.places, strict=True):
            generator = descent.generator(seed)
            sizes = draw_sizes(asked.circuits, asked.smallest, asked.largest, generator)
            opened_gates.append(open_gates(own, sizes, generator, sharpness, asked.gates))
        gates = torch.cat(opened_gates)
        (slope,) = torch.autograd.grad(gates, descent.places, descent.slope(gates, target) / asked.circuits)
        falling = 1 - (1 - LAST_RATE) * step / asked.steps
        rate = asked.rate * falling * min(1, (step + 1) / WARM_UP)
        usual = [[_usual_slope(each, step)] for each in descent.squares]
        descent.move(slope, rate, torch.tensor(usual, dtype=slope.dtype))
    return [order_of(each, places, asked.largest) for each in descent.places.detach()]


def order_of(places: Tensor, before: Tensor, largest: int) -> Tensor:
    """The edges' numbers [n], from the weakest to the strongest: the strongest of them, as many as the largest circuit
    that was drawn has, by their places [n], and all others by those before, [n].

    No circuit ended among the others. Only the noise of gates moved them, and half of all edges are mostly others.
    """
    order = places.argsort(stable=True)
    others, drawn = order.tensor_split([len(order) - largest])
    return torch.cat([others[before[others].argsort(stable=True)], drawn])


def _usual_slope(squares: Tensor, step: int) -> float:
    """The mean size of the gradients so far, from Adam's running squares [n], over edges that had any.

    Adam would move every edge equally far, however little it matters: noise would carry off most of what large circuits
    consist of.
    """
    moved = squares[squares > 0]
    return float((moved / (1 - DECAY**step)).sqrt().mean()) if len(moved) else _LEAST
