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
        shifts: int64 [K, A, 2], where positions of tokens have several axes: by how much the token's own position on
            each differs from its place in the prompt, and by how much that of the text behind it does.
        stacked: [K, L, D], what each also writes behind each of the first L layers, if anything.
    """

    embeddings: Tensor
    first: int
    types: str = ""
    shifts: Tensor | None = None
    stacked: Tensor | None = None

    def to(self, device: torch.device) -> Pictures:
        """The same on a device."""
        shifts, stacked = (None if x is None else x.to(device) for x in (self.shifts, self.stacked))
        return replace(self, embeddings=self.embeddings.to(device), shifts=shifts, stacked=stacked)

    def arguments(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the model's forward gets besides the embeddings of tokens int64 [E, T]."""
        shown, given = tokens >= self.first, {}
        if self.types:
            given[self.types] = shown.long()
        if self.shifts is not None:
            place = torch.arange(tokens.shape[1], device=tokens.device)
            last = torch.where(shown, place, -1).cummax(1).values  # the picture's token at or before each
            shift = self.shifts[(tokens.gather(1, last.clamp(min=0)) - self.first).clamp(min=0)]
            shift = torch.where(shown[..., None], shift[..., 0], shift[..., 1]) * (last >= 0)[..., None]
            given["position_ids"] = (place[:, None] + shift).movedim(2, 0)
        return given

    def embed(self, tokens: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """What tokens int64 [E, T] write, [E, T, D], where `embed` says it of the model's own."""
        x = embed(tokens.clamp(max=self.first - 1))
        return self._at(tokens, self.embeddings.to(x), x)

    def behind(self, layer: int, tokens: Tensor) -> Tensor:
        """What tokens int64 [E, T] write behind one of the first layers, [E, T, D]; 0 where there is no picture."""
        assert self.stacked is not None
        own = self.stacked[:, layer]
        return self._at(tokens, own, own.new_zeros(()))

    def _at(self, tokens: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """Of tokens int64 [E, T] each picture's own [K, D], and `other` of the text."""
        return torch.where((tokens >= self.first)[..., None], own[(tokens - self.first).clamp(min=0)], other)


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
