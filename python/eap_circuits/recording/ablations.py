"""What takes the place of a sender's contribution where an edge is ablated.

Patching takes the contribution in the corrupted run. Every other ablation takes a constant of the sender, the same for
all prompts: zero, its mean over all tokens of some prompts, its mean at each position, or a vector that was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..adapters import Architecture, SenderSite, sender_sites
from ..forward import Batch, Constants, Runner, make_batches, passes_of, zeros
from ..ranks import dealt
from ..tasks import PairedDataset, different_throughout, longest
from .contributions import record_senders


def means(
    arch: Architecture,
    batches: Iterable[Batch],
    positions: int | None = None,
    around: Constants | None = None,
) -> Constants:
    """Means of the senders' contributions over the clean prompts' real tokens, by the prompts' weights.

    Args:
        batches: of prompts that differ throughout, without prefixes.
        positions: for means at each of this many positions, over the prompts that have it.
        around: for means of the squared distances from these constants, one for all positions or for each.
    """
    size = positions or 1
    sums = zeros(arch).map(lambda x: x.cpu().double().repeat(size, 1))
    sites = sender_sites(arch)
    streams = range(sites[-1].stream + 1)
    count = torch.zeros(len(streams), size, dtype=torch.float64)

    def run(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """How many tokens each stream of a batch has at each position, and each site's sums over them, by weights."""
        own = [batch.at(stream) for stream in streams]
        known = batch.host.get("pair_weights", torch.ones(batch.n_examples, dtype=torch.float64))
        weights = [known[batch.pair][each.host["rows"] // each.shape[1]] for each in own]

        def places(rows: Tensor, width: int) -> Tensor:
            return rows % width if positions else torch.zeros_like(rows)

        at = [places(each.rows, each.shape[1]) for each in own]

        def add(site: SenderSite, x: Tensor) -> Tensor:
            (rows,) = own[site.stream].active(site.written(x)).to(arch.accumulate)
            where = at[site.stream].to(rows.device)
            if around is not None:
                rows = (rows - around.tensors[site.index][where]).square()
            if batch.pair_weights is not None:
                rows = rows * weights[site.stream].to(rows)[:, None]
            return rows.new_zeros(size, rows.shape[1]).index_add_(0, where, rows).cpu()

        runner = Runner(arch, arch.graph("kv"), batch, every_mlp=True)
        embeddings = runner.embed(batch.clean)
        found = [add(sites[0], embeddings), *record_senders(sites, partial(runner.record, embeddings), add)[0]]
        counts = [
            weight.new_zeros(size).index_add_(0, places(each.host["rows"], each.shape[1]), weight)
            for each, weight in zip(own, weights, strict=True)
        ]
        return torch.stack(counts), found

    for _, (tokens, found) in dealt(batches, run, arch.team, passes_of):
        count += tokens
        for total, own in zip(sums.tensors, found, strict=True):
            total += own.double()
    # No prompt of a stream may have a position that one of the other's has.
    seen = [count[site.stream, :, None] for site in sites]
    seen = [each.where(each > 0, 1) for each in seen]
    return Constants.of_tensors(x / n for x, n in zip(sums.tensors, seen, strict=True)).on(arch)


def deviations(arch: Architecture, batches: Iterable[Batch], around: Constants) -> Constants:
    """Standard deviations of the senders' contributions around these means, at each position if the means are."""
    positions = len(around.embedding)
    return means(arch, batches, positions if positions > 1 else None, around).map(Tensor.sqrt)


def _means_over(arch: Architecture, data: PairedDataset, positional: bool = False) -> Constants:
    batches = make_batches(different_throughout(data), None, False, arch.device, even=arch.hooked)
    return means(arch, batches, max(longest(data)) if positional else None)


@dataclass(frozen=True)
class Ablation:
    """What an ablated edge carries.

    Args:
        name: what it is called.
        description: one line.
        constants: (model, prompts) -> what takes the place of each sender's contributions; None where that is no
            constant of the sender, or one that is learned for each circuit.
        from_data: made from the clean prompts of `ablation_data`.
        by_position: there is a constant for each position of those prompts.
        learned: for each circuit, when it is evaluated; edges are not scored with it.
    """

    name: str
    description: str
    constants: Callable[[Architecture, PairedDataset], Constants] | None = None
    from_data: bool = False
    by_position: bool = False
    learned: bool = False

    @property
    def patches(self) -> bool:
        """Does the edge carry the corrupted run's contribution, and no constant?"""
        return self.constants is None and not self.learned


ABLATIONS: dict[str, Ablation] = {
    ablation.name: ablation
    for ablation in (
        Ablation("patching", "what the sender contributes in the corrupted prompt's run"),
        Ablation("zero", "nothing", lambda arch, data: zeros(arch)),
        Ablation("mean", "the sender's mean over all tokens of all prompts", _means_over, from_data=True),
        Ablation(
            "mean-positional",
            "its mean at the same position, over the prompts that have it",
            partial(_means_over, positional=True),
            from_data=True,
            by_position=True,
        ),
        Ablation("optimal", "learned for each circuit; slow, only to evaluate", from_data=True, learned=True),
    )
}


def ablation_of(given: str | Constants) -> Ablation:
    """A name's entry; constants of one's own are an ablation, too."""
    if isinstance(given, Constants):
        return Ablation("constants", "constants that were given", lambda arch, data: given.on(arch))
    return ABLATIONS[given]
