"""A faithfulness card: what there is to know of a circuit before it is believed, in one call."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, Where, opened, settings_of
from ..display import Result
from ..errors import SEEDS, expected, instance, known_arguments, listed, warn, whole
from ..evaluation import BASELINES, Baseline, EvaluationResult, evaluate, to_evaluate
from ..forward import Constants, one_want_of_memory
from ..graph import Circuit, EdgeScores, edge_overlap
from ..provenance import COMMAND, called
from ..ranks import together
from ..request import Progress, watched
from ..tasks import PairedDataset

RESAMPLED = "resampled"
_SELECTED_BY = ("n_edges", "how", "signed", "threshold", "positive_ratio", "exactly")
_SAME = ("data_sha256", "prompts_sha256")


@dataclass(frozen=True, eq=False)
class FaithfulnessCard(Result):
    """What is known of a circuit.

    Args:
        circuit: the circuit.
        result: on the prompts.
        others: on other prompts, by their name.
        beside: other circuits on the same prompts: every entry of `BASELINES`, and "resampled", circuits that resamples
            of the scored pairs choose; as baselines of one size.
        cost: how much faithfulness the circuit loses without an edge, by the edge's name, the cheapest first.
        forwards: how many prompts have run through the model or a circuit.
        info: what ran, as plain JSON values.
    """

    circuit: Circuit
    result: EvaluationResult
    others: dict[str, EvaluationResult]
    beside: dict[str, Baseline]
    cost: dict[str, float]
    forwards: int
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def faithfulness(self) -> float:
        return self.result.faithfulness

    @property
    def shared(self) -> tuple[float, ...]:
        """Of the edges that the circuit or one of resampled scores has, the share that both have, for each resample."""
        draws = self.beside[RESAMPLED].circuits if RESAMPLED in self.beside else ()
        return tuple(edge_overlap(self.circuit, other).iou for (other,) in draws)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "n_edges": self.circuit.n_edges,
            **_numbers(self.result),
            "others": {name: _numbers(result) for name, result in self.others.items()},
            "beside": {name: [draw for (draw,) in baseline.draws] for name, baseline in self.beside.items()},
            "shared": list(self.shared),
            "cost": self.cost,
            "forwards": self.forwards,
            "info": self.info,
        }

    def __repr__(self) -> str:
        named = [f"{name} {baseline.faithfulness[0]:.3g}" for name, baseline in self.beside.items()]
        named += [f"on {name} {result.faithfulness:.3g}" for name, result in self.others.items()]
        return (
            f"FaithfulnessCard({self.circuit.n_edges} edges, faithfulness={self.faithfulness:.3g}; {', '.join(named)})"
        )


def _numbers(result: EvaluationResult) -> dict[str, Any]:
    found = {name: getattr(result, name) for name in ("faithfulness", "mean", "clean", "corrupted")}
    return {**found, "interval": list(result.interval), "n_examples": len(result.values)}


@together
@known_arguments
@one_want_of_memory
def faithfulness_card(
    model: nn.Module,
    circuit: Circuit,
    data: PairedDataset,
    scores: EdgeScores | None = None,
    *,
    others: Mapping[str, PairedDataset] | None = None,
    metric: Any = None,
    ablation: str | Constants = "patching",
    ablation_data: PairedDataset | None = None,
    resamples: int = 10,
    seeds: Sequence[int] = (0, 1, 2),
    most_edges: int = 100,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: Progress | bool | None = None,
    checkpoint: Where = None,
) -> FaithfulnessCard:
    """What there is to know of a circuit before it is believed: does it hold on other prompts, would other prompts have
    given it, do other circuits do as well, and does it need all of its edges?

    All circuits run side by side. docs/faithfulness-card.md says how to read the result.

    Args:
        model: a Hugging Face language model (causal, masked, encoder-decoder) or a classifier; it comes back as it was.
        circuit: the circuit.
        data: prompts on which it is measured, best not those that it was chosen by.
        scores: those that chose it, with `keep="examples"`: circuits are then chosen again, as this one was, by the
            scores of resamples of these examples. Without them the card says nothing of stability.
        others: other prompts by name, such as other templates or corruptions, each with the same metric, or its own
            where none is given.
        metric, ablation, ablation_data, batch_size, memory: as in `evaluate`.
        resamples: how many resamples of the scored examples.
        seeds: one random circuit of as many edges is drawn for each.
        most_edges: how many edges of the circuit are left out, one at a time; of a larger circuit as many at random.
        progress: called with (pairs done, pairs in all); True shows a bar.
        checkpoint: as in `attribute`; it keeps what all prompts have given.

    Raises:
        InputError: scores that did not choose the circuit or without single examples', or anything that `evaluate`
            refuses.

    Example:
        >>> scores = eap.attribute(model, data, keep="examples")
        >>> card = eap.faithfulness_card(model, scores.select(20), other_data, scores, resamples=3)
    """
    call, progress = called(faithfulness_card, locals()), watched(progress)
    instance("circuit", circuit, Circuit, "a Circuit, such as scores.select(n_edges=200) gives")
    instance("data", data, PairedDataset)
    others = dict(instance("others", {} if others is None else others, Mapping, "prompts by name"))  # type: ignore[type-abstract]
    for name, other in others.items():
        instance(f"others[{name!r}]", other, PairedDataset)
    resamples, most_edges = whole("resamples", resamples, 1), whole("most_edges", most_edges, 0)
    seeds = [whole("seeds", seed, *SEEDS) for seed in listed("seeds", seeds, "a list of whole numbers")]
    if not seeds:
        raise expected("seeds", "at least one", "none")
    drawn = {name: each.circuits([circuit], seeds) for name, each in BASELINES.items()}
    if scores is not None:
        drawn = {RESAMPLED: tuple((again,) for again in _resampled(circuit, scores, resamples)), **drawn}
    edges: list[tuple[int, int]] = circuit.mask.nonzero().tolist()
    if len(edges) > most_edges:
        edges = sorted(random.Random(0).sample(edges, most_edges))
    circuits = [circuit, *(each for draws in drawn.values() for (each,) in draws)]
    circuits += [_without(circuit, *edge) for edge in edges]
    request, *_ = (  # all are checked before anything runs
        to_evaluate([circuit], model, each, metric, ablation, batch_size, ablation_data, True, memory)
        for each in (data, *others.values())
    )
    done, pairs = 0, len(data) + sum(map(len, others.values()))

    def run(circuits: list[Circuit], data: PairedDataset, checkpoint: Checkpoint) -> list[EvaluationResult]:
        nonlocal done
        before, done = done, done + len(data)
        return evaluate(
            model,
            circuits,
            data,
            metric,
            ablation=ablation,
            ablation_data=ablation_data,
            batch_size=batch_size,
            memory=memory,
            progress=progress and (lambda now, _: progress(before + now, pairs)),
            checkpoint=checkpoint,
        )

    elsewhere = {"names": list(others), "others": list(others.values())}
    settings = partial(settings_of, request, call="faithfulness_card", circuits=circuits, **elsewhere)
    with opened(checkpoint, request.arch.model, settings) as kept:
        result, *rest = run(circuits, data, kept.named("0"))
        held = {name: run([circuit], others[name], kept.named(str(i)))[0] for i, name in enumerate(others, 1)}
    source = circuit.info if scores is None else scores.info
    if any(source.get(name) is not None and source.get(name) == result.info[name] for name in _SAME):
        warn("The circuit was chosen by the prompts it is measured on; others tell whether it holds.")
    found = iter(rest)
    share = (circuit.n_edges / circuit.graph.n_edges,)
    beside = {name: Baseline(share, draws, tuple((next(found),) for _ in draws)) for name, draws in drawn.items()}
    cost = {circuit.graph.edge_name(*edge): result.faithfulness - next(found).faithfulness for edge in edges}
    forwards = len(data) * (2 + len(circuits)) + 3 * (pairs - len(data))
    info = {**result.info, "call": COMMAND.get() or call, "seeds": seeds, "circuit": circuit.info}
    cheapest_first = dict(sorted(cost.items(), key=lambda item: item[1]))
    return FaithfulnessCard(circuit, result, held, beside, cheapest_first, forwards, info)


def check_chosen(circuit: Circuit, scores: EdgeScores) -> Tensor:
    """The scores of single examples, [E, S, R]; refuses scores that have none, or that did not choose the circuit."""
    instance("scores", scores, EdgeScores)
    if scores.graph != circuit.graph:
        raise expected("scores", f"those of {circuit.graph!r}", f"those of {scores.graph!r}")
    if scores.per_example is None:
        raise expected("scores", 'those of attribute(keep="examples")', "none of single examples")
    if "among" in circuit.info.get("selection", {}):
        found = "one chosen among edges whose sign is sure (among=, --confidence)"
        raise expected("circuit", "one that resampled scores can choose again", found)
    if _chosen(scores, circuit) != circuit:
        raise expected("scores", "those that chose the circuit", "some that choose another by its `info`")
    return scores.per_example


def _resampled(circuit: Circuit, scores: EdgeScores, resamples: int) -> list[Circuit]:
    """Circuits of the means over resamples of the examples, chosen as the circuit was."""
    examples = check_chosen(circuit, scores)
    n, generator = len(examples), torch.Generator().manual_seed(0)
    picked = (torch.randint(n, (n,), generator=generator) for _ in range(resamples))
    means = (examples[each].mean(0) for each in picked)
    return [_chosen(EdgeScores(scores.graph, mean, scores.info), circuit) for mean in means]


def _chosen(scores: EdgeScores, circuit: Circuit) -> Circuit:
    """What the scores choose in the way in which the circuit was chosen."""
    asked = circuit.info.get("selection") or {"n_edges": circuit.n_edges, "exactly": True}
    if "n_nodes" in asked:
        return scores.node_scores().select(asked["n_nodes"], asked["signed"])
    return scores.select(**{name: asked[name] for name in _SELECTED_BY if asked.get(name) is not None})


def _without(circuit: Circuit, sender: int, receiver: int) -> Circuit:
    mask = circuit.mask.clone()
    mask[sender, receiver] = False
    return Circuit(circuit.graph, mask)
