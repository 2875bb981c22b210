"""What circuits ask for, and the differences between their own run and the corrupted one that their receivers read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eap_kernels import MaskedReads, masked_read

from ..adapters import Architecture
from ..forward import Runner, upload
from ..graph import Graph

Places = slice | Tensor  # some of a batch's [E·T] tokens
EVERYWHERE = slice(None)


def circuits_in_group(device: torch.device, circuits: int) -> int:
    """How many of the circuits that run together are stored and read together.

    On a CPU a circuit alone stores and reads only what it needs. Elsewhere a read of all is one launch: each stores
    what any of them needs.
    """
    return 1 if device.type == "cpu" else circuits


def rows_computed(graph: Graph, masks: Sequence[Tensor], device: torch.device) -> int:
    """How many rows of tokens × features a circuit holds at most: the senders that are read, and three for each
    receiver of a layer that has to be computed. Circuits of one group hold what any of them needs."""
    asked = [asked_of(graph, mask[None]) for mask in masks]
    size = circuits_in_group(device, len(asked))
    groups = [asked[start : start + size] for start in range(0, len(asked), size)]

    def any_of(group: list[Asked], name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in group]).any(0)

    def at_once(computed: Tensor) -> int:
        ends = ((graph.receivers_at(i, "q").start, graph.receivers_at(i, "mlp").stop) for i in range(graph.n_layers))
        return max(1, *(int(computed[first:last].sum()) for first, last in ends))

    return max(3 * at_once(any_of(group, "partial")) + int(any_of(group, "stored").sum()) for group in groups)


@dataclass(frozen=True)
class Asked:
    """What masks [C, S, R] ask for, on the host; bool [C, R] or [C, S] each.

    `closed`, `whole` and `partial` receivers read the corrupted run alone, the circuit's own run alone, and have to be
    computed. `needed` senders are read by any receiver, `stored` ones by one that has to be computed.
    """

    closed: Tensor
    whole: Tensor
    partial: Tensor
    needed: Tensor
    stored: Tensor

    def __len__(self) -> int:
        return len(self.closed)

    def of(self, members: slice) -> Asked:
        """What some of the masks ask for."""
        return Asked(*(getattr(self, field.name)[members] for field in fields(self)))

    def reads_own(self, receiver: int) -> list[int]:
        """Circuits of which a receiver from this one on reads the circuit's own residual stream."""
        return numbers(self.whole[:, receiver:].any(1))


def asked_of(graph: Graph, masks: Tensor) -> Asked:
    """What masks [C, S, R] ask for."""
    kept = masks != 0
    closed = ~kept.any(1)
    whole = ((masks == 1) | ~graph.edge_mask).all(1) & ~closed
    partial = ~closed & ~whole
    stored = (kept & partial[:, None]).any(2)
    for index in range(graph.n_layers):
        # An MLP that reads the corrupted run alone gives what it gave there.
        stored[:, graph.mlp_sender(index)] &= ~closed[:, graph.receivers_at(index, "mlp")][:, 0]
    return Asked(closed, whole, partial, kept.any(2), stored)


class CircuitGroup:
    """Circuits whose differences are stored and read together: each circuit's of what any of them needs.

    Args:
        members: which of the circuits that run together.
        masks, asked: those of all circuits that run together, on the host.
    """

    def __init__(self, runner: Runner, members: slice, masks: Tensor, asked: Asked) -> None:
        self.members, self.asked, masks = members, asked.of(members), masks[members]
        self.dtype = self._dtype(runner.arch)
        stored, computed = self.asked.stored.any(0), self.asked.partial.any(0)
        self.stored = stored.tolist()  # [S]
        # How many of the senders before one are stored, and of the receivers before one computed.
        self._before, self._computed = ([0, *some.cumsum(0).tolist()] for some in (stored, computed))
        masks = masks[:, stored][:, :, computed]
        self.mask = masks.to(self.dtype)  # [C, stored, computed]
        if not torch.equal(self.mask.to(masks.dtype), masks):
            self.mask = masks.to(runner.arch.accumulate)
        self._shape = (int(stored.sum()), len(masks), runner.batch.clean.numel(), runner.arch.d_model)
        self.differences = torch.empty(0)

    @property
    def size(self) -> int:
        """How many circuits they are."""
        return len(self.mask)

    def _dtype(self, arch: Architecture) -> torch.dtype:
        """Of the differences.

        Off the CPU that of the model, to which it rounds its own residual stream in every layer: half the memory, and
        tensor cores multiply it.
        """
        return arch.accumulate if arch.device.type == "cpu" else arch.dtype

    def wanted(self, receivers: slice) -> list[int]:
        """Those of some receivers that have to be computed for any of the circuits."""
        return [receivers.start + number for number in numbers(self.asked.partial[:, receivers].any(0))]

    def allocate(self, device: torch.device) -> None:
        """Make room for the differences, cur − corr, [stored, C, N, D]."""
        self.differences = torch.empty(self._shape, dtype=self.dtype, device=device)
        (self.mask,) = upload(device, self.mask)

    def follow(self, device: torch.device) -> None:
        """What is stored goes with the run to the next of several devices: once, whatever reads it there."""
        if self.differences.device != device:
            self.differences, self.mask = self.differences.to(device), self.mask.to(device)

    def store(self, sender: int, current: Tensor, corrupted: Tensor, scale: float) -> None:
        """Keep a sender's scale · (cur − corr), [C, N, D] or one for all, and [N, D]."""
        self.follow(current.device)
        row = self.differences[self._before[sender]]
        torch.sub(current.expand_as(row), corrupted, out=row)
        if scale != 1:
            row.mul_(scale)

    def store_heads(self, sender: int, difference: Tensor, weight: Tensor) -> None:
        """Keep some heads' cur − corr, from this sender on, given in head space, [h, C·N, K], with their [h, K, D]."""
        self.follow(difference.device)
        start = self._before[sender]
        torch.bmm(difference, weight, out=self.differences[start : start + len(difference)].flatten(1, 2))

    def read(self, base: Tensor, receivers: slice, stop: int, start: int = 0, at: Places = EVERYWHERE) -> Tensor:
        """base [n, D] or [C, n, D] and what receivers keep there of the senders from start to stop, [r, C, n, D].

        Of the receivers those that are `wanted`.
        """
        self.follow(base.device)
        mask, differences = self._weights(receivers, start, stop), self.differences[self._rows(start, stop)][:, :, at]
        if self.size == 1:
            one = base if base.dim() == 2 else base[0]
            return masked_read(one, differences[:, 0], mask[0].contiguous())[:, None]
        if base.dim() == 3:
            base = base[:, None].expand(-1, mask.shape[2], -1, -1)
        return masked_read(base, differences.transpose(0, 1), mask).transpose(0, 1)

    def _rows(self, start: int, stop: int) -> slice:
        return slice(self._before[start], self._before[stop])

    def _weights(self, receivers: slice, start: int, stop: int) -> Tensor:
        columns = slice(self._computed[receivers.start], self._computed[receivers.stop])
        return self.mask[:, self._rows(start, stop), columns]


class LearningGroup(CircuitGroup):
    """Circuits with nothing written in place, so that what is read has a gradient: in what senders write, in what they
    are ablated to, and in the masks."""

    def _dtype(self, arch: Architecture) -> torch.dtype:
        return arch.accumulate

    def allocate(self, device: torch.device) -> None:
        mask = self.mask.to(device)
        self._one = self.size == 1
        self._reads = MaskedReads(mask[0] if self._one else mask, *self._shape[2:])
        self._device = device

    def store(self, sender: int, current: Tensor, corrupted: Tensor, scale: float) -> None:
        difference = ((current - corrupted) * scale).to(self._device)
        self._write(sender, difference.expand(self._shape[1:])[:, None])

    def store_heads(self, sender: int, difference: Tensor, weight: Tensor) -> None:
        written = torch.bmm(difference, weight).to(self._device)
        self._write(sender, written.unflatten(1, (self.size, -1)).transpose(0, 1))

    def _write(self, sender: int, written: Tensor) -> None:
        self._reads.write(self._before[sender], written[0] if self._one else written)

    def read(self, base: Tensor, receivers: slice, stop: int, start: int = 0, at: Places = EVERYWHERE) -> Tensor:
        columns = slice(self._computed[receivers.start], self._computed[receivers.stop])
        if base.dim() == 3:
            base = base[0] if self._one else base[:, None].expand(-1, columns.stop - columns.start, -1, -1)
        where = None if at is EVERYWHERE else at if isinstance(at, slice) else at.to(self._device)
        y = self._reads.read(base.to(self._device), columns, self._rows(start, stop), where).to(base.device)
        return y[:, None] if self._one else y.transpose(0, 1)


def numbers(chosen: Tensor) -> list[int]:
    """Where bool [n] is true."""
    return chosen.nonzero()[:, 0].tolist()
