"""Rows of a norm's input in plain PyTorch: gathered, widened, normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from eap_kernels._schemas import accumulation_dtype


def normalise_rows(x: Tensor, eps: float, centred: bool, rows: Tensor | None, out: Tensor | None) -> Tensor:
    """r [M, n] of rows [n] of x [M, N, D], in the accumulation dtype; x̂ is written into out [M, n, D], if any."""
    y = (x if rows is None else x[:, rows]).to(accumulation_dtype(x.dtype))
    if centred:
        y = y - y.mean(-1, keepdim=True)
    r = torch.rsqrt(y.square().mean(-1) + eps)
    if out is not None:
        out.copy_(y * r[..., None])
    return r
