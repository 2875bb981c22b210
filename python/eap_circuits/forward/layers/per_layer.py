"""Per-layer embeddings: what layers read of the tokens themselves, beside the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...adapters import Architecture
from ..batches import Batch
from ..hooks import Hooks


def give_per_layer(
    arch: Architecture, batch: Batch, corrupted: int, alphas: Sequence[float], hooks: Hooks
) -> dict[str, Any]:
    """What the model's forward gets for the per-layer embeddings of copies of a batch, whatever embeddings it gets.

    They are the corrupted prompts' in the first copies, then those of points between the corrupted prompts, 0, and the
    clean ones, 1, as these are aligned. They follow the tokens, also where an embedding moves alone or is ablated: what
    they change is of the nodes `p{l}`, not of `input`.
    """
    assert arch.per_layer is not None
    holder, inputs = arch.per_layer

    embeddings = of_copies(batch, corrupted, alphas, arch.embed)
    hooks.on_input(inputs, lambda _: embeddings)
    return {"per_layer_inputs": of_copies(batch, corrupted, alphas, lambda x: holder.get_per_layer_inputs(x))}


def of_copies(batch: Batch, corrupted: int, alphas: Sequence[float], make: Callable[[Tensor], Tensor]) -> Tensor:
    """What is made of the tokens of copies of a batch: the corrupted prompts' in the first, then points'."""
    with torch.no_grad():
        clean, other = make(batch.clean), make(batch.corrupted)
        points = [torch.lerp(batch.aligned(other), clean, alpha) for alpha in alphas]
        return torch.cat([*[other] * corrupted, *points])
