"""Circuits that a GPU reads together: one product for all of a layer's receivers, or for those of several layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from eap_kernels import masked_read

from ...forward import EVERYWHERE, Runner
from ...graph import Graph
from .circuit_group import Asked, CircuitGroup, Places
from .grouping import sections


class SharedGroup(CircuitGroup):
    """Circuits that one product of the library reads, for all of a layer's receivers.

    What receivers read in the corrupted run is the product's last row, of weight 1. It is put where the next sender is
    stored later.

    Reads of several layers may be begun together (`begin_together`): the first reads for all of them.
    """

    def __init__(self, runner: Runner, graph: Graph, members: slice, masks: Tensor, asked: Asked) -> None:
        super().__init__(runner, graph, members, masks, asked)
        self._shapes = [(shape[0] + 1, *shape[1:]) for shape in self._shapes]
        self._beside = graph.beside is not None
        self._ready: dict[tuple[int, int], Tensor] = {}  # by the first receiver and sender: weights on a device
        # By the first receiver of a read: of one that begins others their last receiver's stop; of one that was begun
        # the first sender that it has yet to read, and its place in what was begun, [r, C, N, D].
        self._begins: dict[int, int] = {}
        self._goes_on: dict[int, tuple[int, slice]] = {}
        self._begun: Tensor | None = None

    def begin_together(self, reads: Sequence[tuple[slice, int]]) -> None:
        """Begin reads (receivers, stop) of a stream's senders together where that pays; they come in this order."""
        if self._is_wide:
            return
        sizes = [(self._before[stop], len(self.wanted(receivers))) for receivers, stop in reads]
        for section in sections(sizes, True):
            (first, stop), *later = reads[section]
            before = self.places(first).start
            for receivers, _ in later:
                place = self.places(receivers)
                self._begins[first.start] = receivers.stop
                self._goes_on[receivers.start] = stop, slice(place.start - before, place.stop - before)

    def weights(self, receivers: slice, stop: int, start: int = 0) -> Tensor:
        """What `read` multiplies, on the host: [C, rows, columns], or the mask [C, rows, r] if its dtype is wider.

        Bool, if the masks are; `ready` takes it widened.
        """
        start, _ = self._goes_on.get(receivers.start, (start, None))
        mask = self._weights(self._columns(receivers), start, stop)
        if self._is_wide:
            return mask
        # Columns of a whole number of 16 bytes, without which tensor cores multiply at a fraction of their rate.
        weights = pad(mask, (0, -mask.shape[2] % 8, 0, 1), value=1)
        weights[:, -1, len(self.wanted(receivers)) :] = 0  # what is begun gets its own row later
        return weights

    @property
    def _is_wide(self) -> bool:
        return self.mask.dtype not in (torch.bool, self.dtype)

    def _columns(self, receivers: slice) -> slice:
        """The receivers of a read, and of those that it begins."""
        return slice(receivers.start, self._begins.get(receivers.start, receivers.stop))

    @property
    def is_ready(self) -> bool:
        """Have the weights of reads been taken?"""
        return bool(self._ready)

    def ready(self, receivers: slice, start: int, weights: Tensor) -> None:
        """Take the weights of a read, where its layer computes."""
        self._ready[receivers.start, start] = weights

    def read(self, base: Tensor, receivers: slice, stop: int, start: int = 0, at: Places = EVERYWHERE) -> Tensor:
        weights, count = self._ready[receivers.start, start], len(self.wanted(receivers))
        if self._is_wide:
            delta = self._stored(start, stop, base.device)[:, :, at].transpose(0, 1)
            base = base[None, None] if base.dim() == 2 else base[:, None]
            return masked_read(base.expand(self.size, count, -1, -1), delta, weights).transpose(0, 1)
        start, place = self._goes_on.get(receivers.start, (start, None))
        delta = self._stored(start, stop, base.device, beyond=1)
        if at is not EVERYWHERE or self._beside:  # a copy, that a row which is stored already is not lost
            delta = delta[:, :, at].clone(memory_format=torch.contiguous_format)
        delta[-1].copy_(base)
        rows = delta.transpose(0, 1).flatten(2)
        # Receivers lead in memory: what projects one of them for all circuits needs no copy.
        if place is not None:
            assert self._begun is not None
            y = self._begun[place]
            y.transpose(0, 1).flatten(2).baddbmm_(weights[..., :count].mT, rows)
            if place.stop == len(self._begun):
                self._begun = None
            return y
        every = len(self.wanted(self._columns(receivers)))
        y = delta.new_empty((every, *delta.shape[1:]))
        torch.bmm(weights[..., :every].mT, rows, out=y.transpose(0, 1).flatten(2))
        if every > count:
            self._begun = y
        return y[:count]

    def release(self) -> None:
        super().release()
        self._begun = None
