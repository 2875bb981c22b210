"""Which examples run together, and what of them has to run at all.

A causal model gives the same activations to the clean and the corrupted prompt before the first token in which they
differ. With prefix reuse only the tokens from there on (the suffix) run clean, corrupted and along the path.

A corrupted prompt with another number of tokens runs as it is. Its activations are read at the positions that the clean
prompt's are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..tasks import PairedDataset
from .uploading import upload

TOKENS_PER_BATCH = 1024  # a pass this large keeps a processor busy
_PREFIX_SHARE = 4  # whole prompts run once, without gradient, so they may have this many times a pass's tokens
_PASS_OVERHEAD = 32  # this many tokens of padding cost about as much as another pass


@dataclass(frozen=True)
class Batch:
    """Examples that run together, each from its own first token to run.

    `clean`, `corrupted` int64 [E, T]: the suffixes' tokens, right padded. `start` int64 [E]: how many tokens come
    before each suffix. `prefix` int64 [U, P]: the distinct prefixes, right padded; `prefix_of` int64 [E]: which one
    each example has. `rows` int64 [n]: the tokens of [E·T] that can differ between clean and corrupted, in order.
    `scored` int64 [E]: the scored position within the suffix. `index` int64 [E]: positions in the dataset. `answers`
    and `lengths` are the dataset's. `corrupted_scored` int64 [E]: the corrupted prompt's scored position.
    `alignment` int64 [E, T]: the corrupted prompt's position that each clean one is compared with; None: the same.
    `answer_tokens` int64 [U]: the tokens that are an answer of any example, or a variant of one, in order;
    `answer_columns`: where the answers are among them, -1 as in `answers`. `variants` are the dataset's, and
    `variant_columns` likewise. `places`: the scored positions in [E·T], a slice if possible. `host`: these tensors on
    the CPU, by name, so that what depends on their values need not wait for a device.
    """

    index: Tensor
    clean: Tensor
    corrupted: Tensor
    start: Tensor
    prefix: Tensor
    prefix_of: Tensor
    rows: Tensor
    scored: Tensor
    answers: Tensor
    lengths: Tensor
    corrupted_scored: Tensor
    answer_tokens: Tensor
    answer_columns: Tensor
    places: slice | Tensor
    host: dict[str, Tensor] = field(repr=False)
    alignment: Tensor | None = None
    variants: Tensor | None = None
    variant_columns: Tensor | None = None
    _moved: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def n_examples(self) -> int:
        return len(self.index)

    @property
    def shape(self) -> tuple[int, int]:
        """(E, T) of the suffix."""
        return self.clean.shape[0], self.clean.shape[1]

    def active(self, x: Tensor) -> Tensor:
        """[m·E, T, X] of m copies of the batch -> [m, n, X] at its rows, detached."""
        by_copy, rows = self.copies(x)
        return by_copy if rows is None else by_copy[:, rows]

    def copies(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same before its rows are gathered, [m, E·T, X], and which they are: [n], or None if they are all."""
        by_copy = x.detach().reshape(-1, self.clean.numel(), x.shape[2])
        return by_copy, self.rows_on(x.device) if len(self.rows) < by_copy.shape[1] else None

    def rows_on(self, device: torch.device) -> Tensor:
        """`rows` on a device of a model that computes on several."""
        return self._on(device, self.rows)

    def places_on(self, device: torch.device) -> slice | Tensor:
        """`places`, likewise."""
        return self.places if isinstance(self.places, slice) else self._on(device, self.places)

    def _on(self, device: torch.device, index: Tensor) -> Tensor:
        if index.device == device:
            return index
        if (id(index), device) not in self._moved:
            self._moved[id(index), device] = index.to(device)
        return self._moved[id(index), device]

    def aligned(self, x: Tensor) -> Tensor:
        """Activations of the corrupted run, [E, T, X], moved to the clean positions that they are compared with."""
        if self.alignment is None:
            return x
        return x[torch.arange(len(x), device=x.device)[:, None], self._on(x.device, self.alignment)]

    def aligned_input(self, embeddings: Tensor, residual: Tensor) -> Tensor:
        """What `input` writes in the corrupted run, [E, T, D], moved likewise; `residual` is what its first layer read.

        If positions are learned, the residual stream begins with embedding plus position. If a corrupted token is
        compared with a clean one elsewhere, `input` must carry the difference of their positions too, or contributions
        would not add up.
        """
        if self.alignment is None:
            return embeddings
        position = residual.to(embeddings.device) - embeddings
        return self.aligned(embeddings) + (self.aligned(position) - position)


def make_batches(
    data: PairedDataset,
    batch_size: int | None,
    reuse_prefix: bool,
    device: torch.device,
    tokens: int = TOKENS_PER_BATCH,
) -> Iterator[Batch]:
    """Batches of examples with about the same number of tokens to run, and at most `tokens` in all.

    With a `batch_size`, each batch has this many examples, whatever their tokens.
    """
    first = data.first_difference
    start = first if reuse_prefix else torch.zeros_like(first)
    # The longest come first, so that memory runs out in the first batch if at all.
    lengths = data.longer_lengths
    for group in reversed(_groups((lengths - start).tolist(), lengths.tolist())):
        longest, suffix = int(lengths[group].max()), int((lengths - start)[group].max())
        fitting = min(tokens // suffix, _PREFIX_SHARE * tokens // longest)
        for index in torch.tensor(group).split(batch_size or max(1, fitting)):
            yield _batch(data, index, first[index], start[index], device)


def halves(data: PairedDataset, batch: Batch) -> list[Batch]:
    """The batch's examples as two batches."""
    return [some_of(data, batch, which) for which in torch.arange(batch.n_examples).chunk(2)]


def some_of(data: PairedDataset, batch: Batch, which: Tensor) -> Batch:
    """Some of the batch's examples, by their places in it."""
    index = batch.index[which]
    return _batch(data, index, data.first_difference[index], batch.host["start"][which], batch.clean.device)


def _groups(tokens: list[int], lengths: list[int]) -> list[list[int]]:
    """Examples by the number of tokens to run; similar numbers go together if padding costs less than a pass."""
    alike: dict[int, list[int]] = {}
    for example in sorted(range(len(tokens)), key=lengths.__getitem__):
        alike.setdefault(tokens[example], []).append(example)
    groups: list[list[int]] = []
    least = 0
    for size, examples in sorted(alike.items()):
        if groups and len(groups[-1]) * (size - least) <= _PASS_OVERHEAD:
            groups[-1] += examples
        else:
            groups.append(examples)
        least = size
    return groups


def batch_of(data: PairedDataset, index: Tensor, reuse_prefix: bool, device: torch.device) -> Batch:
    """These examples as one batch, however many tokens each has to run."""
    first = data.first_difference[index]
    return _batch(data, index, first, first if reuse_prefix else torch.zeros_like(first), device)


def _batch(data: PairedDataset, index: Tensor, first: Tensor, start: Tensor, device: torch.device) -> Batch:
    lengths = data.lengths[index]
    offset = torch.arange(int((data.longer_lengths[index] - start).max()))
    position = start[:, None] + offset  # [E, T]
    active = (position >= first[:, None]) & (position < lengths[:, None])
    # Past the end of the longest prompt there is no token; any will do, as padding is never read.
    taken = position.clamp(max=data.clean.shape[1] - 1)
    before = torch.arange(int(start.max()))
    # −1 marks padding while distinct prefixes are found; afterwards any token will do.
    prefix = torch.where(before < start[:, None], data.clean[index][:, : len(before)], -1)
    corrupted_scored, alignment = lengths - 1 - start, None
    if data.alignment is not None and data.corrupted_lengths is not None:
        found = (data.alignment[index].gather(1, taken) - start[:, None]).clamp(min=0)
        if (found != offset)[position < lengths[:, None]].any():
            corrupted_scored, alignment = data.corrupted_lengths[index] - 1 - start, found
    if len(before):
        prefix, prefix_of = prefix.unique(dim=0, return_inverse=True)
    else:
        prefix_of = torch.arange(len(index))
    answers, scored = data.answers[index], lengths - 1 - start
    every = answers[None] if data.variants is None else torch.stack([answers, data.variants[index]])
    answer_tokens = every[every >= 0].unique()
    columns = torch.searchsorted(answer_tokens, every.clamp(min=0)).where(every >= 0, -1)
    host = {
        "clean": data.clean[index].gather(1, taken),
        "corrupted": data.corrupted[index].gather(1, taken),
        "start": start,
        "prefix": prefix.clamp(min=0),
        "prefix_of": prefix_of,
        "rows": active.flatten().nonzero()[:, 0],
        "scored": scored,
        "answers": answers,
        "answer_tokens": answer_tokens,
        "answer_columns": columns[0],
        "lengths": lengths,
        "corrupted_scored": corrupted_scored,
        "places": torch.arange(len(index)) * len(offset) + scored,
    }
    if data.variants is not None:
        host |= {"variants": every[1], "variant_columns": columns[1]}
    if alignment is not None:
        host["alignment"] = alignment
    there: dict[str, Any] = dict(zip(host, upload(device, *host.values()), strict=True))
    if (scored == scored[0]).all():
        there["places"] = slice(int(scored[0]), None, len(offset))  # picks without a copy
    return Batch(index=index, host=host, **there)
