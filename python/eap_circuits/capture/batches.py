"""Which examples run together, and what of them has to run at all.

A causal model gives the same activations to the clean and the corrupted prompt before the first token in which they
differ. With prefix reuse only the tokens from there on (the suffix) run clean, corrupted and along the path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tasks import PairedDataset

TOKENS_PER_BATCH = 1024  # of whole prompts; bounds memory, and a pass this large keeps a processor busy
TOKENS_PER_SMALL_PASS = 128  # fewer do not keep a processor busy
_PASS_OVERHEAD = 32  # tokens of padding that cost about as much as one pass more


@dataclass(frozen=True)
class Batch:
    """Examples that run together.

    Tokens of the suffix, right padded: `clean`, `corrupted` int64 [E, T]. `prefix` int64 [U, P]: the distinct
    prefixes; `prefix_of` int64 [E]: which one each example has. `rows` int64 [n]: the tokens of [E·T] that can
    differ between clean and corrupted, in order. `scored` int64 [E]: the scored position within the suffix.
    `index` int64 [E]: positions in the dataset. `answers`, `lengths` as in the dataset.
    """

    index: Tensor
    clean: Tensor
    corrupted: Tensor
    prefix: Tensor
    prefix_of: Tensor
    rows: Tensor
    scored: Tensor
    answers: Tensor
    lengths: Tensor

    @property
    def n_examples(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """(E, T) of the suffix."""
        return self.clean.shape[0], self.clean.shape[1]

    def steps_at_once(self, steps: int) -> int:
        """Path points per pass: as many as make it no larger than one over the whole prompts, or than a small one."""
        examples, suffix = self.shape
        tokens = max(examples * (suffix + self.prefix.shape[1]), TOKENS_PER_SMALL_PASS)
        return max(1, min(steps, tokens // (examples * suffix)))


def make_batches(
    data: PairedDataset, batch_size: int | None, reuse_prefix: bool, device: torch.device
) -> Iterator[Batch]:
    """Batches of examples that have the same, or about the same, first token to run and length."""
    first = data.first_difference
    start = first if reuse_prefix else torch.zeros_like(first)
    # From the longest down: an error for want of memory comes with the first batch.
    for group in reversed(_groups(start.tolist(), data.lengths.tolist())):
        longest = int(data.lengths[group].max())
        for index in torch.tensor(group).split(batch_size or max(1, TOKENS_PER_BATCH // longest)):
            yield _batch(data, index, first[index], int(start[index].min()), device)


def _groups(start: list[int], stop: list[int]) -> list[list[int]]:
    """Examples that run the same tokens together, neighbouring groups merged where padding costs less than a pass."""
    alike: dict[tuple[int, int], list[int]] = {}
    for example, (low, high) in enumerate(zip(start, stop, strict=True)):
        alike.setdefault((high, low), []).append(example)
    groups: list[tuple[list[int], int, int]] = []
    for (high, low), examples in sorted(alike.items()):
        if groups:
            before, least, most = groups[-1]
            apart = len(before) * (most - least) + len(examples) * (high - low)
            together = (len(before) + len(examples)) * (high - min(least, low))
            if together <= apart + _PASS_OVERHEAD:
                groups[-1] = before + examples, min(least, low), high
                continue
        groups.append((examples, low, high))
    return [examples for examples, _, _ in groups]


def _batch(data: PairedDataset, index: Tensor, first: Tensor, start: int, device: torch.device) -> Batch:
    lengths = data.lengths[index]
    end = int(lengths.max())
    position = torch.arange(start, end)
    active = (position >= first[:, None]) & (position < lengths[:, None])
    shared = data.clean[index, :start]
    if start:
        prefix, prefix_of = shared.unique(dim=0, return_inverse=True)
    else:
        prefix, prefix_of = shared, torch.arange(len(index))
    return Batch(
        index=index,
        clean=data.clean[index, start:end].to(device),
        corrupted=data.corrupted[index, start:end].to(device),
        prefix=prefix.to(device),
        prefix_of=prefix_of.to(device),
        rows=active.flatten().nonzero()[:, 0].to(device),
        scored=(lengths - 1 - start).to(device),
        answers=data.answers[index].to(device),
        lengths=lengths.to(device),
    )
