"""Runs of encoder-decoders, whose two residual streams begin with what their first layers read.

So whatever a model makes of token embeddings (factors, positions, a norm) is part of `input`.
"""

from __future__ import annotations

from torch import Tensor

from ...adapters import Architecture
from ..batches import Batch
from ..hooks import Hooks


def two_sides(batch: Batch, tokens: Tensor) -> dict[str, Tensor]:
    """What the model's forward gets, for copies of the batch with these tokens of the encoder, int64 [m·E, T]."""
    return {"input_ids": tokens, "decoder_input_ids": batch.end.clean.repeat(len(tokens) // batch.n_rows, 1)}


def begin_streams(arch: Architecture, embeddings: Tensor, hooks: Hooks) -> None:
    """Let the encoder's stream begin with these, [m·E, T, D], and the decoder's take a gradient where they do."""
    encoder, decoder = (arch.layers[index].module for index in (0, arch.encoder))
    hooks.on_input(encoder, lambda _: embeddings)
    hooks.on_input(decoder, lambda x: x.detach().requires_grad_(embeddings.requires_grad))
