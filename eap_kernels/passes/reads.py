"""All masked reads of one run, with gradients for the contributions and for the mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eap_kernels._schemas import accumulation_dtype
from eap_kernels.ops import edge_scores, masked_read


class MaskedReads:
    """The reads of a run in which senders write one after another and receivers read what is there by then.

    Each `read` is a `masked_read`: y[v] = base[v] + sum_u mask[u, v] * delta[u]. To differentiate through a stack of
    contributions that is made anew for every read, all of it would be copied each time, and as many gradients of its
    size be added up. Here a contribution is stored once. Its gradient, sum_v mask[u, v] * dL/dy[v], is one
    `masked_read` of all later receivers' gradients, and the mask's gradient is one `edge_scores` at the end of the
    backward pass. Differentiable once, in bases, contributions and mask.

    Args:
        mask: [S, R], or [C, S, R] for circuits whose contributions and reads then have a leading [C]; floating, in
            the dtype and on the device of everything that is written and read.
        tokens, features: N and D of the contributions.

    Raises:
        TypeError, ValueError: an argument does not fit.

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
        if not isinstance(mask, Tensor) or not mask.is_floating_point() or mask.dim() not in (2, 3):
            found = f"{mask.dtype} of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            _fail("a floating mask of shape [S, R] or [C, S, R]", found)
        self._stored = _Stored(mask.detach(), tokens, features)
        # What has been written so far, as autograd sees it: backward passes follow this chain from its end to the mask.
        self._written: Tensor = _begin(mask, self._stored)

    def write(self, sender: int, delta: Tensor) -> None:
        """Store the contributions of senders from this one on, [s, N, D] or [C, s, N, D]; each is written once."""
        stored = self._stored
        wanted = list(stored.delta.shape)
        wanted[-3] = delta.shape[-3] if delta.dim() == len(wanted) else 0
        if list(delta.shape) != wanted or not 0 <= sender <= stored.delta.shape[-3] - wanted[-3]:
            _fail(f"contributions within {list(stored.delta.shape)}", f"{list(delta.shape)} from sender {sender} on")
        rows = slice(sender, sender + wanted[-3])
        if any(stored.written[rows]):
            _fail("each sender to be written once", f"one of {rows.start} to {rows.stop - 1} again")
        stored.written[rows] = [True] * wanted[-3]
        self._written = _write(self._written, delta, sender, stored)

    def read(self, base: Tensor, receivers: slice, senders: slice, at: slice | Tensor | None = None) -> Tensor:
        """What receivers read of senders that have been written, [r, n, D] or [C, r, n, D].

        Args:
            base: [n, D], or one for each receiver, or for each circuit and receiver; a read's result may be the base
                of another read of the same receivers, from the senders after those.
            receivers, senders: which of the mask's columns and rows; with start and stop.
            at: which n of the N tokens; None: all.
        """
        if not all(self._stored.written[senders]):
            _fail("a read of senders that have been written", f"{senders} with {sum(self._stored.written)} of them")
        return _read(self._written, base, receivers, senders, at, self._stored)


class _Stored:
    """Contributions, and the gradients of what was read of them."""

    def __init__(self, mask: Tensor, tokens: int, features: int) -> None:
        *lead, senders, receivers = mask.shape
        self.mask = mask
        self.delta = mask.new_empty(*lead, senders, tokens, features)
        self.written = [False] * senders
        self.reach = [0] * receivers
        self._gradients: Tensor | None = None

    @property
    def gradients(self) -> Tensor:
        """Of each receiver's read, [..., R, N, D]; zero until it is known."""
        if self._gradients is None:
            *lead, _, tokens, features = self.delta.shape
            self._gradients = self.mask.new_zeros(*lead, self.mask.shape[-1], tokens, features)
        return self._gradients


def _at(x: Tensor, nodes: slice, tokens: slice | Tensor | None) -> Tensor:
    x = x[..., nodes, :, :]
    return x if tokens is None else x[..., tokens, :]


class _Begin(torch.autograd.Function):
    """mask -> nothing written yet; its backward runs after all others."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, stored: _Stored) -> Tensor:
        ctx.stored = stored
        return mask.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Any, ...]:
        stored = ctx.stored
        scores = torch.zeros_like(stored.mask, dtype=accumulation_dtype(stored.mask.dtype))
        reach = torch.tensor(stored.reach)
        kept = stored.delta, stored.gradients, scores
        for circuit in zip(*kept, strict=True) if scores.dim() == 3 else [kept]:
            delta, gradients, out = circuit
            edge_scores(delta, gradients, reach, out)
        return scores.to(stored.mask.dtype), None


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, written: Tensor, delta: Tensor, sender: int, stored: _Stored) -> Tensor:
        ctx.rows, ctx.stored = slice(sender, sender + delta.shape[-3]), stored
        stored.delta[..., ctx.rows, :, :] = delta
        return written.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_written: Tensor) -> tuple[Any, ...]:
        stored = ctx.stored
        to_delta = None
        if ctx.needs_input_grad[1]:
            gradients = stored.gradients
            nothing = gradients.new_zeros(()).expand(gradients.shape[-2:])
            to_delta = masked_read(nothing, gradients, stored.mask[..., ctx.rows, :].mT)
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
        ctx.receivers, ctx.at, ctx.stored, ctx.dims = receivers, at, stored, base.dim()
        for receiver in range(receivers.start, receivers.stop):
            stored.reach[receiver] = max(stored.reach[receiver], senders.stop)
        return masked_read(base, _at(stored.delta, senders, at), stored.mask[..., senders, receivers])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        kept = ctx.stored.gradients[..., ctx.receivers, :, :]
        kept[(...,) if ctx.at is None else (..., ctx.at, slice(None))] = gradient
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
