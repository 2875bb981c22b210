"""What pictures write behind the first layers, as the model's own loop over its layers adds it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ...adapters import Architecture
from ..batches import Batch
from ..hooks import Hooks
from .per_layer import of_copies


def call_stacked(arch: Architecture, hooks: Hooks) -> None:
    """Let these nodes (`Stacked`) run behind their layers; without pictures they write nothing."""
    for part in arch.stacked:
        hooks.on_output(part.module, part.mlp_in)


def show_stacked(arch: Architecture, batch: Batch, corrupted: int, alphas: Sequence[float], hooks: Hooks) -> None:
    """What they write in copies of a batch. It follows the tokens, as per-layer embeddings do (`give_per_layer`)."""
    if batch.pictures is None:
        return
    for index, part in enumerate(arch.stacked):
        shown = of_copies(batch, corrupted, alphas, partial(batch.pictures.behind, index))
        hooks.set_attribute(part.mlp_in, "shown", shown.to(part.device, arch.dtype))
