"""Gradients in head space, summed over path points, in Triton: one program takes one token's row of one head."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of a tile of path points by features that a warp has in registers, without spilling; warps; points of a launch.
_BYTES, _WARPS, _POINTS = 2048, 8, 256


def collapse(
    gradient: Tensor,
    values: Tensor,
    r: Tensor,
    weights: Tensor,
    out: Tensor,
    coefficients: Tensor,
    features: int,
    gathered: bool,
    rows: Tensor | None,
    constant: Tensor | None,
    gain: Tensor | None,
) -> None:
    """out += sum_m w_m r_m g_m and coefficients[h, m, n] = w r <g, gain * (y - constant)> / features, in place.

    gradient g [M, N, h, K] is read at rows [n]; so is values y, unless it is `gathered`: [M, n, h, K]. r [M, n],
    weights [M], out [n, h, K], coefficients [h, M, n], constant [h, K], gain [K]. Sums are kept in out's dtype, and
    always added up in the same order. A row outside gradient gives NaN: to refuse it, the host would have to wait.
    """
    count, heads, width = out.shape
    points = len(weights)
    if points > _POINTS:
        for first in range(0, points, _POINTS):
            at = slice(first, first + _POINTS)
            parts = gradient[at], values[at], r[at], weights[at], out, coefficients[:, at]
            collapse(*parts, features, gathered, rows, constant, gain)
        return
    if points * count * heads == 0:
        return
    # Each argument takes the host about a microsecond: what is small has no strides here.
    with torch.cuda.device_of(gradient):
        _collapse[(count * heads,)](
            gradient,
            values,
            r.contiguous(),
            weights.contiguous(),
            out,
            coefficients,
            rows,
            None if constant is None else constant.contiguous(),
            None if gain is None else gain.contiguous(),
            heads,
            points,
            gradient.shape[1],
            width,
            features,
            *gradient.stride(),
            *values.stride(),
            *out.stride(),
            *coefficients.stride(),
            GATHERED=gathered,
            enable_fp_fusion=True,
            **_tile(points, width, out.element_size()),
        )


@functools.cache
def _tile(points: int, width: int, size: int) -> dict[str, int]:
    """Options of a launch, for elements of this many bytes."""
    warp, rounded = _BYTES // size, triton.next_power_of_2(points)
    columns = min(triton.next_power_of_2(max(1, width)), _WARPS * warp // rounded)
    return {"POINTS": rounded, "COLUMNS": columns, "num_warps": max(1, rounded * columns // warp)}


@triton.jit(do_not_specialize=["heads", "points", "available", "features"])
def _collapse(
    grad: tl.tensor,
    values: tl.tensor,
    r: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    coefficients: tl.tensor,
    rows: tl.tensor | None,
    constant: tl.tensor | None,
    gain: tl.tensor | None,
    heads: tl.tensor,
    points: tl.tensor,
    available: tl.tensor,
    width: tl.tensor,
    features: tl.tensor,
    grad_m: tl.tensor,
    grad_n: tl.tensor,
    grad_h: tl.tensor,
    grad_k: tl.tensor,
    values_m: tl.tensor,
    values_n: tl.tensor,
    values_h: tl.tensor,
    values_k: tl.tensor,
    out_n: tl.tensor,
    out_h: tl.tensor,
    out_k: tl.tensor,
    coefficients_h: tl.tensor,
    coefficients_m: tl.tensor,
    coefficients_n: tl.tensor,
    GATHERED: tl.constexpr,
    POINTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """One token's row of one head: its part of out, and its coefficient at every point."""
    program, count = tl.program_id(0), tl.num_programs(0) // heads
    n, h = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    row = n
    if rows is not None:
        row = tl.load(rows + n)
    exists = (row >= 0) & (row < available)
    row = tl.where(exists, row, 0)
    wide = out.dtype.element_ty
    m = tl.arange(0, POINTS).to(tl.int64)
    live = m < points
    scale = tl.load(r + m * count + n, mask=live, other=0.0).to(wide)
    scale = scale * tl.load(weights + m, mask=live, other=0.0).to(wide)
    scale = tl.where(exists, scale, float("nan"))[:, None]
    from_grad = grad + row * grad_n + h * grad_h + m[:, None] * grad_m
    from_values = values + (n if GATHERED else row) * values_n + h * values_h + m[:, None] * values_m
    to = out + n * out_n + h * out_h
    products = tl.zeros((POINTS, COLUMNS), wide)
    for start in range(0, width, COLUMNS):
        k = tl.arange(0, COLUMNS).to(tl.int64) + start
        inside = k < width
        both = live[:, None] & inside[None, :]
        g = tl.load(from_grad + k[None, :] * grad_k, mask=both, other=0.0).to(wide)
        # Outside, 0 whatever the scale is.
        g = tl.where(both, g * scale, 0.0)
        y = tl.load(from_values + k[None, :] * values_k, mask=both, other=0.0).to(wide)
        if constant is not None:
            y -= tl.load(constant + h * width + k, mask=inside, other=0.0).to(wide)[None, :]
        product = g * y
        if gain is not None:
            product *= tl.load(gain + k, mask=inside, other=0.0).to(wide)[None, :]
        products += product
        total = tl.load(to + k * out_k, mask=inside, other=0.0) + tl.sum(g, 0)
        tl.store(to + k * out_k, total, mask=inside)
    c = tl.sum(products, 1) / tl.cast(features, wide)
    at = coefficients + h * coefficients_h + m * coefficients_m + n * coefficients_n
    tl.store(at, c.to(coefficients.dtype.element_ty), mask=live)
