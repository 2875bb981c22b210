"""Which examples run together, and what of them has to run at all.

A causal model gives the same activations to the clean and the corrupted prompt before the first token in which they
differ. With prefix reuse only the tokens from there on (the suffix) run clean, corrupted and along the path.

A corrupted prompt with another number of tokens runs as it is. Its activations are read at the positions that the clean
prompt's are compared with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..tasks import PairedDataset, Pictures, decoder_prompts
from .replays.known import Known, known_of
from .replays.uploading import packed

TOKENS_PER_BATCH = 1024  # a pass this large keeps a processor busy
_PREFIX_SHARE = 4  # whole prompts run once, without gradient, so they may have this many times a pass's tokens
_PASS_OVERHEAD = 32  # this many tokens of padding cost about as much as another pass
_ANSWERS = 64  # on a GPU answers are padded to a multiple of it, so that shapes are alike and matrix units full


@dataclass(frozen=True)
class Positions:
    """The scored positions of a batch, where prompts are scored at several, in the order of their rows.

    Args:
        row: int64 [n], the row of each.
        place: int64 [n], its place in [E·P], where E are the pairs and P the most positions that one of them has.
        mask: bool [E, P], which of these places are no padding.
        targets: int64 [E, P], the token that should follow, or -1.
        weights: float64 [E, P], 0 in padding.
        answer: int64 [E, P], which of its pair's answers the row brings; 0 if it brings none.
    """

    row: Tensor
    place: Tensor
    mask: Tensor
    targets: Tensor
    weights: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Batch:
    """Examples that run together, each from its own first token to run.

    `clean`, `corrupted` int64 [E, T]: the suffixes' tokens, right padded. `start` int64 [E]: how many tokens come
    before each suffix. `prefix` int64 [U, P]: the distinct prefixes, right padded; `prefix_of` int64 [E]: which one
    each example has. `rows` int64 [n]: the tokens of [E·T] that can differ between clean and corrupted, in order.
    `scored` int64 [E]: the scored position within the suffix. `index` int64 [E]: positions in the dataset. `answers`
    and `lengths` are the dataset's. `sizes` int64 [2, E]: how many tokens the clean and the corrupted prompts that run
    have. `corrupted_scored` int64 [E]: the corrupted prompt's scored position. `last` int64 [E]: the longer prompt's
    last one. `alignment` int64 [E, T]: the corrupted prompt's position that each clean one is compared with; None: the
    same. `spans` int64 [E, T]: the span of each token, the last one's for tokens in none; None if there are no spans.
    `answer_tokens` int64 [U]: the tokens that are an answer of any example, or a variant of one, in order; on a GPU the
    last one is repeated. `answer_columns`: where the answers are among them, -1 as in `answers`. `variants` are the
    dataset's, and `variant_columns` likewise. `pair_weights` [E]: how much each counts, 1 on average over the dataset;
    None: all alike. `places`: the scored positions in [E·T], a slice if possible. `host`: these tensors on the CPU, by
    name, so that what depends on their values need not wait for a device. `piece`: the device's memory in which they
    lie, uint8.

    If answers have several tokens, a pair runs in as many rows as it has answers, side by side: of all these tensors
    except `index`, `answers` and `lengths`, E is then the number of rows. `pair` int64 [E], on the CPU: whose each is.
    `positions`: None if each row is scored at one position, else where the n scored positions are.

    Of an encoder-decoder these are the encoder's prompts, and `decoder` is what the decoder reads. `pictures` are the
    dataset's.
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
    sizes: Tensor
    corrupted_scored: Tensor
    last: Tensor
    answer_tokens: Tensor
    answer_columns: Tensor
    places: slice | Tensor
    host: dict[str, Tensor] = field(repr=False)
    pair: Tensor
    positions: Positions | None = None
    alignment: Tensor | None = None
    spans: Tensor | None = None
    variants: Tensor | None = None
    variant_columns: Tensor | None = None
    pair_weights: Tensor | None = None
    piece: Tensor | None = field(default=None, repr=False)
    decoder: Batch | None = None
    pictures: Pictures | None = None
    _moved: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    @property
    def n_examples(self) -> int:
        return len(self.index)

    @property
    def n_rows(self) -> int:
        return len(self.clean)

    @property
    def end(self) -> Batch:
        """The tokens that logits are made of: the decoder's, if there is one."""
        return self if self.decoder is None else self.decoder

    def at(self, stream: int) -> Batch:
        """The tokens of one of the graph's streams."""
        return self.end if stream else self

    @property
    def shape(self) -> tuple[int, int]:
        """(E, T) of the suffix."""
        return self.clean.shape[0], self.clean.shape[1]

    @property
    def example_tokens(self) -> int:
        """How many tokens run for an example."""
        return -(-self.clean.numel() // self.n_examples)

    @property
    def n_positions(self) -> int:
        """At how many positions an example is scored, at most."""
        return 1 if self.positions is None else self.positions.mask.shape[1]

    @cached_property
    def known(self) -> Known:
        """What the host has to know of its values, whatever pass runs."""
        return known_of(self.host)

    def real_tokens(self, copies: int, corrupted: int) -> Tensor | None:
        """int64 [m·E, T]: 1 for tokens of m copies, the first of them corrupted, 0 for padding; None: there is none."""
        tokens = self.clean.shape[1]
        if not self.known.padded:
            return None
        clean, other = self.sizes
        each = torch.cat([other.repeat(corrupted), clean.repeat(copies - corrupted)])
        return (torch.arange(tokens, device=each.device) < each[:, None]).long()

    def picture_arguments(self, copies: int, corrupted: int) -> dict[str, Tensor]:
        """What the model's forward gets for pictures in m copies, the first of them corrupted, if there are any."""
        if self.pictures is None:
            return {}
        tokens = torch.cat([self.corrupted.repeat(corrupted, 1), self.clean.repeat(copies - corrupted, 1)])
        return self.pictures.arguments(tokens)

    def scored_rows(self, copies: int) -> Tensor:
        """The row of each scored position of m copies of the batch, int64."""
        if self.positions is None:
            return torch.arange(copies * self.n_rows, device=self.scored.device)
        first = torch.arange(copies, device=self.scored.device)[:, None] * self.n_rows
        return (first + self.positions.row).flatten()

    def by_example(self, logits: Tensor) -> Tensor:
        """Logits of the scored positions of m copies, [m·n, V] -> [m·E, P, V], 0 in padding; of one position [E, V]."""
        if self.positions is None:
            return logits
        place, mask = self.positions.place, self.positions.mask
        by_copy = logits.unflatten(0, (-1, len(place)))
        if len(place) < mask.numel():
            by_copy = by_copy.new_zeros(len(by_copy), mask.numel(), logits.shape[1]).index_copy(1, place, by_copy)
        return by_copy.reshape(-1, mask.shape[1], logits.shape[1])

    def active(self, x: Tensor) -> Tensor:
        """[m·E, T, X] of m copies of the batch -> [m, n, X] at its rows, detached."""
        by_copy, rows = self.copies(x)
        return by_copy if rows is None else by_copy[:, rows]

    def copies(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same before its rows are gathered, [m, E·T, X], and which they are: [n], or None if they are all."""
        by_copy = x.detach().reshape(-1, self.clean.numel(), x.shape[2])
        return by_copy, self.rows_on(x.device) if self.rows.shape[0] < by_copy.shape[1] else None

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
    even: bool = False,
) -> Iterator[Batch]:
    """Batches of examples with about the same number of tokens to run, or `even`, exactly as many on either side;
    at most `tokens` in all.

    With a `batch_size`, each batch has this many examples, whatever their tokens.
    """
    start = data.first_needed if reuse_prefix else torch.zeros_like(data.lengths)
    rows = data.rows.pair.bincount() if data.rows.answer is not None else torch.ones_like(start)
    # The longest come first, so that memory runs out in the first batch if at all.
    lengths = data.longer_lengths
    alike = lengths - start
    if even and data.decoder is not None:
        read = (data.decoder >= 0).sum(1)
        alike = alike * (1 + read.max()) + read
    for group in reversed(_groups(alike.tolist(), lengths.tolist(), 0 if even else _PASS_OVERHEAD)):
        longest, suffix = int(lengths[group].max()), int((lengths - start)[group].max())
        fitting = min(tokens // suffix, _PREFIX_SHARE * tokens // longest) // int(rows[group].max())
        for index in torch.tensor(group).split(batch_size or max(1, fitting)):
            yield batch_of(data, index, reuse_prefix, device)


def halves(data: PairedDataset, batch: Batch) -> list[Batch]:
    """The batch's examples as two batches."""
    return [some_of(data, batch, which) for which in torch.arange(batch.n_examples).chunk(2)]


def some_of(data: PairedDataset, batch: Batch, which: Tensor) -> Batch:
    """Some of the batch's examples, by their places in it."""
    return batch_of(data, batch.index[which], bool(batch.host["start"].any()), batch.clean.device)


def _groups(tokens: list[int], lengths: list[int], overhead: int) -> list[list[int]]:
    """Examples by the number of tokens to run; similar numbers go together if there is no more padding than a pass
    costs."""
    alike: dict[int, list[int]] = {}
    for example in sorted(range(len(tokens)), key=lengths.__getitem__):
        alike.setdefault(tokens[example], []).append(example)
    groups: list[list[int]] = []
    least = 0
    for size, examples in sorted(alike.items()):
        if groups and len(groups[-1]) * (size - least) <= overhead:
            groups[-1] += examples
        else:
            groups.append(examples)
        least = size
    return groups


def batch_of(data: PairedDataset, index: Tensor, reuse_prefix: bool, device: torch.device) -> Batch:
    """These examples as one batch, however many tokens each has to run."""
    rows, pair, answer = data.rows
    chosen, own = index, torch.arange(len(index))
    if answer is not None:
        begin, end = torch.searchsorted(pair, torch.stack([index, index + 1]))
        chosen = torch.cat([torch.arange(*ends) for ends in zip(begin.tolist(), end.tolist(), strict=True)])
        own = torch.repeat_interleave(own, end - begin)
    first = data.first_difference[index][own]
    start = data.first_needed[index][own] if reuse_prefix else torch.zeros_like(first)
    lengths, longer, others = rows.lengths[chosen], rows.longer_lengths[chosen], rows.corrupted_lengths
    if int((longer - start).max()) == 1:  # a single token goes other ways in some models, without gradients
        start = (start - 1).clamp(min=0)
    offset = torch.arange(int((longer - start).max()))
    position = start[:, None] + offset  # [E, T]
    active = (position >= first[:, None]) & (position < lengths[:, None])
    # Past the end of the longest prompt there is no token; any will do, as padding is never read.
    taken = position.clamp(max=rows.clean.shape[1] - 1)
    before = torch.arange(int(start.max()))
    # −1 marks padding while distinct prefixes are found; afterwards any token will do.
    prefix = torch.where(before < start[:, None], rows.clean[chosen][:, : len(before)], -1)
    scored, where, positions = _scored(data, index, chosen, own)
    corrupted_scored, alignment = scored, None
    if rows.alignment is not None and rows.corrupted_lengths is not None:
        found = (rows.alignment[chosen].gather(1, taken) - start[:, None]).clamp(min=0)
        if (found != offset)[position < lengths[:, None]].any():
            corrupted_scored, alignment = rows.alignment[chosen][where, scored], found
    prefix_of, gpu = torch.arange(len(chosen)), device.type != "cpu"
    if len(before):
        distinct, which = prefix.unique(dim=0, return_inverse=True)
        # A few rows less are another shape, and another pass where each pair's own prefix runs with it.
        if not gpu or 2 * len(distinct) <= len(prefix):
            prefix, prefix_of = distinct, which
    answers, scored, corrupted_scored = data.answers[index], scored - start[where], corrupted_scored - start[where]
    every = answers[None] if data.variants is None else torch.stack([answers, data.variants[index]])
    answer_tokens = every[every >= 0].unique()
    if gpu:
        answer_tokens = torch.cat([answer_tokens, answer_tokens[-1:].expand(-len(answer_tokens) % _ANSWERS)])
    columns = torch.searchsorted(answer_tokens, every.clamp(min=0)).where(every >= 0, -1)
    host = {
        "clean": rows.clean[chosen].gather(1, taken),
        "corrupted": rows.corrupted[chosen].gather(1, taken),
        "start": start,
        "prefix": prefix.clamp(min=0),
        "prefix_of": prefix_of,
        "rows": active.flatten().nonzero()[:, 0],
        "scored": scored,
        "answers": answers,
        "answer_tokens": answer_tokens,
        "answer_columns": columns[0],
        "lengths": data.lengths[index],
        "sizes": torch.stack([lengths, lengths if others is None else others[chosen]]),
        "corrupted_scored": corrupted_scored,
        "last": longer - 1 - start,
        "places": where * len(offset) + scored,
    }
    if data.variants is not None:
        host |= {"variants": every[1], "variant_columns": columns[1]}
    if alignment is not None:
        host["alignment"] = alignment
    if rows.spans is not None:
        host["spans"] = rows.spans[chosen].gather(1, taken) % (len(rows.span_names) + 1)
    if data.weights is not None:
        host["pair_weights"] = data.weights[index] / data.weights.mean()
    sent, piece = packed(device, *host.values(), *positions.values())
    there: dict[str, Any] = dict(zip([*host, *positions], sent, strict=True))
    if positions:
        there["positions"] = Positions(**{name: there.pop(name) for name in positions})
    elif (scored == scored[0]).all():
        there["places"] = slice(int(scored[0]), None, len(offset))  # picks without a copy
    if data.decoder is not None:
        there["decoder"] = batch_of(decoder_prompts(data), index, False, device)
    pictures = None if data.pictures is None else data.pictures.to(device)
    return Batch(index=index, host=host, pair=own, piece=piece, pictures=pictures, **there)


def _scored(
    data: PairedDataset, index: Tensor, chosen: Tensor, pair: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(The clean prompts' scored positions int64 [n], their rows in the batch, the fields of `Positions`, if any)."""
    rows, _, answer = data.rows
    if rows.scored is None or rows.targets is None:
        return rows.lengths[chosen] - 1, torch.arange(len(chosen)), {}
    scored = rows.scored[chosen]
    where, column = (scored >= 0).nonzero().unbind(1)
    example = pair[where]  # in order
    count = example.bincount()
    place = torch.arange(len(example)) - (count.cumsum(0) - count)[example]
    shape = len(index), int(count.max())
    place += example * shape[1]
    weights = torch.ones(scored.shape, dtype=torch.float64)
    if rows.scored_weights is not None:
        weights = rows.scored_weights[chosen]
    own = torch.zeros_like(chosen) if answer is None else answer[chosen]

    def spread(values: Tensor, padding: float) -> Tensor:
        return values.new_full(shape, padding).view(-1).index_copy(0, place, values).view(shape)

    there = (where, column)
    return (
        scored[there],
        where,
        {
            "row": where,
            "place": place,
            "mask": spread(torch.ones_like(where, dtype=torch.bool), False),
            "targets": spread(rows.targets[chosen][there], -1),
            "weights": spread(weights[there], 0),
            "answer": spread(own[where], 0),
        },
    )
