"""All masked reads of one run, with gradients for the contributions and for the mask."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from threading import Lock
from typing import Any, NoReturn

import torch
from torch import Tensor

from eap_kernels._schemas import accumulation_dtype, refuse_second_order
from eap_kernels.ops import FLOATS, edge_scores, masked_read


class MaskedReads:
    """The reads of a run in which senders write one after another and receivers read what is there by then.

    Each `read` is a `masked_read`: y[v] = base[v] + sum_u mask[u, v] * delta[u]. To differentiate through a stack of
    contributions that is made anew for every read, all of it would be copied each time, and as many gradients of its
    size be added up. Here a contribution is stored once. Its gradient, sum_v mask[u, v] * dL/dy[v], is one
    `masked_read` of the gradients of all reads of it, and the mask's gradient is one `edge_scores` at the end of the
    backward pass. Differentiable once, in bases, contributions and mask. Threads may write, read and go backward side
    by side.

    Args:
        mask: [S, R], or [C, S, R] for circuits whose contributions and reads then have a leading [C]; floating, in
            the dtype and on the device of everything that is written and read.
        tokens, features: N and D of the contributions.

    Raises:
        TypeError, ValueError: an argument does not fit.
        RuntimeError: a second-order gradient was asked for.

    Example:
        >>> import torch, eap_kernels
        >>> mask = torch.full((2, 1), 0.5, requires_grad=True)
        >>> reads = eap_kernels.MaskedReads(mask, tokens=1, features=3)
        >>> reads.write(0, torch.ones(2, 1, 3))
        >>> reads.read(torch.zeros(1, 3), slice(0, 1), slice(0, 2)).sum().backward()
        >>> mask.grad
        tensor([[3.],
                [3.]])
    """

    def __init__(self, mask: Tensor, tokens: int, features: int) -> None:
        floating = isinstance(mask, Tensor) and mask.dtype in FLOATS and mask.layout == torch.strided
        if not floating or mask.dim() not in (2, 3):
            found = f"{mask.dtype} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            _fail("a floating mask of shape [S, R] or [C, S, R]", found)
        for name, size in (("tokens", tokens), ("features", features)):
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 0:
                _fail(f"{name} to be a whole number of at least 0", repr(size))
        self._stored = _Stored(mask.detach(), tokens, features)
        # What has been written so far, as autograd sees it: backward passes follow this chain from its end to the mask.
        self._written: Tensor = _begin(mask, self._stored)

    def write(self, sender: int, delta: Tensor) -> None:
        """Store the contributions of senders from this one on, [s, N, D] or [C, s, N, D]; each is written once."""
        stored = self._stored
        if not isinstance(delta, Tensor):
            _fail("contributions as a tensor", type(delta).__name__)
        wanted = list(stored.delta.shape)
        wanted[-3] = delta.shape[-3] if delta.dim() == len(wanted) else 0
        fits = isinstance(sender, Integral) and 0 <= sender <= stored.delta.shape[-3] - wanted[-3]
        if list(delta.shape) != wanted or not fits:
            _fail(f"contributions within {list(stored.delta.shape)}", f"{list(delta.shape)} from sender {sender!r} on")
        rows = slice(sender, sender + wanted[-3])
        if delta.dtype != stored.mask.dtype or delta.device != stored.mask.device:
            _fail(f"contributions in {stored.mask.dtype} on {stored.mask.device}", f"{delta.dtype} on {delta.device}")
        with stored.lock:
            if any(stored.written[rows]):
                _fail("each sender to be written once", f"one of {rows.start} to {rows.stop - 1} again")
            self._written = _write(self._written, delta, sender, stored)
            stored.written[rows] = [True] * wanted[-3]

    def read(self, base: Tensor, receivers: slice, senders: slice, at: slice | Tensor | None = None) -> Tensor:
        """What receivers read of senders that have been written, [r, n, D] or [C, r, n, D]; as often as you like.

        Args:
            base: [n, D], or one for each receiver, or for each circuit and receiver; such as what the same receivers
                have read of other senders.
            receivers, senders: which of the mask's columns and rows; with start and stop.
            at: which n of the N tokens; None: all.
        """
        *_, n_senders, n_receivers = self._stored.mask.shape
        for name, chosen, size in (("senders", senders, n_senders), ("receivers", receivers, n_receivers)):
            plain = isinstance(chosen, slice) and chosen.indices(size) == (chosen.start, chosen.stop, 1)
            if not plain or chosen.start > chosen.stop:
                _fail(f"{name} as a slice with a start and a stop from 0 to {size}", chosen)
        if not all(self._stored.written[senders]):
            _fail("a read of senders that have been written", f"{senders} with {sum(self._stored.written)} of them")
        numbers = isinstance(at, Tensor) and at.dim() == 1 and not (at.is_floating_point() or at.is_complex())
        if not (at is None or isinstance(at, slice) or numbers):
            _fail("tokens as a slice or a tensor [n] of numbers or bools", f"{at!r:.40}")
        if not isinstance(base, Tensor):
            _fail("base as a tensor", type(base).__name__)
        return _read(self._written, base, receivers, senders, at, self._stored)


class _Stored:
    """Contributions, what was read of them, and the backward passes that run."""

    def __init__(self, mask: Tensor, tokens: int, features: int) -> None:
        *lead, senders, _ = mask.shape
        self.mask = mask
        self.delta = mask.new_empty(*lead, senders, tokens, features)
        self.written = [False] * senders
        # Of every receiver of one read after another: its column of the mask, and the senders from … to that are read.
        self.read: list[tuple[int, int, int]] = []
        self.lock = Lock()
        self._passes: dict[int, _Pass] = {}

    def note(self, receivers: slice, senders: slice) -> slice:
        """Where the gradients of a read are among those of all reads."""
        with self.lock:
            first = len(self.read)
            self.read += [(column, senders.start, senders.stop) for column in range(receivers.start, receivers.stop)]
            return slice(first, len(self.read))

    def running(self) -> _Pass:
        """The backward pass that asks; each has gradients of its own, until its end or, if it fails, the graph's."""
        refuse_second_order("MaskedReads")
        this = torch._C._current_graph_task_id()
        with self.lock:
            if this not in self._passes:
                self._passes[this] = _Pass(self)
                torch.autograd.Variable._execution_engine.queue_callback(lambda: self._passes.__delitem__(this))
            return self._passes[this]


class _Pass:
    """Gradients of all that was read by now, [..., reads, N, D]; zero where this backward pass has not come yet."""

    def __init__(self, stored: _Stored) -> None:
        *lead, _, tokens, features = stored.delta.shape
        self.gradients = stored.mask.new_zeros(*lead, len(stored.read), tokens, features)
        read = torch.tensor(stored.read, dtype=torch.int64, device="cpu").view(-1, 3).T.contiguous()
        _, self.starts, self.stops = read
        self.noted = read.to(stored.mask.device)

    def weights(self, mask: Tensor, senders: slice) -> Tensor:
        """The mask's entries with which these senders were read, [..., s, reads]; zero where they were not."""
        columns, starts, stops = self.noted
        rows = torch.arange(senders.start, senders.stop, device=mask.device)[:, None]
        return mask[..., senders, :][..., columns].where((starts <= rows) & (rows < stops), 0)


def _at(x: Tensor, nodes: slice, tokens: slice | Tensor | None) -> Tensor:
    x = x[..., nodes, :, :]
    return x if tokens is None else x[..., tokens, :]


class _Begin(torch.autograd.Function):
    """mask -> nothing written yet; its backward runs after all others."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, stored: _Stored) -> Tensor:
        ctx.save_for_backward(mask)  # only so that torch refuses one that has changed by then
        ctx.stored = stored
        return mask.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        (mask,), stored, running = ctx.saved_tensors, ctx.stored, ctx.stored.running()
        wide = accumulation_dtype(mask.dtype)
        scores = mask.new_zeros([*mask.shape[:-1], len(running.stops)], dtype=wide)
        kept = stored.delta, running.gradients, scores
        for circuit in zip(*kept, strict=True) if scores.dim() == 3 else [kept]:
            delta, gradients, out = circuit
            edge_scores(delta, gradients, running.stops, out)
        columns, starts, _ = running.noted
        if running.starts.any():
            scores.masked_fill_(torch.arange(len(stored.written), device=mask.device)[:, None] < starts, 0)
        return torch.zeros_like(mask, dtype=wide).index_add_(-1, columns, scores).to(mask.dtype), None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, written: Tensor, delta: Tensor, sender: int, stored: _Stored) -> Tensor:
        ctx.save_for_backward(stored.mask)
        ctx.rows, ctx.stored = slice(sender, sender + delta.shape[-3]), stored
        stored.delta[..., ctx.rows, :, :] = delta
        return written.clone()

    @staticmethod
    def backward(ctx: Any, to_written: Tensor) -> tuple[Any, ...]:
        (mask,), to_delta = ctx.saved_tensors, None
        if ctx.needs_input_grad[1]:
            running = ctx.stored.running()
            nothing = mask.new_zeros(()).expand(running.gradients.shape[-2:])
            to_delta = masked_read(nothing, running.gradients, running.weights(mask, ctx.rows).mT)
        return to_written, to_delta, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        written: Tensor,
        base: Tensor,
        receivers: slice,
        senders: slice,
        at: slice | Tensor | None,
        stored: _Stored,
    ) -> Tensor:
        indexed = isinstance(at, Tensor)
        ctx.save_for_backward(*[at] if indexed else [])
        ctx.at = None if indexed else at
        ctx.rows, ctx.stored, ctx.dims = stored.note(receivers, senders), stored, base.dim()
        return masked_read(base, _at(stored.delta, senders, at), stored.mask[..., senders, receivers])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        kept = ctx.stored.running().gradients[..., ctx.rows, :, :]
        if ctx.saved_tensors:  # maybe a token more than once
            tokens = torch.arange(kept.shape[-2], device=kept.device)[ctx.saved_tensors]
            kept.index_add_(-2, tokens, gradient)
        else:
            _at(kept, slice(None), ctx.at).copy_(gradient)
        to_base = None
        if ctx.needs_input_grad[1]:
            over = list(range(gradient.dim() - ctx.dims))
            to_base = gradient.sum(over) if over else gradient
        return gradient.new_zeros(()), to_base, None, None, None, None


_begin: Callable[..., Tensor] = _Begin.apply
_write: Callable[..., Tensor] = _Write.apply
_read: Callable[..., Tensor] = _Read.apply


def _fail(expected: str, got: object) -> NoReturn:
    raise ValueError(f"MaskedReads: expected {expected}, got {got}")
