"""Edge scores in plain PyTorch: one matrix product per block of receivers along the staircase of `reach`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor

# Elements of delta copied at once if a copy is needed (strides that do not flatten, low precision): as many as a
# processor's cache holds, and enough that a GPU does not wait for launches.
_CHUNK, _CHUNK_CUDA = 1 << 20, 1 << 26
# On tensor cores: products of a run, and the most sums of runs that are held at once.
_RUN, _SUMS = 1 << 15, 1 << 28
# Share of a block's products that may lie outside the staircase: wider products are worth that much.
_WASTE = 0.125


def edge_scores(
    delta: Tensor, grad: Tensor, reach: Tensor, out: Tensor, segments: Tensor | None, tf32: bool = False
) -> None:
    """out[segment(n), u, v] += <delta[u, n], grad[v, n]> for u < reach[v], in place.

    delta [S, N, D], grad [R, N, D], reach int64 [R], out [S, R] or [segments, S, R], segments int64 [N]. `tf32` changes
    nothing: torch's matrix products follow torch's own switch.
    """
    depths = reach.tolist()
    if segments is None:
        _add(delta, grad, depths, out)
        return
    for segment in segments.unique().tolist():
        tokens = _index((segments == segment).nonzero().flatten().tolist())
        _add(_take(delta, 1, tokens), _take(grad, 1, tokens), depths, out[segment])


_Index = slice | list[int]


def _index(positions: list[int]) -> _Index:
    """A slice if the positions are consecutive: slicing is free, gathering copies."""
    first = positions[0] if positions else 0
    run = range(first, first + len(positions))
    return slice(run.start, run.stop) if positions == list(run) else positions


def _take(x: Tensor, dim: int, index: _Index) -> Tensor:
    if isinstance(index, slice):
        return x.narrow(dim, index.start, index.stop - index.start)
    return x.index_select(dim, torch.tensor(index, device=x.device))


def _blocks(reach: list[int]) -> Iterator[list[int]]:
    """Receivers in the order of their reach, cut into blocks that waste little."""
    order = sorted((v for v, r in enumerate(reach) if r > 0), key=lambda v: (reach[v], v))
    start = 0
    while start < len(order):
        end, useful = start, 0
        while end < len(order):
            useful += reach[order[end]]
            products = reach[order[end]] * (end + 1 - start)
            if products - useful > _WASTE * products:
                break
            end += 1
        yield order[start:end]
        start = end


def _add(delta: Tensor, grad: Tensor, reach: list[int], out: Tensor) -> None:
    for block in _blocks(reach):
        deepest = reach[block[-1]]
        scores = _product(delta[:deepest], _take(grad, 0, _index(block)), out.dtype)  # [deepest, block]
        column = 0
        for depth, group in groupby(block, key=reach.__getitem__):
            receivers = list(group)
            part = scores[:depth, column : column + len(receivers)]
            column += len(receivers)
            to = _index(receivers)
            if isinstance(to, slice):
                out[:depth, to].add_(part)
            else:
                out[:depth].index_add_(1, torch.tensor(to, device=out.device), part)


def _product(delta: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """[s, n, D] x [r, n, D] -> [s, r] in `dtype`."""
    if flattens(delta) and flattens(grad):
        if delta.dtype == dtype:
            return delta.flatten(1) @ grad.flatten(1).T
        if delta.is_cuda:
            return _on_tensor_cores(delta.flatten(1), grad.flatten(1), dtype)
    scores = delta.new_zeros((delta.shape[0], grad.shape[0]), dtype=dtype)
    step = max(1, (_CHUNK_CUDA if delta.is_cuda else _CHUNK) // max(1, delta.shape[0] * delta.shape[2]))
    for a in range(0, delta.shape[1], step):
        d, g = (x[:, a : a + step].to(dtype).flatten(1) for x in (delta, grad))
        scores.addmm_(d, g.T)
    return scores


def _on_tensor_cores(delta: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """[s, K] x [r, K] -> [s, r]: low precision in, sums in `dtype` out, of runs of K that are added up by themselves.

    Tensor cores round each step of a sum towards zero: on an H100, one run of 1.6 million products was off by 0.3
    where 0.12 is right.
    """
    inner = delta.shape[1]
    size = _RUN * max(1, -(-delta.shape[0] * grad.shape[0] * inner // (_SUMS * _RUN)))
    if inner <= size:
        return torch.mm(delta, grad.T, out_dtype=dtype)
    whole = inner // size * size
    d, g = (x[:, :whole].unflatten(1, (-1, size)).transpose(0, 1) for x in (delta, grad))
    scores = torch.bmm(d, g.mT, out_dtype=dtype).sum(0)
    if whole < inner:
        scores += torch.mm(delta[:, whole:], grad[:, whole:].T, out_dtype=dtype)
    return scores


def flattens(x: Tensor) -> bool:
    """Whether tokens and features are one dimension in memory."""
    return (x.stride(2) == 1 or x.shape[2] == 1) and (x.stride(1) == x.shape[2] or x.shape[1] == 1)
