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

    `embedding` is [P, D]; `written` is given for each other sender site: in place of the heads' values
    (`Layer.written`), [P, H·K], or of the MLP module's output, [P, D]. P is 1 or the number of positions.
    """

    embedding: Tensor
    written: tuple[Tensor, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """Of each of `sender_sites`."""
        return [self.embedding, *self.written]

    @classmethod
    def of_tensors(cls, tensors: Iterable[Tensor]) -> Constants:
        """The inverse of `tensors`."""
        embedding, *rest = tensors
        return cls(embedding, tuple(rest))

    def map(self, change: Callable[[Tensor], Tensor]) -> Constants:
        """The same with every tensor changed."""
        return self.of_tensors(map(change, self.tensors))

    def on(self, arch: Architecture) -> Constants:
        """The same, each tensor where its senders compute, in the dtype in which scores are accumulated."""
        devices = [arch.device, *(arch.layers[site.layer].device for site in sender_sites(arch)[1:])]
        pairs = zip(self.tensors, devices, strict=True)
        return self.of_tensors(x.to(device, arch.accumulate) for x, device in pairs)

    def __repr__(self) -> str:
        return f"Constants({len(self.written)} sites, {len(self.embedding)} position(s))"

    def replace(self, arch: Architecture, batch: Batch, hooks: Hooks) -> None:
        """Replace what heads and MLPs compute by these, in a pass over a batch without prefixes."""
        for site, constant in zip(sender_sites(arch), self.tensors, strict=True):
            hooks.on_senders(site, partial(_instead, constant, batch.at(site.stream)))
            if site.heads is not None and site.heads.post_norm is not None:
                hooks.replace_forward(site.heads.post_norm.module, partial(_without_scale, site.heads.post_norm))


def at_tokens(constant: Tensor, batch: Batch) -> Tensor:
    """A constant at the tokens of a batch without prefixes: [P, X] -> [E, T, X]."""
    examples, tokens = batch.shape
    if len(constant) > 1 and batch.host["start"].any():  # behind a cache, or behind padding, which counts as before 0
        there = batch.host["start"][:, None] + torch.arange(tokens)
        return constant[there.clamp(0, len(constant) - 1).to(constant.device)]
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
    widths = [linear_shape(site.heads.out)[1] if site.heads else arch.d_model for site in sender_sites(arch)]
    return Constants.of_tensors(torch.zeros(1, width) for width in widths).on(arch)
