"""Blocks whose output takes the residual stream's place: to all hooks they write how they change it."""

from __future__ import annotations

from torch import Tensor

from ...adapters import Layer
from ..hooks import Hooks


class Rewriting:
    """The second block of a layer that ends in a norm of the residual stream itself.

    Of stream s such a block makes f(s), the next layer's input. It counts as an MLP that writes f(s) - s: so all that
    was written before stays in the stream, and contributions add up as elsewhere. A hook may let the block read
    something else, and may change what it writes; the stream itself passes by. In a run that starts behind the block,
    but before the norm of the next layer with which it ends, it does nothing.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._stream: Tensor | None = None
        self._read: Tensor | None = None

    def begin(self, hooks: Hooks) -> None:
        """Before any hooks on what the block reads and writes."""
        hooks.on_input(self._layer.mlp_in, self._keep_stream)
        hooks.on_output(self._layer.mlp_out, lambda y: None if self._read is None else y - self._read)

    def end(self, hooks: Hooks) -> None:
        """After all of them."""
        hooks.on_input(self._layer.mlp_in, self._keep_read)
        hooks.on_output(self._layer.mlp_out, lambda y: None if self._stream is None else y + self._stream)

    def _keep_stream(self, x: Tensor) -> None:
        self._stream = x

    def _keep_read(self, x: Tensor) -> None:
        self._read = x
