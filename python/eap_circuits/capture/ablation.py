"""What a sender's contribution is replaced by where an edge is ablated.

Patching takes the contribution of the corrupted run. Every other ablation takes a constant of the sender, the same for
all prompts: nothing, its mean over all tokens of some prompts, its mean at each position, or one that was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..adapters import Architecture, Layer, linear_shape
from ..tasks import PairedDataset
from .batches import Batch, make_batches
from .borrow import Hooks
from .runner import Runner

ABLATIONS = ("patching", "zero", "mean", "mean-positional", "optimal")


class _DifferentThroughout(PairedDataset):
    @cached_property
    def first_difference(self) -> Tensor:
        return torch.zeros_like(self.lengths)

    def __getitem__(self, index: Any) -> PairedDataset:
        return different_throughout(super().__getitem__(index))


def different_throughout(data: PairedDataset) -> PairedDataset:
    """The same prompts, whose activations differ from the first token on, as they do where constants replace them."""
    return _DifferentThroughout(**{field.name: getattr(data, field.name) for field in fields(data)})


@dataclass(frozen=True, eq=False)
class Constants:
    """A constant for every sender, at every position or at all of them alike.

    `embedding` is [P, D], `values` [P, H·K] and `mlps` [P, D] for each layer, P being 1 or the number of positions:
    what the token embeddings, the heads (`Layer.written`) and the MLP modules are taken to give.
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
        """Let a pass over a batch without prefixes give these for what its heads and MLPs compute."""
        for layer, values, mlp in zip(arch.layers, self.values, self.mlps, strict=True):
            hooks.on_input(layer.out, partial(_instead, values, batch))
            hooks.on_output(layer.mlp_out, partial(_instead, mlp, batch))
            if layer.post_norm is not None:
                hooks.replace_forward(layer.post_norm.module, partial(_without_scale, layer))


def at_tokens(constant: Tensor, batch: Batch) -> Tensor:
    """A constant at the tokens of a batch without prefixes: [P, X] -> [E, T, X]."""
    examples, tokens = batch.shape
    # Beyond the positions there are only tokens of a corrupted prompt that is longer than every clean one.
    position = torch.arange(tokens, device=constant.device).clamp(max=len(constant) - 1)
    return constant[position].expand(examples, tokens, -1)


def _given_written(layer: Layer, see: Callable[[Tensor], None], z: Tensor) -> None:
    see(layer.written(z))


def _instead(constant: Tensor, batch: Batch, x: Tensor) -> Tensor:
    # Models view what they are given in other shapes, and some add to it in place.
    return at_tokens(constant, batch).to(x.dtype, copy=True, memory_format=torch.contiguous_format)


def _without_scale(layer: Layer, x: Tensor) -> Tensor:
    """A norm after attention, of values that carry its scale already."""
    norm = layer.post_norm
    assert norm is not None
    y = norm.forwards(x)
    return y if norm.bias is None else y + norm.bias


def zeros(arch: Architecture) -> Constants:
    """No contribution at all."""

    shapes = [linear_shape(layer.out) for layer in arch.layers]  # (D, H·K)
    values, mlps = (tuple(torch.zeros(1, shape[side]) for shape in shapes) for side in (1, 0))
    return Constants(torch.zeros(1, arch.d_model), values, mlps).on(arch)


def find_constants(arch: Architecture, ablation: str, data: PairedDataset) -> Constants | None:
    """What the ablation puts in place of the senders' contributions; None for patching, which takes another run's.

    Args:
        data: whose clean prompts means are taken over; nobody else reads them.
    """
    if ablation == "patching":
        return None
    if ablation == "zero":
        return zeros(arch)
    batches = make_batches(different_throughout(data), None, False, arch.device)
    return means(arch, batches, int(data.lengths.max()) if ablation == "mean-positional" else None)


def means(
    arch: Architecture,
    batches: Iterable[Batch],
    positions: int | None = None,
    of: Callable[[Tensor], Tensor] = lambda x: x,
) -> Constants:
    """Means of the senders' contributions over the clean prompts' real tokens.

    Args:
        batches: of prompts that differ throughout, without prefixes.
        positions: for means at each of so many positions, over the prompts that have it.
        of: what is averaged of a contribution.
    """
    size = positions or 1
    count = torch.zeros(size, dtype=torch.float64)
    sums = zeros(arch).map(lambda x: x.cpu().double().repeat(size, 1))
    for batch in batches:
        at = batch.rows % batch.shape[1] if positions else torch.zeros_like(batch.rows)
        count += torch.bincount(at, minlength=size).cpu()

        def add(total: Tensor, x: Tensor, batch: Batch = batch, at: Tensor = at) -> None:
            (rows,) = of(batch.active(x).to(arch.accumulate))
            total += rows.new_zeros(size, rows.shape[1]).index_add_(0, at.to(rows.device), rows).cpu().double()

        def register(hooks: Hooks, add: Callable[[Tensor, Tensor], None] = add) -> None:
            for layer, values, mlp in zip(arch.layers, sums.values, sums.mlps, strict=True):
                hooks.on_input(layer.out, partial(_given_written, layer, partial(add, values)))
                hooks.on_output(layer.mlp_out, partial(add, mlp))

        runner = Runner(arch, arch.graph("kv"), batch, every_mlp=True)
        embeddings = runner.embed(batch.clean)
        add(sums.embedding, embeddings)
        with torch.no_grad():
            runner.logits(embeddings, register)
    return sums.map(lambda x: x / count[:, None]).on(arch)
