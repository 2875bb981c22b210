"""Masked read in Triton: each tile of receivers multiplies the senders that any of them keeps.

The dense path uses the matrix units on those lists; the sparse path adds up each receiver's own senders. Neither
reads a sender that nobody keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eap_kernels._schemas import accumulation_dtype
from eap_kernels.reference.masked_read import parts
from eap_kernels.triton import configs
from eap_kernels.triton.configs import Tile

# The sparse path's tile: senders at once, bytes of features that one program adds up, warps.
_SENDERS, _BYTES, _WARPS = 4, 4096, 4


def masked_read(base: Tensor, delta: Tensor, mask: Tensor, tf32: bool) -> Tensor:
    """y[v] = base[v] + sum_u mask[u, v] * delta[u], in delta's dtype, rounded once.

    base [N, D] or [R, N, D], delta [S, N, D], mask [S, R] bool or floating -> [R, N, D]. Senders that no receiver
    keeps are not read; one that some receivers keep must be finite, unless the sparse path runs.
    """
    receivers, tokens, features = mask.shape[1], *delta.shape[1:]
    y = delta.new_empty((receivers, tokens, features))
    if y.numel() == 0:
        return y
    base, delta, rows = configs.one_row(base.expand_as(y), delta, y)
    weights = parts(mask, delta.dtype)
    kind = configs.kind(weights.dtype, tf32)
    tile = min(
        configs.tiles(configs.MASKED_READ, kind, base, delta, rows),
        key=lambda t: triton.cdiv(receivers, t.rows) * t.rows / t.rate,
    )
    kept = (mask != 0).T  # [R, S]
    used = torch.nn.functional.pad(kept, (0, 0, 0, -receivers % tile.rows)).unflatten(0, (-1, tile.rows)).any(1)
    edges, products = torch.stack((kept.sum(), used.sum() * tile.rows)).tolist()
    with torch.cuda.device_of(delta):
        if edges < configs.SPARSE[kind] * products:
            sparse(base, delta, mask, kept, rows)
        else:
            dense(base, delta, weights, used, rows, tile, configs.precision(kind))
    return y


def lists(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of a bool matrix [rows, S], the columns that are set.

    Returns where each row's list starts and the last one ends, [rows + 1], and the rows and the columns of all
    entries, one list after the other; int32.
    """
    row, column = rows.nonzero().int().unbind(1)
    starts = torch.nn.functional.pad(rows.sum(1).cumsum(0), (1, 0))
    return starts.int(), row.contiguous(), column.contiguous()


def dense(base: Tensor, delta: Tensor, weights: Tensor, used: Tensor, y: Tensor, tile: Tile, precision: str) -> None:
    """Writes y with the matrix units.

    base, y [R, N, D]; delta [S, N, D]; weights [1 or 3, S, R]; used bool [tiles of receivers, S].
    """
    starts, _, senders = lists(used)
    receivers, tokens, features = y.shape
    # Rows of a whole number of tiles: no remainder to mask, and aligned.
    weights = torch.nn.functional.pad(weights, (0, -receivers % tile.rows))
    blocks = triton.cdiv(features, tile.columns)
    _dense[(len(used) * tokens * blocks,)](
        base,
        delta,
        weights,
        starts,
        senders,
        y,
        len(used),
        receivers,
        features,
        blocks,
        *base.stride(),
        *delta.stride(),
        *weights.stride()[:2],
        *y.stride()[:2],
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        INNER=tile.inner,
        PARTS=len(weights),
        PRECISION=precision,
        ACCUMULATE=tl.float64 if y.dtype == torch.float64 else tl.float32,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def sparse(base: Tensor, delta: Tensor, mask: Tensor, kept: Tensor, y: Tensor) -> None:
    """Writes y; cost grows with the kept edges. base, y [R, N, D]; delta [S, N, D]; mask [S, R]; kept [R, S]."""
    starts, row, senders = lists(kept)
    receivers, tokens, features = y.shape
    wide = accumulation_dtype(y.dtype)
    at_once = _BYTES // wide.itemsize
    blocks = triton.cdiv(features, at_once)
    _sparse[(receivers * tokens * blocks,)](
        base,
        delta,
        mask[senders, row].to(wide),
        starts,
        senders,
        y,
        receivers,
        features,
        blocks,
        *base.stride(),
        *delta.stride(),
        *y.stride()[:2],
        SENDERS=_SENDERS,
        FEATURES=at_once,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["groups", "receivers", "blocks"])
def _dense(
    base: tl.tensor,
    delta: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    senders: tl.tensor,
    y: tl.tensor,
    groups: tl.tensor,
    receivers: tl.tensor,
    features: tl.tensor,
    blocks: tl.tensor,
    base_v: tl.tensor,
    base_n: tl.tensor,
    base_d: tl.tensor,
    delta_u: tl.tensor,
    delta_n: tl.tensor,
    delta_d: tl.tensor,
    weights_p: tl.tensor,
    weights_u: tl.tensor,
    y_v: tl.tensor,
    y_n: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
) -> None:
    """One tile of y: ROWS receivers x COLUMNS features of one token."""
    program = tl.program_id(0)
    # Tiles of the same features run together: they share delta in the L2 cache.
    group, block = program % groups, program // groups
    n = (block // blocks).to(tl.int64)
    d = (block % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    v = group * ROWS + tl.arange(0, ROWS)
    inside = d < features
    first = tl.load(starts + group)
    last = tl.load(starts + group + 1)
    from_delta = delta + n * delta_n + d[None, :] * delta_d
    total = tl.zeros((ROWS, COLUMNS), ACCUMULATE)
    low = tl.zeros((ROWS, COLUMNS), ACCUMULATE)
    for e in range(first, last, INNER):
        entry = e + tl.arange(0, INNER)
        live = entry < last
        u = tl.load(senders + entry, mask=live, other=0).to(tl.int64)
        weight = weights + u[None, :] * weights_u + v[:, None]
        high = tl.load(weight, mask=live[None, :], other=0.0)
        x = tl.load(from_delta + u[:, None] * delta_u, mask=live[:, None] & inside[None, :], other=0.0).to(high.dtype)
        total = tl.dot(high, x, total, input_precision=PRECISION, out_dtype=ACCUMULATE)
        for part in tl.static_range(1, PARTS):
            rest = tl.load(weight + part * tl.cast(weights_p, tl.int64), mask=live[None, :], other=0.0)
            low = tl.dot(rest, x, low, input_precision=PRECISION, out_dtype=ACCUMULATE)
    if PARTS > 1:
        # As `parts` says.
        total += tl.where(tl.abs(low) < float("inf"), low, 0.0)
    v_wide = v.to(tl.int64)[:, None]
    kept = (v < receivers)[:, None] & inside[None, :]
    total += tl.load(base + v_wide * base_v + n * base_n + d[None, :] * base_d, mask=kept, other=0.0).to(ACCUMULATE)
    tl.store(y + v_wide * y_v + n * y_n + d[None, :], total.to(y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["receivers", "blocks"])
def _sparse(
    base: tl.tensor,
    delta: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    senders: tl.tensor,
    y: tl.tensor,
    receivers: tl.tensor,
    features: tl.tensor,
    blocks: tl.tensor,
    base_v: tl.tensor,
    base_n: tl.tensor,
    base_d: tl.tensor,
    delta_u: tl.tensor,
    delta_n: tl.tensor,
    delta_d: tl.tensor,
    y_v: tl.tensor,
    y_n: tl.tensor,
    SENDERS: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    """One row of y: FEATURES features of one token of one receiver."""
    program = tl.program_id(0)
    v, block = (program % receivers).to(tl.int64), program // receivers
    n = (block // blocks).to(tl.int64)
    d = (block % blocks).to(tl.int64) * FEATURES + tl.arange(0, FEATURES)
    inside = d < features
    first = tl.load(starts + v)
    last = tl.load(starts + v + 1)
    from_delta = delta + n * delta_n + d[None, :] * delta_d
    total = tl.load(base + v * base_v + n * base_n + d * base_d, mask=inside, other=0.0).to(weights.dtype.element_ty)
    for e in range(first, last, SENDERS):
        entry = e + tl.arange(0, SENDERS)
        live = entry < last
        u = tl.load(senders + entry, mask=live, other=0).to(tl.int64)
        weight = tl.load(weights + entry, mask=live, other=0.0)
        x = tl.load(from_delta + u[:, None] * delta_u, mask=live[:, None] & inside[None, :], other=0.0)
        total += tl.sum(weight[:, None] * x.to(weight.dtype), 0)
    tl.store(y + v * y_v + n * y_n + d, total.to(y.dtype.element_ty), mask=inside)
