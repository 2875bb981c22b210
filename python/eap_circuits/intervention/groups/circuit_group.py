"""What circuits ask for, and the differences between their own run and the corrupted one that their receivers read."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch import Tensor

from eap_kernels import MaskedReads, masked_read

from ...adapters import Architecture
from ...forward import EVERYWHERE, Runner, upload
from ...graph import Graph

Places = slice | Tensor  # some of a batch's [E·T] tokens


@dataclass(frozen=True)
class Asked:
    """What masks [C, S, R] ask for, on the host; bool [C, R] or [C, S] each.

    `closed`, `whole` and `partial` receivers read the corrupted run alone, the circuit's own run alone, and have to be
    computed, as also those of needed nodes that the clean prompt reaches by itself. `needed` senders are read by any
    receiver, `stored` ones by one that has to be computed.
    """

    closed: Tensor
    whole: Tensor
    partial: Tensor
    needed: Tensor
    stored: Tensor

    def __len__(self) -> int:
        return len(self.closed)

    def of(self, members: slice | list[int]) -> Asked:
        """What some of the masks ask for."""
        return Asked(*(getattr(self, field.name)[members] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Asked]) -> Asked:
        """What masks ask for of which each part has some."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def reads_own(self, receiver: int) -> list[int]:
        """Circuits of which a receiver from this one on reads the circuit's own residual stream."""
        return numbers(self.whole[:, receiver:].any(1))


def together(graph: Graph, masks: Sequence[Tensor]) -> Tensor:
    """Masks of a graph on the host, [C, S, R]; of one with spans [C, P, S, R]."""
    return torch.stack([mask if graph.spans is None else graph.per_span(mask) for mask in masks]).cpu()


def asked_of(graph: Graph, masks: Tensor, at: Tensor | None = None, of_constants: bool = False) -> Asked:
    """What masks ask for, as `together` gives them: with spans, at any of them.

    The receivers of edges `at`, bool [S, R], have to be computed, whatever masks keep of them, and those of all needed
    nodes if the ablated run is one `of_constants`: what a node makes of others' constants is not its own.
    """
    kept, changed = (masks, ~masks) if masks.dtype == torch.bool else (masks != 0, masks != 1)
    changed = changed & (graph.edge_mask if graph.spans is None else graph.per_span(graph.edge_mask))
    if at is not None:
        kept, changed = kept | at, changed | at
    if graph.spans is not None:
        kept, changed, graph = _any(kept, 1), _any(changed, 1), graph.base
    closed = ~_any(kept, 1)
    whole = ~_any(changed, 1) & ~closed
    partial = ~closed & ~whole
    stored, needed = _any(kept & partial[:, None], 2), _any(kept, 2)
    for index in filter(graph.has_mlp, range(graph.n_layers)):
        sender, receiver = graph.mlp_sender(index), graph.receivers_at(index, "mlp").start
        if of_constants or graph.sources[sender]:
            partial[:, receiver] |= closed[:, receiver] & needed[:, sender]
            closed[:, receiver] &= ~needed[:, sender]
        # An MLP that reads the corrupted run alone gives what it gave there.
        stored[:, sender] &= ~closed[:, receiver]
    return Asked(closed, whole, partial, needed, stored)


def _any(flags: Tensor, dim: int) -> Tensor:
    """`flags.any(dim)`; the library's own takes ten times as long on the CPU."""
    return flags.view(torch.uint8).amax(dim).view(torch.bool)


class CircuitGroup:
    """A circuit whose differences are stored and read, or several: each one's of what any of them needs.

    Args:
        graph: the circuits'.
        members: which of the circuits that run together; `size` is their number.
        masks, asked: those of all circuits that run together, on the host.
    """

    def __init__(self, runner: Runner, graph: Graph, members: slice, masks: Tensor, asked: Asked) -> None:
        self.members, self.asked, masks = members, asked.of(members), masks[members]
        self.dtype, self.size = self._dtype(runner.arch), len(masks)
        stored, computed = self.asked.stored.any(0), self.asked.partial.any(0)
        self.stored, self.computed = stored.tolist(), computed.tolist()  # [S], [R]
        # How many of the senders before one are stored, and of the receivers before one computed.
        self._before, self._computed = ([0, *some.cumsum(0).tolist()] for some in (stored, computed))
        # Columns are picked, and bools widened, for each read: of most of a whole mask there is none.
        self.mask = masks[..., stored, :]  # [C, stored, R], or by span [C, P, stored, R]
        if masks.dtype != torch.bool:
            exact = self.mask.to(self.dtype)
            same = torch.equal(exact.to(masks.dtype), self.mask)
            self.mask = exact if same else self.mask.to(runner.arch.accumulate)
        # Of each stream the first sender, and the shape of its differences, cur − corr, [stored, C, N, D]. Of a tensor
        # parallel model, here and in what is stored and read D are only this rank's features.
        streams = [stream.senders for stream in graph.base.streams]
        self._starts = [senders.start for senders in streams]
        self._shapes = [
            (int(stored[senders].sum()), len(masks), runner.batch.at(number).clean.numel(), runner.arch.width)
            for number, senders in enumerate(streams)
        ]
        self.differences: list[Tensor] = []

    def _dtype(self, arch: Architecture) -> torch.dtype:
        """Of the differences.

        Off the CPU that of the model, to which it rounds its own residual stream in every layer: half the memory, and
        tensor cores multiply it.
        """
        return arch.accumulate if arch.device.type == "cpu" else arch.dtype

    def wanted(self, receivers: slice) -> list[int]:
        """Those of some receivers that have to be computed for any of the circuits."""
        return [number for number in range(receivers.start, receivers.stop) if self.computed[number]]

    def places(self, receivers: slice) -> slice:
        """Those of some receivers that are `wanted`, among all of the graph that are."""
        return slice(self._computed[receivers.start], self._computed[receivers.stop])

    def allocate(self, device: torch.device) -> None:
        """Make room for the differences."""
        self.differences = [torch.empty(shape, dtype=self.dtype, device=device) for shape in self._shapes]

    def release(self) -> None:
        """Hold nothing of a run any more."""
        self.differences = []

    def follow(self, stream: int, device: torch.device) -> None:
        """What is stored goes with the run to the next of several devices: once, whatever reads it there."""
        if self.differences[stream].device != device:
            self.differences[stream] = self.differences[stream].to(device)

    def _place(self, sender: int) -> tuple[int, int]:
        """A sender's stream, and how many of that stream's senders before it are stored."""
        stream = bisect(self._starts, sender) - 1
        return stream, self._before[sender] - self._before[self._starts[stream]]

    def _room(self, sender: int, device: torch.device) -> tuple[Tensor, int]:
        """The differences of a sender's stream, and where among them those from this sender on begin."""
        stream, place = self._place(sender)
        self.follow(stream, device)
        return self.differences[stream], place

    def store(self, sender: int, current: Tensor, corrupted: Tensor, scale: float) -> None:
        """Keep a sender's scale · (cur − corr), [C, N, D] or one for all, and [N, D]."""
        differences, start = self._room(sender, current.device)
        row = differences[start]
        torch.sub(current.expand_as(row), corrupted, out=row)
        if scale != 1:
            row.mul_(scale)

    def store_heads(self, sender: int, difference: Tensor, weight: Tensor) -> None:
        """Keep some heads' cur − corr, from this sender on, given in head space, [h, C·N, K], with their [h, K, D]."""
        differences, start = self._room(sender, difference.device)
        torch.bmm(difference, weight, out=differences[start : start + len(difference)].flatten(1, 2))

    def read(self, base: Tensor, receivers: slice, stop: int, start: int = 0, at: Places = EVERYWHERE) -> Tensor:
        """base [n, D] or [C, n, D] and what receivers keep there of the senders from start to stop, [r, C, n, D].

        Of the receivers those that are `wanted`; the senders are of one stream.
        """
        mask, differences = self._weights(receivers, start, stop)[0], self._stored(start, stop, base.device)[:, 0]
        return masked_read(base if base.dim() == 2 else base[0], differences[:, at], mask.contiguous())[:, None]

    def _stored(self, start: int, stop: int, device: torch.device, beyond: int = 0) -> Tensor:
        """The differences of the senders from start to stop, and so many rows behind them."""
        differences, first = self._room(start, device)
        return differences[first : first + self._before[stop] - self._before[start] + beyond]

    def _rows(self, start: int, stop: int) -> slice:
        return slice(self._before[start], self._before[stop])

    def _weights(self, receivers: slice, start: int, stop: int) -> Tensor:
        return self.mask[..., self._rows(start, stop), places_of(self.wanted(receivers))]


class SpanGroup(CircuitGroup):
    """A circuit that keeps other edges at other spans: each span's tokens are read by its own mask."""

    def __init__(self, runner: Runner, graph: Graph, members: slice, masks: Tensor, asked: Asked) -> None:
        super().__init__(runner, graph, members, masks, asked)
        self._span, self._scored = runner.batch.host["spans"].flatten(), runner.batch.host["places"]

    def read(self, base: Tensor, receivers: slice, stop: int, start: int = 0, at: Places = EVERYWHERE) -> Tensor:
        base, differences = base if base.dim() == 2 else base[0], self._stored(start, stop, base.device)[:, 0]
        masks = self._weights(receivers, start, stop)[0]  # [P, stored, computed]
        read = torch.arange(len(self._span)) if at is EVERYWHERE else self._scored  # in the order of `base`
        y = base.new_empty(masks.shape[-1], *base.shape)
        for number, mask in enumerate(masks):
            own = (self._span[read] == number).nonzero()[:, 0]
            if len(own):
                rows, tokens, weights = upload(base.device, own, read[own], mask.contiguous())
                y[:, rows] = masked_read(base[rows], differences[:, tokens], weights)
        return y[:, None]


class LearningGroup(CircuitGroup):
    """Circuits with nothing written in place, so that what is read has a gradient: in what senders write, in what they
    are ablated to, and in the masks."""

    def __init__(self, runner: Runner, graph: Graph, members: slice, masks: Tensor, asked: Asked) -> None:
        super().__init__(runner, graph, members, masks, asked)
        self._shares = runner.arch.shares

    def _dtype(self, arch: Architecture) -> torch.dtype:
        return arch.accumulate

    def allocate(self, device: torch.device) -> None:
        mask = self.mask[..., torch.tensor(self.computed)].to(device, torch.promote_types(self.mask.dtype, self.dtype))
        mask = self._shares.summed(mask)
        self._one = self.size == 1
        mask = mask[0] if self._one else mask
        ends = [self._before[start] for start in (*self._starts, len(self._before) - 1)]
        self._reads = [
            MaskedReads(mask[..., slice(*rows), :], *shape[2:])
            for rows, shape in zip(pairwise(ends), self._shapes, strict=True)
        ]
        self._device = device

    def store(self, sender: int, current: Tensor, corrupted: Tensor, scale: float) -> None:
        difference = ((current - corrupted) * scale).to(self._device)
        self._write(sender, difference.expand(self.size, -1, -1)[:, None])

    def store_heads(self, sender: int, difference: Tensor, weight: Tensor) -> None:
        written = torch.bmm(difference, weight).to(self._device)
        self._write(sender, written.unflatten(1, (self.size, -1)).transpose(0, 1))

    def _write(self, sender: int, written: Tensor) -> None:
        stream, place = self._place(sender)
        self._reads[stream].write(place, written[0] if self._one else written)

    def read(self, base: Tensor, receivers: slice, stop: int, start: int = 0, at: Places = EVERYWHERE) -> Tensor:
        columns = self.places(receivers)
        if base.dim() == 3:
            base = base[0] if self._one else base[:, None].expand(-1, columns.stop - columns.start, -1, -1)
        where = None if at is EVERYWHERE else at if isinstance(at, slice) else at.to(self._device)
        (stream, first), count = self._place(start), self._before[stop] - self._before[start]
        rows = slice(first, first + count)
        y = self._reads[stream].read(base.to(self._device), columns, rows, where).to(base.device)
        return y[:, None] if self._one else y.transpose(0, 1)


def places_of(chosen: list[int]) -> slice | list[int]:
    """As an index, which takes no copy where each follows the one before."""
    if not consecutive(chosen):
        return chosen
    start = chosen[0] if chosen else 0
    return slice(start, start + len(chosen))


def consecutive(chosen: list[int]) -> bool:
    """Does each follow the one before?"""
    return not chosen or chosen == list(range(chosen[0], chosen[0] + len(chosen)))


def numbers(chosen: Tensor) -> list[int]:
    """Where bool [n] is true."""
    return chosen.nonzero()[:, 0].tolist()
