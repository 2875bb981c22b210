"""Edge scores in plain PyTorch: one matrix product per block of receivers along the staircase of `reach`."""

from __future__ import annotations

from collections.abc import Iterator

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
    blocks = list(_blocks(reach))
    order = [v for block in blocks for v in block]
    if not order:
        return
    scores, start = out.new_zeros((len(out), len(order))), 0
    for block in blocks:
        deepest, stop = reach[block[-1]], start + len(block)
        _product(delta[:deepest], _take(grad, 0, _index(block)), scores[:deepest, start:stop])
        start = stop
    # All that lies outside the staircase is left out at once: a step of it by itself is a launch.
    depths = torch.tensor([reach[v] for v in order], device="cpu").to(out.device, non_blocking=True)
    scores.masked_fill_(torch.arange(len(out), device=out.device)[:, None] >= depths, 0)
    to = _index(order)
    if isinstance(to, slice):
        out[:, to].add_(scores)
    else:
        out.index_add_(1, torch.tensor(to, device=out.device), scores)


def _product(delta: Tensor, grad: Tensor, out: Tensor) -> None:
    """[s, n, D] x [r, n, D] -> out [s, r], which is zero."""
    if flattens(delta) and flattens(grad):
        if delta.dtype == out.dtype:
            torch.mm(delta.flatten(1), grad.flatten(1).T, out=out)
            return
        if delta.is_cuda:
            _on_tensor_cores(delta.flatten(1), grad.flatten(1), out)
            return
    step = max(1, (_CHUNK_CUDA if delta.is_cuda else _CHUNK) // max(1, delta.shape[0] * delta.shape[2]))
    for a in range(0, delta.shape[1], step):
        d, g = (x[:, a : a + step].to(out.dtype).flatten(1) for x in (delta, grad))
        out.addmm_(d, g.T)


def _on_tensor_cores(delta: Tensor, grad: Tensor, out: Tensor) -> None:
    """[s, K] x [r, K] -> out [s, r]: low precision in, sums in its dtype, of runs of K that are added up by themselves.

    Tensor cores round each step of a sum towards zero: on an H100, one run of 1.6 million products was off by 0.3
    where 0.12 is right.
    """
    inner, dtype = delta.shape[1], out.dtype
    size = _RUN * max(1, -(-delta.shape[0] * grad.shape[0] * inner // (_SUMS * _RUN)))
    whole = inner // size * size
    if whole:
        d, g = (x[:, :whole].unflatten(1, (-1, size)).transpose(0, 1) for x in (delta, grad))
        torch.sum(torch.bmm(d, g.mT, out_dtype=dtype), 0, out=out)
    if whole < inner:
        out.add_(torch.mm(delta[:, whole:], grad[:, whole:].T, out_dtype=dtype))


def flattens(x: Tensor) -> bool:
    """Whether tokens and features are one dimension in memory."""
    return (x.stride(2) == 1 or x.shape[2] == 1) and (x.stride(1) == x.shape[2] or x.shape[1] == 1)
