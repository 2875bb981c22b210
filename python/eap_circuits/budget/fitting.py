"""How many tokens a pass may have within a budget of bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..forward import TOKENS_PER_BATCH, Batch, make_batches
from ..ranks import count, least_share, rank
from ..request import Request
from ..tasks import PairedDataset
from .memory import SHARE_OF_FREE, PeakBytes, device_name, free_bytes

# Below this share of a user's budget a rough estimate is enough. The default leaves the other half of what is free.
_NEGLIGIBLE = 0.25
_FUSED = ("sdpa", "flash_attention_2", "flash_attention_3")
Measured = Callable[[Batch, int], object]  # runs a batch with this many copies of it in a pass


def budget(request: Request) -> int:
    """The bytes that a user's `memory=` allows; by default half of what is free. Of several ranks, the least."""
    if request.memory is not None:
        return least_share("memory", {f"rank {rank()}": request.memory})
    # With several devices, each holds the tensors of its layers; the one with the least room decides.
    name = device_name if count() > 1 else str
    free = {name(device): free_bytes(device) for device in request.arch.devices}
    return int(SHARE_OF_FREE * least_share("free", free))


def numbers_per_token(request: Request) -> int:
    """Roughly how many numbers all layers output for a token: the number of weights divided by the width.

    Attention that is not fused adds its weights over all earlier tokens, before and after the softmax.
    """
    arch, model = request.arch, request.arch.model
    outputs = sum(p.numel() for p in model.parameters()) // arch.d_model
    if getattr(model.config, "_attn_implementation", None) in _FUSED:
        return outputs
    return outputs + 2 * int(request.data.longer_lengths.max()) * sum(layer.n_heads for layer in arch.layers)


def tokens_in_all(request: Request, copies: int) -> int:
    """How many tokens a pass has with this many copies of all examples, each as long as the longest."""
    data = request.data
    first = data.first_needed if request.reuse_prefix else 0
    return len(data.rows.pair) * int((data.longer_lengths - first).max()) * copies


def bytes_without_gradient(request: Request, kept: int, at_once: int, more: int = 0) -> int:
    """A rough estimate for a no-grad run that records `kept` tokens, then passes of `at_once` that store nothing.

    `more` is how many further numbers the passes need for each of their tokens.
    """
    layers, every = len(request.arch.layers), numbers_per_token(request)
    # The dtype of activations, and on a GPU of what circuits differ in.
    return request.arch.contraction_dtype.itemsize * (2 * kept * every + at_once * (4 * every // layers + more))


def tokens_within(
    request: Request,
    most: int,
    rough: int,
    cost: Callable[[Batch], Cost],
    per_batch: int = TOKENS_PER_BATCH,
    beside: int = 0,
    together: int = 1,
    copies: int | None = None,
) -> int:
    """How many tokens a pass may have within the budget, at most `most`; a batch has at most `per_batch`, and no more
    than `together` copies of it need. A pass has at most the data's examples, and at most `copies` of each.

    The memory is measured on one and two examples, but only if the `rough` estimate comes near the budget. `beside` is
    how many bytes are taken by something else throughout.
    """
    allowed = budget(request) - beside
    if rough <= allowed * (1 if request.memory is None else _NEGLIGIBLE):
        return most
    batch = next(request.batches(min(most, per_batch)))
    measured, suffix = cost(batch), batch.example_tokens
    tokens = most
    while tokens > suffix:
        examples = request.batch_size or max(1, min(tokens // together, per_batch) // suffix)
        examples = min(examples, len(request.data))
        side_by_side = max(1, tokens // (examples * suffix))
        if measured.bytes(examples, min(side_by_side, copies or side_by_side)) <= allowed:
            break
        tokens //= 2
    return max(tokens, suffix)


@dataclass(frozen=True)
class Cost:
    """The bytes that a batch takes, measured on its longest example, and its floating-point operations.

    Each phase, (fixed, per example, per copy of an example), is linear in examples and in examples × copies (points,
    circuits, edges); so are the operations of all phases together.
    """

    phases: tuple[tuple[int, int, int], ...]
    work: tuple[int, int, int] = (0, 0, 0)

    def operations(self, examples: int, copies: int) -> int:
        fixed, per_example, per_copy = self.work
        return fixed + examples * (per_example + copies * per_copy)

    def scaled(self, share: float) -> Cost:
        """Of examples with this share of the tokens."""
        *phases, work = (
            (fixed, round(share * example), round(share * copy)) for fixed, example, copy in (*self.phases, self.work)
        )
        return Cost(tuple(phases), work)

    def bytes(self, examples: int, copies: int) -> int:
        return max(fixed + examples * (per_example + copies * per_copy) for fixed, per_example, per_copy in self.phases)


def measure_cost(data: PairedDataset, batch: Batch, run: Measured, copies: bool = True) -> Cost:
    """Run one and two copies of the batch's longest example, and the latter in one and two copies of a pass."""
    start = bool(batch.start.any())

    def measured(examples: int, side_by_side: int) -> list[int]:
        few = _some(data, batch, examples, start)
        with PeakBytes() as count:
            run(few, side_by_side)
            count.lap()
        return [*count.laps, count.operations]

    ones = measured(1, 1)
    more_copies = measured(1, 2) if copies else ones
    more_examples = measured(2, 1) if batch.n_examples > 1 else more_copies
    phases = []
    for one, copied, examples in zip(ones, more_copies, more_examples, strict=True):
        per_copy = copied - one
        per_example = examples - one - per_copy
        phases.append((one - per_example - per_copy, per_example, per_copy))
    *phases, work = phases
    return Cost(tuple(phases), work)


def measured_operations(data: PairedDataset, batch: Batch, run: Callable[[Batch], object]) -> int:
    """The floating-point operations of a run of the batch's longest example."""
    few = _some(data, batch, 1, bool(batch.start.any()))
    with PeakBytes() as count:
        run(few)
    return count.operations


def _some(data: PairedDataset, batch: Batch, examples: int, reuse_prefix: bool) -> Batch:
    """A batch of copies of the batch's longest example."""
    longest = int(batch.index[data.longer_lengths[batch.index].argmax()])
    # Without variants, at which a run looks only once.
    copies = replace(data[[longest] * examples], variants=None)
    return next(make_batches(copies, examples, reuse_prefix, batch.clean.device))
