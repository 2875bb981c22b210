"""Constants in place of what senders contribute: one for each sender, the same for all prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..adapters import Architecture, Norm, linear_shape, sender_sites
from .batches import Batch
from .hooks import Hooks


@dataclass(frozen=True, eq=False)
class Constants:
    """A constant for every sender, at each position or the same at all of them.

    `embedding` is [P, D]; `values` [P, H·K] and `mlps` [P, D] are given for each layer. They stand for the token
    embeddings, the heads' values (`Layer.written`) and the MLP modules' output. P is 1 or the number of positions.
    """

    embedding: Tensor
    values: tuple[Tensor, ...]
    mlps: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """The embedding, then each layer's heads and MLP."""
        return [self.embedding, *(x for layer in zip(self.values, self.mlps, strict=True) for x in layer)]

    @classmethod
    def of_tensors(cls, tensors: Iterable[Tensor]) -> Constants:
        """The inverse of `tensors`."""
        embedding, *rest = tensors
        return cls(embedding, tuple(rest[::2]), tuple(rest[1::2]))

    def map(self, change: Callable[[Tensor], Tensor]) -> Constants:
        """The same with every tensor changed."""
        return self.of_tensors(map(change, self.tensors))

    def on(self, arch: Architecture) -> Constants:
        """The same, each tensor where its senders compute, in the dtype in which scores are accumulated."""
        devices = [arch.device, *(layer.device for layer in arch.layers for _ in range(2))]
        pairs = zip(self.tensors, devices, strict=True)
        return self.of_tensors(x.to(device, arch.accumulate) for x, device in pairs)

    def __repr__(self) -> str:
        return f"Constants({len(self.mlps)} layers, {len(self.embedding)} position(s))"

    def replace(self, arch: Architecture, batch: Batch, hooks: Hooks) -> None:
        """Replace what heads and MLPs compute by these, in a pass over a batch without prefixes."""
        for site, constant in zip(sender_sites(arch), self.tensors, strict=True):
            hooks.on_senders(site, partial(_instead, constant, batch))
            if site.heads is not None and site.heads.post_norm is not None:
                hooks.replace_forward(site.heads.post_norm.module, partial(_without_scale, site.heads.post_norm))


def at_tokens(constant: Tensor, batch: Batch) -> Tensor:
    """A constant at the tokens of a batch without prefixes: [P, X] -> [E, T, X]."""
    examples, tokens = batch.shape
    # Only a corrupted prompt that is longer than every clean one has tokens beyond the last position.
    position = torch.arange(tokens, device=constant.device).clamp(max=len(constant) - 1)
    return constant[position].expand(examples, tokens, -1)


def _instead(constant: Tensor, batch: Batch, x: Tensor) -> Tensor:
    # Models view what they are given in other shapes, and some add to it in place.
    return at_tokens(constant, batch).to(x.dtype, copy=True, memory_format=torch.contiguous_format)


def _without_scale(norm: Norm, x: Tensor) -> Tensor:
    """A norm after attention, applied to values that already carry its scale."""
    y = norm.forwards(x)
    return y if norm.bias is None else y + norm.bias


def zeros(arch: Architecture) -> Constants:
    """Constants of zero: no sender contributes anything."""
    shapes = [linear_shape(layer.out) for layer in arch.layers]  # (D, H·K)
    values, mlps = (tuple(torch.zeros(1, shape[side]) for shape in shapes) for side in (1, 0))
    return Constants(torch.zeros(1, arch.d_model), values, mlps).on(arch)
