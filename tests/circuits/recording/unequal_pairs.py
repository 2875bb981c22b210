"""Pairs of unequal lengths, one pair's prompts, and the metric that they are compared by."""

from __future__ import annotations

import torch
from torch import Tensor

import eap_circuits as eap
from eap_circuits.tasks.alignment import align

V = 59


def unequal_pairs(seed: int = 0, n: int = 7) -> eap.PairedDataset:
    """Pairs of which tokens in the middle, at an end or none at all are replaced, put in or left out."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> list[int]:
        return torch.randint(low, high, (size,), generator=generator).tolist()

    clean, corrupted = [], []
    for row in range(n):
        own = integers(0, V, integers(4, 10, 1)[0])
        start = integers(0, len(own), 1)[0]
        stop = min(len(own), start + integers(0, 3, 1)[0])
        put_in = integers(0, V, (2, 1, 0, 3)[row % 4])
        other = [*own[:start], *put_in, *own[stop:]] if row < n - 1 else own
        clean.append(own)
        corrupted.append(other or [1])
    good = torch.randint(V, (n,), generator=generator)

    def padded(rows: list[list[int]]) -> list[list[int]]:
        return [row + [0] * (max(map(len, rows)) - len(row)) for row in rows]

    return eap.PairedDataset.from_tokens(
        padded(clean),
        padded(corrupted),
        list(map(len, clean)),
        torch.stack([good, (good + 3) % V], 1),
        corrupted_lengths=list(map(len, corrupted)),
    )


def prompts(data: eap.PairedDataset, e: int) -> tuple[Tensor, Tensor, list[int]]:
    """(clean [1, n], corrupted [1, m], π) of one pair."""
    lengths = data.lengths if data.corrupted_lengths is None else data.corrupted_lengths
    clean, corrupted = data.clean[e : e + 1, : int(data.lengths[e])], data.corrupted[e : e + 1, : int(lengths[e])]
    return clean, corrupted, align(clean[0].tolist(), corrupted[0].tolist())


def difference(data: eap.PairedDataset, e: int, logits: Tensor) -> Tensor:
    return logits[0, data.answers[e, 0]] - logits[0, data.answers[e, 1]]
