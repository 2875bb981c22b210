"""Pairs of unequal lengths, and what is compared of them."""

from __future__ import annotations

import torch
from torch import Tensor

import eap_circuits as eap
from eap_kernels import Nodes

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


def residual(nodes: Nodes) -> Tensor:
    """What senders contribute to the residual stream, [N, S, D]."""
    return nodes.values if nodes.weight is None else torch.einsum("nhk,hkd->nhd", nodes.values, nodes.weight)
