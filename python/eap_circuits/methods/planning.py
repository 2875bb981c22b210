"""How attribution will be cut into batches and passes, and the memory that it will take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How a gradient method runs.

    Args:
        tokens: the most tokens in a pass with gradients.
        batches: (examples, suffix tokens, path points per pass) of each batch.
        bytes: the most memory that tensors will take besides the model's weights and the data; an allocator may hold
            on to more, which tensors have given back.
        budget: the most they may take.
    """

    tokens: int
    batches: tuple[tuple[int, int, int], ...]
    bytes: int
    budget: int
