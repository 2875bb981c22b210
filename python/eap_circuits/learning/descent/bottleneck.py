"""IBCircuit: edges let through as little as circuits need (Bian et al. 2025, arXiv 2602.22581).

Every edge has a weight λ between 0 and 1. A receiver reads λ of what the sender writes and 1 − λ of noise, Gaussian
with the mean and the variance that the sender's contribution has over the prompts. The weights that are learned lose
little of the metric and let through little information.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ...checkpoint import Checkpoint, Where, opened, settings_of
from ...errors import SEEDS, expected, known_arguments, number, one_of, whole
from ...forward import TOKENS_PER_BATCH, Constants, borrowed, one_want_of_memory
from ...graph import EdgeScores, Graph, Heads
from ...modules.loans import gives_back
from ...provenance import called
from ...ranks import together
from ...recording import deviations
from ...request import Progress, Request, prepare, watched
from ...tasks import PairedDataset
from ..asked import check_gradient, origin
from .steps import Descent

BEGINNING = 5.0  # log-odds of every weight at first: λ = 0.993
_FLOOR = 1e-8  # Adam's own


@dataclass(frozen=True)
class _Asked:
    """How to learn, as `ibcircuit` takes it."""

    beta: float
    steps: int
    rate: float
    examples: int
    seed: int


@together
@gives_back
@one_want_of_memory
@known_arguments
def ibcircuit(
    model: nn.Module,
    data: PairedDataset,
    metric: Any = None,
    *,
    beta: float = 30.0,
    steps: int = 200,
    rate: float = 0.05,
    examples: int = 4,
    heads: Heads = "kv",
    seed: int = 0,
    memory: int | str | None = None,
    progress: Progress | bool | None = None,
    checkpoint: Where = None,
) -> EdgeScores:
    """Learn how much of each edge a circuit needs, by IBCircuit (Bian et al. 2025, arXiv 2602.22581).

    Receiver v reads Σ_u λ_uv c_u + (1 − λ_uv) n_u, where c_u is what sender u writes and n_u is noise with the mean and
    variance of c_u over the clean prompts, at each position. Minimised is |m(circuit) − m(model)| + β·I, where I is the
    information that an edge lets through, KL(what it carries ‖ the noise), in nats for each feature, its mean over
    edges. Corrupted prompts are not used. docs/methods.md says where this differs from the paper.

    Args:
        model: a Hugging Face language model, causal or masked, or a classifier of prompts; it comes back as it was.
        data: at least two prompts, whose tokens at one position play the same part in most of them.
        metric: what circuits keep, differentiable: a name in `METRICS` or a callable as in `attribute`; by default the
            data's own, `data.metric`. The paper's is "kl_divergence", of which |m(circuit) − m(model)| is the
            divergence itself.
        beta: β, how much of the metric a nat is worth: a larger one closes more edges. Of n edges each feels β/n, so
            take a smaller one for a smaller model. The published code has 1, for a mean over heads.
        steps: how many steps, each with new noise. The published code takes 1,300.
        rate: Adam's learning rate, of the log-odds of λ, which begin at 5.
        examples: how many prompts a step has.
        heads: as in `attribute`.
        seed: of the noise and the order of prompts.
        memory: what learning may take besides the model and the data, in bytes or as "8GiB"; by default half of what is
            free. A step's prompts run in as many passes as fit into it.
        progress: called with (steps done, steps in all); True shows a bar.
        checkpoint: as in `attribute`; written after a step.

    Returns:
        EdgeScores whose values are the weights λ, 0 to 1; 1 is an edge that carries what it does in the model.

    Raises:
        InputError: a single prompt, numbers out of range, or anything that `attribute` refuses.

    Example:
        >>> weights = eap.ibcircuit(model, data, "kl_divergence", steps=10)
        >>> circuit = weights.select(20, how="greedy")
    """
    call = called(ibcircuit, locals())
    asked = _Asked(
        number("beta", beta, "a number of at least 0", 0, 1e308),
        whole("steps", steps, 1),
        number("rate", rate, "a positive number", 5e-324, 1e308),
        whole("examples", examples, 1),
        whole("seed", seed, 0, SEEDS[1]),
    )
    one_of("heads", heads, ("kv", "query"))
    progress = watched(progress)
    request = prepare(model, data, metric, "mean-positional", reuse_prefix=False, memory=memory)
    check_gradient(request)
    if len(data) < 2:
        raise expected("data", "at least 2 prompts, as noise has their mean and variance", len(data))
    graph = request.arch.graph(heads)
    info = {
        **origin(request, call, graph, "ibcircuit", request.arch.accumulate),
        "additive": False,
        "ablation": "noise",
        "learning": asdict(asked),
    }
    settings = partial(settings_of, request, call="ibcircuit", heads=heads, **asdict(asked))
    with opened(checkpoint, request.arch.model, settings) as kept, borrowed(request.arch.model):
        request = request.verified(heads).with_constants()
        log_odds = _learn(request, graph, asked, kept, progress)
    values = torch.zeros(graph.edge_mask.shape, dtype=torch.float32)
    values[graph.edge_mask] = log_odds.sigmoid()
    return EdgeScores(graph, values, info)


def information(log_odds: Tensor) -> Tensor:
    """What an edge of weight λ lets through, by the log-odds of λ: nats for each feature, λ² − λ − log(1 − λ).

    This is the mean over prompts of KL(N(λc + (1 − λ)μ, (1 − λ)²σ²) ‖ N(μ, σ²)), as μ and σ² are c's mean and variance.
    """
    weight = log_odds.sigmoid()
    return weight.square() - weight + softplus(log_odds)


def draw_noise(means: Constants, spread: Constants, generator: torch.Generator) -> Constants:
    """What every sender writes in place of its contribution: one draw for all prompts, at each position."""
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x) for x in means.tensors]
    every = zip(means.tensors, spread.tensors, drawn, strict=True)
    return Constants.of_tensors([mean + deviation * x for mean, deviation, x in every])


def _learn(request: Request, graph: Graph, asked: _Asked, checkpoint: Checkpoint, progress: Progress | None) -> Tensor:
    """The log-odds of the edges' weights, [n]."""
    means = request.constants
    assert means is not None
    spread = deviations(request.arch, request.batches(TOKENS_PER_BATCH), means)
    start = torch.full((graph.n_edges,), BEGINNING, dtype=torch.float32)
    descent = Descent(request, graph, start, start.sigmoid(), asked.examples, asked.seed, checkpoint)
    for _ in descent.steps(asked.steps, progress):
        noise = draw_noise(means, spread, descent.generator(asked.seed))
        weights, passed = descent.places.sigmoid(), asked.beta * information(descent.places).mean()
        slope = descent.slope(weights[None], ablated=noise)[0]
        (slope,) = torch.autograd.grad([weights, passed], descent.places, [slope, None])
        descent.move(slope, asked.rate, _FLOOR)
    return descent.places.detach()
