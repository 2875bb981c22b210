"""Rows of head-space scores in Triton: all groups of one side are expanded by one launch.

A program writes one tile, tokens x features, of one node's rows. It adds the product with the node's weight and the
norm's term in the accumulation dtype and rounds once. Nodes that share a weight read it where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eap_kernels.triton import configs

# Tokens, features and inner features of a tile: by the bytes of an element, and for rows that cannot be loaded in
# pieces of 16 bytes, which need more registers for addresses.
_TILES = {2: (64, 128, 64), 4: (64, 64, 32), 8: (32, 32, 16)}
_UNALIGNED = (32, 32, 16)
_WARPS = 4
# Nodes whose tiles of the same tokens run one after another: they share the norm's inputs in the cache.
_TOGETHER = 16
_FIELDS = 20


class Group(NamedTuple):
    """Nodes of one side: values [N, h, K], weight [g, K, D] or empty, coefficients [h, M, N] and normalised [M, N, D]
    or empty."""

    values: Tensor
    weight: Tensor
    coefficients: Tensor
    normalised: Tensor

    def fields(self, first: int, start: int) -> list[int]:
        """A row of the kernel's table; the group's nodes begin at `first`, its tokens at `start`."""
        values, weight, along, x = self
        row = [first, 1, values.shape[2], 0, _address(values, 0, start), *values.stride()]
        # 0 stands for no weight; one of no width lies nowhere, and nothing of it is read.
        row += [_address(weight) or 16, *weight.stride()] if weight.dim() == 3 else [0] * 4
        row += [_address(along, 2, start), *along.stride()] if x.dim() == 3 else [0] * 4
        row += [_address(x, 1, start), *x.stride()] if x.dim() == 3 else [0] * 4
        row[1] = values.shape[1] // len(weight) if weight.dim() == 3 else 1
        row[3] = len(x) if x.dim() == 3 else 0
        return row

    def aligned(self) -> bool:
        """Whether rows can be loaded in pieces of 16 bytes."""
        values, weight, _, x = self
        rows = [values, *(t for t in (weight, x) if t.dim() == 3)]
        # A weight may be a view of a transposed one.
        rows = [t.mT if t is weight and t.stride(2) != 1 else t for t in rows]
        return all(_in_pieces(t) for t in rows)


def _address(x: Tensor, dim: int = 0, start: int = 0) -> int:
    return x.data_ptr() + start * x.stride(dim) * x.element_size()


def _in_pieces(x: Tensor) -> bool:
    size = x.element_size()
    steps = [x.data_ptr(), x.shape[2] * size, x.stride(0) * size, x.stride(1) * size]
    return x.stride(2) == 1 and all(step % 16 == 0 for step in steps)


def expand(
    sides: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], rows: slice, features: int, dtype: torch.dtype, tf32: bool
) -> Tensor:
    """The reference's function of this name, for rows of the values' dtype: [nodes, n, D]."""
    groups = [Group(*side) for side in sides]
    values = groups[0].values
    start, stop, _ = rows.indices(len(values))
    tokens = stop - start
    counts = [group.values.shape[1] for group in groups]
    nodes = sum(counts)
    # A token's rows lie together: a contraction reads the same features of all rows at a time, from few pages.
    out = values.new_empty((tokens, nodes, features), dtype=dtype).transpose(0, 1)
    if out.numel() == 0:
        return out
    table, owners, first = [], [], 0
    for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
        table += group.fields(first, start)
        owners += [number] * count
        first += count
    lists = torch.tensor(table + owners, dtype=torch.int64, device="cpu")
    lists = lists.pin_memory().to(out.device, non_blocking=True) if out.is_cuda else lists
    aligned = features * out.element_size() % 16 == 0 and all(group.aligned() for group in groups)
    at_once, columns, inner = _TILES[out.element_size()] if aligned else _UNALIGNED
    blocks = triton.cdiv(tokens, at_once), triton.cdiv(features, columns)
    with torch.cuda.device_of(out):
        _expand[(triton.cdiv(nodes, _TOGETHER) * _TOGETHER * blocks[0] * blocks[1],)](
            out,
            lists,
            lists[len(table) :],
            nodes,
            tokens,
            features,
            *out.stride()[:2],
            *blocks,
            TOKENS=at_once,
            COLUMNS=columns,
            INNER=inner,
            TOGETHER=_TOGETHER,
            FIELDS=_FIELDS,
            ALIGNED=aligned,
            PRECISION=configs.precision(configs.kind(out.dtype, tf32)),
            ACCUMULATE=tl.float64 if out.dtype == torch.float64 else tl.float32,
            num_warps=_WARPS,
            num_stages=2,
            enable_fp_fusion=True,
        )
    return out


@triton.jit
def _pointer(table: tl.tensor, like: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """An address of the table, as a pointer like the given one."""
    pointer = tl.load(table).to(like.dtype)
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _step(table: tl.tensor, like: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """A stride of the table, of rows that start at multiples of 16 bytes where they are aligned."""
    step = tl.load(table)
    return tl.multiple_of(step, 128 // like.dtype.element_ty.primitive_bitwidth) if ALIGNED else step


@triton.jit(do_not_specialize=["rows", "tokens", "token_blocks", "column_blocks"])
def _expand(
    out: tl.tensor,
    table: tl.tensor,
    owners: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    out_row: tl.tensor,
    out_n: tl.tensor,
    token_blocks: tl.tensor,
    column_blocks: tl.tensor,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    TOGETHER: tl.constexpr,
    FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
) -> None:
    """One tile of out [rows, tokens, features]."""
    program = tl.program_id(0)
    together, rest = program % TOGETHER, program // TOGETHER
    token_block, rest = rest % token_blocks, rest // token_blocks
    column_block, chunk = rest % column_blocks, rest // column_blocks
    row = chunk * TOGETHER + together
    if row >= rows:
        return
    table += tl.load(owners + row) * FIELDS
    head = row - tl.load(table)
    n = (token_block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    d = (column_block * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    live_n, live_d = n < tokens, d < features
    live = live_n[:, None] & live_d[None, :]

    values = _pointer(table + 4, out, ALIGNED) + head * _step(table + 6, out, ALIGNED)
    values_n = _step(table + 5, out, ALIGNED)
    inner = tl.load(table + 2)
    if ALIGNED:
        inner = tl.multiple_of(inner, 128 // out.dtype.element_ty.primitive_bitwidth)
        values_k = 1
    else:
        values_k = tl.load(table + 7)
    from_values = values + n[:, None] * values_n
    total = tl.zeros((TOKENS, COLUMNS), ACCUMULATE)
    if tl.load(table + 8) == 0:
        total += tl.load(from_values + d[None, :] * values_k, mask=live, other=0.0).to(ACCUMULATE)
    else:
        weight = _pointer(table + 8, out, ALIGNED) + head // tl.load(table + 1) * _step(table + 9, out, ALIGNED)
        if tl.load(table + 11) == 1:
            weight_k = _step(table + 10, out, ALIGNED)
            for first in range(0, inner, INNER):
                k = first + tl.arange(0, INNER)
                x = tl.load(from_values + k[None, :] * values_k, mask=live_n[:, None] & (k < inner)[None, :], other=0.0)
                at = weight + k[:, None] * weight_k + d[None, :]
                y = tl.load(at, mask=(k < inner)[:, None] & live_d[None, :], other=0.0)
                total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=ACCUMULATE)
        else:
            # A view of a transposed weight, as output projections are stored.
            weight_d = _step(table + 11, out, ALIGNED)
            from_weight = weight + d[:, None] * weight_d
            for first in range(0, inner, INNER):
                k = first + tl.arange(0, INNER)
                x = tl.load(from_values + k[None, :] * values_k, mask=live_n[:, None] & (k < inner)[None, :], other=0.0)
                at = from_weight + k[None, :] if ALIGNED else from_weight + k[None, :] * tl.load(table + 10)
                y = tl.load(at, mask=live_d[:, None] & (k < inner)[None, :], other=0.0)
                total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION, out_dtype=ACCUMULATE)
    points = tl.load(table + 3)
    along = tl.load(table + 12).to(out.dtype) + head * tl.load(table + 13) + n * tl.load(table + 15)
    along_m = tl.load(table + 14)
    normalised = _pointer(table + 16, out, ALIGNED) + n[:, None] * _step(table + 18, out, ALIGNED)
    normalised_m = _step(table + 17, out, ALIGNED)
    if ALIGNED:
        normalised += d[None, :]
    else:
        normalised += d[None, :] * tl.load(table + 19)
    for m in range(0, points):
        c = tl.load(along + m * along_m, mask=live_n, other=0.0).to(ACCUMULATE)
        x = tl.load(normalised + m * normalised_m, mask=live, other=0.0).to(ACCUMULATE)
        total -= c[:, None] * x
    to = out + row.to(tl.int64) * out_row + n[:, None] * out_n + d[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=live)
