"""Layers that scale the residual stream at their end: to all hooks norms read it as if it was never scaled."""

from __future__ import annotations

from torch import Tensor

from ...adapters import Norm
from ..hooks import Hooks


class Rescaling:
    """A norm, or another reader, of a residual stream that is `Norm.unit` times the sum of what senders contribute.

    So contributions add up at every reader, whatever scales the stream between: no node is needed for that.
    """

    def __init__(self, norm: Norm) -> None:
        self._norm = norm
        self._given: tuple[Tensor, Tensor] | None = None

    def begin(self, hooks: Hooks) -> None:
        """Before any hooks on what the norm reads."""
        hooks.on_input(self._norm.module, self._to_sum)

    def end(self, hooks: Hooks) -> None:
        """After all of them."""
        hooks.on_input(self._norm.module, self._to_stream)

    def _to_sum(self, stream: Tensor) -> Tensor:
        total = stream / self._norm.unit
        self._given = stream, total
        return total

    def _to_stream(self, total: Tensor) -> Tensor:
        assert self._given is not None
        (stream, before), self._given = self._given, None
        return stream if total is before else total * self._norm.unit  # exactly the stream where no hook changed it
