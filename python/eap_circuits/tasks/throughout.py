"""Prompts whose activations differ from the first token on, whatever their tokens."""

from __future__ import annotations

from dataclasses import fields
from functools import cached_property

import torch
from torch import Tensor

from .dataset import PairedDataset


class _DifferentThroughout(PairedDataset):
    @cached_property
    def first_difference(self) -> Tensor:
        return torch.zeros_like(self.lengths)


def different_throughout(data: PairedDataset) -> PairedDataset:
    """The same prompts, whose activations differ from the first token on, as they do where constants replace them, or
    where tokens see those that follow."""
    return _DifferentThroughout(**{field.name: getattr(data, field.name) for field in fields(data)})


def longest(data: PairedDataset) -> list[int]:
    """The most tokens that run of a clean prompt, and of what a decoder reads."""
    read = [] if data.decoder is None else [(data.decoder >= 0).sum(1)]
    return [int(tokens.max()) for tokens in (data.run_lengths, *read)]


def decoder_prompts(data: PairedDataset) -> PairedDataset:
    """What the decoder of an encoder-decoder reads, the same for both prompts of a pair: its activations differ, as it
    sees the encoder's. It is scored at the last token."""
    assert data.decoder is not None
    tokens, answers = data.decoder.clamp(min=0), data.answers.new_empty(len(data), 2, 0)
    return different_throughout(PairedDataset(tokens, tokens, (data.decoder >= 0).sum(1), answers))
