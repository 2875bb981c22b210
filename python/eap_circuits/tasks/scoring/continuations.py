"""Answers of several tokens: each runs behind its pair's prompt, in a row of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from ..dataset import PairedDataset


class Rows(NamedTuple):
    """The prompts that run.

    Args:
        data: them, in the order of their pairs.
        pair: int64 [R], whose they are.
        answer: int64 [R], which of the pair's 2·A answers each brings; None if no prompt brings one.
    """

    data: PairedDataset
    pair: Tensor
    answer: Tensor | None


def rows_of(data: PairedDataset) -> Rows:
    """A dataset's prompts, each continued by each of its answers but for their last tokens, which nothing reads."""
    if data.answers.dim() < 4:
        return Rows(data, torch.arange(len(data)), None)
    answers = data.answers.flatten(1, 2)  # [E, 2·A, L]
    pair, answer = (answers[..., 0] >= 0).nonzero().unbind(1)
    tokens = answers[pair, answer]  # [R, L]
    size, place = (tokens >= 0).sum(1), torch.arange(tokens.shape[1])

    def continued(ids: Tensor, lengths: Tensor, more: Tensor) -> Tensor:
        """`ids` [E, T] up to each prompt's length, then `more` [R, L]; what comes after is padding."""
        behind = torch.arange(ids.shape[1] + len(place) - 1) - lengths[pair, None]
        there = more.gather(1, behind.clamp(0, len(place) - 1))
        return torch.where(behind < 0, pad(ids, (0, len(place) - 1))[pair], there)

    lengths, others, matched = data.lengths, data.corrupted_lengths, data.alignment
    if matched is not None and others is not None:
        matched = continued(matched, lengths, others[pair, None] + place)
    return Rows(
        replace(
            data,
            clean=continued(data.clean, lengths, tokens),
            corrupted=continued(data.corrupted, lengths if others is None else others, tokens),
            lengths=lengths[pair] + size - 1,
            answers=tokens.new_empty(len(pair), 2, 0),
            prompts=None,
            corrupted_lengths=None if others is None else others[pair] + size - 1,
            alignment=matched,
            variants=None,
            scored=(lengths[pair, None] - 1 + place).masked_fill(place >= size[:, None], -1),
            targets=tokens,
            weights=None,
            spans=None if data.spans is None else continued(data.spans, lengths, torch.full_like(tokens, -1)),
        ),
        pair,
        answer,
    )
