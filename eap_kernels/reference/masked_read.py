"""Masked read in plain PyTorch: one matrix product over the senders that any receiver keeps."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of delta copied at once if a copy is needed (unused senders, low precision).
_CHUNK = 1 << 20


def masked_read(base: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    """y[v] = base[v] + sum_u mask[u, v] * delta[u], in delta's dtype.

    base [N, D] or [R, N, D], delta [S, N, D], mask [S, R] bool or floating -> [R, N, D]. Senders that no
    receiver keeps are not read: their delta may hold anything.
    """
    wide = torch.float64 if delta.dtype == torch.float64 else torch.float32
    used = (mask != 0).any(1)
    rows = None if bool(used.all()) else used.nonzero().flatten()
    weights = (mask if rows is None else mask[rows]).T.to(wide)  # [R, senders]
    _, tokens, features = delta.shape
    y = delta.new_empty((weights.shape[0], tokens, features))
    whole = rows is None and delta.dtype == wide
    step = max(1, tokens if whole else _CHUNK // max(1, weights.shape[1] * features))
    for a in range(0, tokens, step):
        part = delta[:, a : a + step] if rows is None else delta[:, a : a + step].index_select(0, rows)
        read = (weights @ part.to(wide).flatten(1)).unflatten(1, (part.shape[1], features))  # [R, n, D]
        y[:, a : a + step] = read.add_(base[..., a : a + step, :])
    return y
