"""What a plan says, and how long a run of it may take."""

from __future__ import annotations

from dataclasses import dataclass

from ...adapters import Architecture, receiver_sites
from ...budget import Rates, numbers_per_token
from ...errors import expected
from ...forward import Batch
from ..spec import AttributionRequest

# For each token a pass keeps about this many numbers for the backward for every weight, divided by the width.
_NUMBERS_PER_WEIGHT = 2


@dataclass(frozen=True)
class Plan:
    """How a gradient method runs.

    Args:
        tokens: the most tokens in a pass with gradients.
        batches: (examples, suffix tokens, path points per pass) of each batch.
        bytes: the most memory that tensors will take besides the model's weights and the data; an allocator may hold
            on to more, which tensors have given back.
        budget: the most they may take.
        device: the kind of device that the plan is for, "cpu" or "cuda".
        gpus: how many GPUs share the weights and the work. What a single one would hold of `bytes` is not taken apart:
            each holds at most all of it.
        weights: bytes of the model's weights, all GPUs together.
        passes, contraction: floating-point operations of the model's own passes (matrix products and attention), and
            of the products of senders with receivers.
        rates: operations a second of one GPU that the time is estimated with, of the two; None where none is known.
        seconds: the estimate, if all GPUs compute all the time.
    """

    tokens: int
    batches: tuple[tuple[int, int, int], ...]
    bytes: int
    budget: int
    device: str = "cpu"
    gpus: int = 1
    weights: int = 0
    passes: int = 0
    contraction: int = 0
    rates: Rates | None = None
    seconds: float | None = None


def pass_bytes(request: AttributionRequest, tokens: int) -> int:
    """Roughly what a pass with gradients over this many tokens holds."""
    return _NUMBERS_PER_WEIGHT * tokens * numbers_per_token(request) * request.arch.contraction_dtype.itemsize


def expanded_bytes(request: AttributionRequest, batch: Batch) -> int:
    """The most that rows take which a GPU expands at once where a batch's senders meet receivers."""
    graph, arch = request.graph, request.arch
    rows = len(batch.rows) * (graph.n_senders + graph.n_receivers)
    return min(request.workspace or 0, rows * arch.width * arch.contraction_dtype.itemsize)


def weight_bytes(request: AttributionRequest) -> int:
    """Of all of the model's parameters and buffers; tied ones count once."""
    model = request.arch.model
    found = {id(x): x.numel() * x.itemsize for each in (model.parameters(), model.buffers()) for x in each}
    return sum(found.values())


def check_divisible(arch: Architecture, ranks: int) -> None:
    """Raises InputError if tensor parallelism cannot divide the model among so many ranks."""
    name = type(arch.model).__name__
    if arch.encoder:
        raise expected(name, "whole weights of an encoder-decoder", f"parts of them on {ranks} ranks")
    # Some plans name only what gives the logits.
    if not any("*" in rule for rule in getattr(arch.model, "_tp_plan", None) or ()):
        raise expected(name, f"a tp_plan in transformers, to be divided among {ranks} ranks", "none for its layers")
    for layer in arch.layers:
        layer.check_heads(ranks)


def contraction_of(request: AttributionRequest, points: int) -> int:
    """Operations for a token of the products of senders with receivers, and with what norms read at each point."""
    graph, arch = request.graph, request.arch
    seen = {site.norm: site.reach - site.begin for site in receiver_sites(arch, graph)}
    return 2 * arch.d_model * (graph.n_edges + points * sum(seen.values()))
