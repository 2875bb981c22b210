"""Pictures in prompts: each of their tokens has an id of its own, so other pictures are other tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..dataset import PairedDataset


@dataclass(frozen=True, eq=False)
class Pictures:
    """What tokens of pictures write to the residual stream.

    Args:
        embeddings: [K, D], that of each.
        first: how many token embeddings the model has: the id of the i-th is `first + i`.
        types: the argument of the model's forward that marks them with 1, if those of a picture see each other both
            ways; else "".
    """

    embeddings: Tensor
    first: int
    types: str = ""

    def to(self, device: torch.device) -> Pictures:
        """The same on a device."""
        return replace(self, embeddings=self.embeddings.to(device))

    def embed(self, tokens: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """What tokens int64 [E, T] write, [E, T, D], where `embed` says it of the model's own."""
        x = embed(tokens.clamp(max=self.first - 1))
        own = self.embeddings.to(x)[(tokens - self.first).clamp(min=0)]
        return torch.where((tokens >= self.first)[..., None], own, x)


def first_difference(data: PairedDataset) -> Tensor:
    """`PairedDataset.first_difference`. A token of a picture sees those behind it, if the model lets it."""
    differ = data.clean != data.corrupted
    position = torch.arange(differ.shape[1])
    if data.alignment is not None:
        differ = (differ | (data.alignment != position)) & (position < data.lengths[:, None])
    first = torch.where(differ.any(1), differ.int().argmax(1), data.lengths - 1)
    if data.alignment is not None:
        first = first.minimum(data.alignment.gather(1, first[:, None])[:, 0])
    if data.pictures is None or not data.pictures.types:
        return first
    text = (data.clean < data.pictures.first) & (position <= first[:, None])
    return first.minimum(torch.where(text, position, -1).amax(1) + 1)
