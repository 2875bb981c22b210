"""Masked read in plain PyTorch: one matrix product over the senders that any receiver keeps."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of delta that are copied at once where a copy is needed (unread senders, low precision): what a CPU's cache
# holds, or what a GPU has room for.
_CHUNK, _CHUNK_ON_DEVICE = 1 << 20, 1 << 28


def masked_read(base: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
    """y[v] = base[v] + sum_u mask[u, v] * delta[u], in delta's dtype.

    base [N, D] or [R, N, D], delta [S, N, D], mask [S, R] bool or floating -> [R, N, D]. Senders that no
    receiver keeps are not read: their delta may hold anything.

    With a leading dimension of circuits on all three, [C, R, N, D]: one product, in which every sender is read.
    """
    wide = torch.float64 if delta.dtype == torch.float64 else torch.float32
    if delta.dim() == 4:
        return _grouped(base, delta, mask, wide)
    read = (mask != 0).any(1)
    _, tokens, features = delta.shape
    rows = None
    if delta.is_cpu:
        rows = None if bool(read.all()) else read.nonzero().flatten()
    weights = (mask if rows is None else mask[rows]).T.to(wide)  # [R, senders]
    y = delta.new_empty((weights.shape[0], tokens, features))
    step = max(1, (_CHUNK if delta.is_cpu else _CHUNK_ON_DEVICE) // max(1, weights.shape[1] * features))
    if delta.is_cpu and rows is None and delta.dtype == wide:
        step = max(1, tokens)
    for a in range(0, tokens, step):
        part = delta[:, a : a + step]
        if rows is not None:
            part = part.index_select(0, rows)
        elif not delta.is_cpu:
            # To ask which senders are read would wait for the device.
            part = part.masked_fill(~read[:, None, None], 0)
        product = (weights @ part.to(wide).flatten(1)).unflatten(1, (part.shape[1], features))  # [R, n, D]
        y[:, a : a + step] = product.add_(base[..., a : a + step, :])
    return y


def _grouped(base: Tensor, delta: Tensor, mask: Tensor, wide: torch.dtype) -> Tensor:
    y = torch.baddbmm(base.to(wide).flatten(2), mask.mT.to(wide), delta.to(wide).flatten(2))
    return y.view(base.shape).to(delta.dtype)
