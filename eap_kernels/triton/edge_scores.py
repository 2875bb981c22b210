"""Edge scores in Triton: a matrix product over (token, feature) that visits only the tiles of the staircase.

The inner dimension is cut into chunks so that tiles x chunks fill the device. Each program writes its partial tile
to a workspace; a second kernel adds the chunks to `out` in a fixed order, so every run gives the same bits.
"""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from eap_kernels.triton import configs
from eap_kernels.triton.configs import Tile

# Bytes of partial tiles held at once, unless a single chunk of every tile needs more.
WORKSPACE = 64 << 20
# What starting and ending a program costs, in steps of its inner loop.
_OVERHEAD = 8
# Products that a matrix unit adds up before their sum is added to the others. It rounds each step towards zero, so the
# error of one long sum grows faster than that of one rounded to nearest.
_RUN = 4096
# Elements of a partial tile that one program of the second kernel adds up.
_BLOCK = 1024


class Launch(NamedTuple):
    """One pair of launches: consecutive segments whose partial tiles fit into the workspace."""

    # First and last step, in tokens x feature blocks: int32 [chunks, 2]; a chunk lies within one segment.
    chunks: Tensor
    # Number of the segment, its first and last chunk: int32 [segments, 3].
    segments: Tensor


class Schedule(NamedTuple):
    """All of a call that does not depend on the values of delta and grad."""

    tile: Tile
    # Row and column of each tile, in tiles: int32 [tiles, 2].
    tiles: Tensor
    # The receiver in each column of the sorted staircase, and its reach: int32 [columns], both 0 in padding.
    receivers: Tensor
    depths: Tensor
    # Tokens in the order of their segments, int32 [N]; None where that is their own order.
    order: Tensor | None
    launches: tuple[Launch, ...]


def edge_scores(delta: Tensor, grad: Tensor, reach: Tensor, out: Tensor, segments: Tensor | None, tf32: bool) -> None:
    """out[segment(n), u, v] += <delta[u, n], grad[v, n]> for u < reach[v], in place; deterministic.

    delta [S, N, D], grad [R, N, D], any strides; reach int64 [R] and segments int64 [N] on the CPU; out [S, R] or
    [segments, S, R]. Products of fp32 are exact unless `tf32`; sums are kept in out's dtype.
    """
    if segments is None:
        delta, grad = configs.one_row(delta, grad)
        out = out[None]
    if delta.numel() == 0 or grad.numel() == 0:
        return
    kind = configs.kind(delta.dtype, tf32)
    plan = schedule(
        reach.numpy().tobytes(),
        None if segments is None else segments.numpy().tobytes(),
        delta.shape,
        configs.tiles(configs.EDGE_SCORES, kind, delta, grad),
        out.element_size(),
        delta.device,
        torch.cuda.current_stream(delta.device).cuda_stream if delta.is_cuda else 0,
    )
    tile, tiles = plan.tile, len(plan.tiles)
    size = tile.rows * tile.columns
    order = plan.receivers if plan.order is None else plan.order
    with torch.cuda.device_of(delta):
        for launch in plan.launches:
            partials = out.new_empty((len(launch.chunks), tiles, size))
            _contract[(len(launch.chunks) * tiles,)](
                delta,
                grad,
                partials,
                plan.tiles,
                plan.receivers,
                launch.chunks,
                order,
                tiles,
                delta.shape[0],
                delta.shape[2],
                triton.cdiv(delta.shape[2], tile.inner),
                *delta.stride(),
                *grad.stride(),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                INNER=tile.inner,
                RUN=_RUN // tile.inner,
                ORDERED=plan.order is not None,
                EVEN=delta.shape[2] % tile.inner == 0,
                PRECISION=configs.precision(kind),
                num_warps=tile.warps,
                num_stages=tile.stages,
                enable_fp_fusion=True,
            )
            _add[(len(launch.segments) * tiles * (size // _BLOCK),)](
                partials,
                out,
                plan.tiles,
                plan.receivers,
                plan.depths,
                launch.segments,
                tiles,
                *out.stride(),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                BLOCK=_BLOCK,
                num_warps=4,
                enable_fp_fusion=True,
            )


@triton.jit(do_not_specialize=["tiles", "senders", "blocks"])
def _contract(
    delta: tl.tensor,
    grad: tl.tensor,
    partials: tl.tensor,
    tile_table: tl.tensor,
    receivers: tl.tensor,
    chunks: tl.tensor,
    order: tl.tensor,
    tiles: tl.tensor,
    senders: tl.tensor,
    features: tl.tensor,
    blocks: tl.tensor,
    delta_u: tl.tensor,
    delta_n: tl.tensor,
    delta_d: tl.tensor,
    grad_v: tl.tensor,
    grad_n: tl.tensor,
    grad_d: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    RUN: tl.constexpr,
    ORDERED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """partials[chunk, tile] = the product of one tile's senders and receivers over one chunk of steps."""
    program = tl.program_id(0)
    # Tiles of the same chunk run together: they share its rows in the L2 cache.
    tile, chunk = program % tiles, program // tiles
    row = tl.load(tile_table + 2 * tile) * ROWS
    column = tl.load(tile_table + 2 * tile + 1) * COLUMNS
    first = tl.load(chunks + 2 * chunk)
    last = tl.load(chunks + 2 * chunk + 1)
    # Rows past the end repeat the last sender; their results are never added to out.
    u = tl.minimum(row + tl.arange(0, ROWS), senders - 1).to(tl.int64)
    v = tl.load(receivers + column + tl.arange(0, COLUMNS)).to(tl.int64)
    k = tl.arange(0, INNER)
    k_wide = k.to(tl.int64)
    from_delta = delta + u[:, None] * delta_u + k_wide[None, :] * delta_d
    from_grad = grad + v[None, :] * grad_v + k_wide[:, None] * grad_d
    total = tl.zeros((ROWS, COLUMNS), partials.dtype.element_ty)
    for start in range(first, last, RUN):
        run = tl.zeros((ROWS, COLUMNS), partials.dtype.element_ty)
        for step in range(start, tl.minimum(start + RUN, last)):
            n = step // blocks
            d = tl.cast(step - n * blocks, tl.int64) * INNER
            if ORDERED:
                n = tl.load(order + n)
            n = tl.cast(n, tl.int64)
            at_delta = from_delta + (n * delta_n + d * delta_d)
            at_grad = from_grad + (n * grad_n + d * grad_d)
            if EVEN:
                x = tl.load(at_delta)
                y = tl.load(at_grad)
            else:
                inside = k < features - d
                x = tl.load(at_delta, mask=inside[None, :], other=0.0)
                y = tl.load(at_grad, mask=inside[:, None], other=0.0)
            run = tl.dot(x, y, run, input_precision=PRECISION, out_dtype=run.dtype)
        total += run
    to = partials + program.to(tl.int64) * (ROWS * COLUMNS)
    to += tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(to, total)


@triton.jit(do_not_specialize=["tiles"])
def _add(
    partials: tl.tensor,
    out: tl.tensor,
    tile_table: tl.tensor,
    receivers: tl.tensor,
    depths: tl.tensor,
    segments: tl.tensor,
    tiles: tl.tensor,
    out_s: tl.tensor,
    out_u: tl.tensor,
    out_v: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """out[segment, u, v] += the sum of the segment's chunks, first to last, within the staircase."""
    program = tl.program_id(0)
    parts: tl.constexpr = ROWS * COLUMNS // BLOCK
    part, tile, entry = program % parts, program // parts % tiles, program // parts // tiles
    segment = tl.load(segments + 3 * entry).to(tl.int64)
    first = tl.load(segments + 3 * entry + 1)
    last = tl.load(segments + 3 * entry + 2)
    e = part * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(tile_table + 2 * tile) * ROWS + e // COLUMNS
    column = tl.load(tile_table + 2 * tile + 1) * COLUMNS + e % COLUMNS
    inside = u < tl.load(depths + column)
    v = tl.load(receivers + column)
    total = tl.zeros((BLOCK,), partials.dtype.element_ty)
    for chunk in range(first, last):
        partial = partials + (tl.cast(chunk, tl.int64) * tiles + tile) * (ROWS * COLUMNS)
        total += tl.load(partial + e, mask=inside, other=0.0)
    to = out + segment * out_s + u.to(tl.int64) * out_u + v.to(tl.int64) * out_v
    tl.store(to, tl.load(to, mask=inside, other=0.0) + total, mask=inside)


@functools.lru_cache(maxsize=64)
def schedule(
    reach: bytes,
    segments: bytes | None,
    shape: tuple[int, int, int],
    choices: tuple[Tile, ...],
    element_size: int,
    device: torch.device,
    stream: int = 0,
) -> Schedule:
    """The work list of one call, with the cheapest of the available tiles.

    `reach` and `segments` are the bytes of their int64 values, `shape` is [S, N, D], `element_size` that of out. Each
    `stream` has lists of its own: those that are dropped here may be overwritten by what runs on it next, and only that
    comes after their last use.
    """
    depths = sorted((depth, v) for v, depth in enumerate(memoryview(reach).cast("q")) if depth > 0)
    lists = {tile: _tiles([depth for depth, _ in depths], tile) for tile in choices}
    tile = min(lists, key=lambda t: len(lists[t]) * t.rows * t.columns / t.rate)
    tiles = lists[tile]
    # Padding comes first: there the staircase is lowest, and wasted columns are short.
    padded = [(0, 0)] * (-len(depths) % tile.columns) + depths
    order = None
    lengths = {0: shape[1]}
    if segments is not None:
        numbers = memoryview(segments).cast("q").tolist()
        positions = sorted(range(len(numbers)), key=numbers.__getitem__)
        order = None if positions == list(range(len(numbers))) else positions
        lengths = dict.fromkeys(sorted(set(numbers)), 0)
        for number in numbers:
            lengths[number] += 1

    def on_device(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    size = tile.rows * tile.columns * len(tiles) * element_size
    launches = _launches(lengths, triton.cdiv(shape[2], tile.inner), len(tiles), size, tile) if tiles else []
    return Schedule(
        tile,
        on_device(tiles),
        on_device([v for _, v in padded]),
        on_device([depth for depth, _ in padded]),
        None if order is None else on_device(order),
        tuple(Launch(on_device(chunks), on_device(entries)) for chunks, entries in launches),
    )


def _tiles(depths: list[int], tile: Tile) -> list[tuple[int, int]]:
    """Row and column of every tile that holds an entry of the staircase, for depths in ascending order."""
    deepest = reversed(depths[:: -tile.columns])
    return [(row, column) for column, depth in enumerate(deepest) for row in range(triton.cdiv(depth, tile.rows))]


_Chunks = list[tuple[int, int]]
_Entries = list[tuple[int, int, int]]


def _launches(
    lengths: dict[int, int], blocks: int, tiles: int, size: int, tile: Tile
) -> list[tuple[_Chunks, _Entries]]:
    """Cuts the steps of each segment (its tokens x blocks) into chunks, and the chunks into launches.

    `size` is the bytes of the partial tiles of one chunk.
    """
    steps = sum(lengths.values()) * blocks
    longest = triton.cdiv(steps, _splits(steps, tiles, max(1, WORKSPACE // size), tile))
    launches: list[tuple[_Chunks, _Entries]] = []
    ends = accumulate(lengths.values())
    for (number, length), end in zip(lengths.items(), ends, strict=True):
        first, count = (end - length) * blocks, length * blocks
        parts = triton.cdiv(count, longest)
        if not launches or (len(launches[-1][0]) + parts) * size > WORKSPACE:
            launches.append(([], []))
        chunks, entries = launches[-1]
        entries.append((number, len(chunks), len(chunks) + parts))
        chunks += [(first + i * count // parts, first + (i + 1) * count // parts) for i in range(parts)]
    return launches


def _splits(steps: int, tiles: int, limit: int, tile: Tile) -> int:
    """The number of chunks for which the last wave of programs is as full as the others."""
    slots = configs.PROCESSORS * tile.resident
    most = max(1, min(limit, steps // _OVERHEAD))
    return min(range(1, most + 1), key=lambda n: triton.cdiv(tiles * n, slots) * (steps / n + _OVERHEAD))
