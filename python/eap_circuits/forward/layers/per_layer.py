"""Per-layer embeddings: what layers read of the tokens themselves, beside the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...adapters import Architecture
from ..hooks import Hooks


def hold_per_layer(arch: Architecture, tokens: Tensor, hooks: Hooks) -> dict[str, Any]:
    """Let layers read the per-layer embeddings of these tokens, int64 [rows, T], whatever embeddings the pass has.

    A row's are its own prompt's, in circuits and at points of a path, too: what they do is of the nodes `p{l}`, and not
    of `input`. Returns what the model's forward gets for them.
    """
    assert arch.per_layer is not None
    holder, inputs = arch.per_layer
    with torch.no_grad():
        embeddings = arch.embed(tokens)
        hooks.on_input(inputs, lambda _: embeddings)
        return {"per_layer_inputs": holder.get_per_layer_inputs(tokens)}
