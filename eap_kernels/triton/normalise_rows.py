"""Rows of a norm's input in Triton: one program gathers, sums up and writes one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eap_kernels._schemas import accumulation_dtype

# Features that a program has in registers at once. It reads its row again for each pass, from the cache.
_BLOCK, _WARPS = 2048, 4


def normalise_rows(x: Tensor, eps: float, centred: bool, rows: Tensor | None, out: Tensor | None) -> Tensor:
    """r [M, n] of rows [n] of x [M, N, D], in the accumulation dtype; x̂ is written into out [M, n, D], if any.

    A row outside x gives NaN: to refuse it, the host would have to wait.
    """
    points, available, features = x.shape
    count = available if rows is None else len(rows)
    wide = accumulation_dtype(x.dtype)
    r = x.new_empty((points, count), dtype=wide)
    if r.numel() == 0:
        return r
    with torch.cuda.device_of(x):
        _normalise[(points * count,)](
            x,
            rows,
            out,
            r,
            count,
            available,
            features,
            *x.stride(),
            *((0, 0, 0) if out is None else out.stride()),
            EPS=eps,
            CENTRED=centred,
            BLOCK=min(triton.next_power_of_2(max(1, features)), _BLOCK),
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )
    return r


@triton.jit(do_not_specialize=["count", "available"])
def _normalise(
    x: tl.tensor,
    rows: tl.tensor | None,
    out: tl.tensor | None,
    r: tl.tensor,
    count: tl.tensor,
    available: tl.tensor,
    features: tl.tensor,
    x_m: tl.tensor,
    x_n: tl.tensor,
    x_d: tl.tensor,
    out_m: tl.tensor,
    out_n: tl.tensor,
    out_d: tl.tensor,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """r and x̂ of one row, in r's dtype."""
    program = tl.program_id(0)
    m, n = (program // count).to(tl.int64), (program % count).to(tl.int64)
    row = n
    if rows is not None:
        row = tl.load(rows + n)
    exists = (row >= 0) & (row < available)
    from_x = x + m * x_m + tl.where(exists, row, 0) * x_n
    wide = r.dtype.element_ty
    d = tl.arange(0, BLOCK).to(tl.int64)
    size = tl.cast(features, wide)
    mean = tl.zeros((), wide)
    if CENTRED:
        sums = tl.zeros((BLOCK,), wide)
        for start in range(0, features, BLOCK):
            sums += tl.load(from_x + (d + start) * x_d, mask=d + start < features, other=0.0).to(wide)
        mean = tl.sum(sums, 0) / size
    squares = tl.zeros((BLOCK,), wide)
    for start in range(0, features, BLOCK):
        inside = d + start < features
        y = tl.load(from_x + (d + start) * x_d, mask=inside, other=0.0).to(wide)
        y = tl.where(inside, y - mean, 0.0)
        squares += y * y
    scale = tl.rsqrt(tl.sum(squares, 0) / size + tl.full((), EPS, wide))
    scale = tl.where(exists, scale, float("nan"))
    tl.store(r + program.to(tl.int64), scale)
    if out is not None:
        to = out + m * out_m + n * out_n
        for start in range(0, features, BLOCK):
            inside = d + start < features
            y = tl.load(from_x + (d + start) * x_d, mask=inside, other=0.0).to(wide)
            tl.store(to + (d + start) * out_d, ((y - mean) * scale).to(out.dtype.element_ty), mask=inside)
