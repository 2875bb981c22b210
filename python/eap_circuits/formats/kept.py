"""A circuit's edges as a list, as they stand in its file: a mask of all edges would be a hundred times larger."""

from __future__ import annotations

import torch
from torch import Tensor

from ..edges import Graph
from ..errors import expected
from ..files import memory_bytes
from .content import Content


def listed(content: Content) -> Content:
    """A circuit's content with "edges" int32 [n, 2], (sender, receiver) in order, and maybe "scores" [n] of these."""
    graph, tensors, info = content
    edges = tensors["mask"].nonzero()
    found = {"edges": edges.int()}
    if "values" in tensors:
        found["scores"] = tensors["values"].detach().cpu()[tuple(edges.T)]
        _finite(graph, edges, found["scores"])
    return Content(graph, found, info)


def unlisted(content: Content) -> Content:
    """What `listed` was given: a "mask" [S, R] and maybe "kept" [S, R], scores that are 0 where no edge is kept.

    Raises:
        InputError: the tensors are not a list of the graph's edges, or a mask of them does not fit into memory.
    """
    graph, tensors, info = content
    edges, scores = tensors.get("edges"), tensors.get("scores")
    if edges is None or tensors.keys() - {"edges", "scores"}:
        raise expected("tensors", "edges, and maybe scores", ", ".join(sorted(tensors)) or "none")
    if edges.dtype != torch.int32 or edges.dim() != 2 or edges.shape[1] != 2:
        raise expected("edges", "int32 [n, 2]", f"{edges.dtype} {list(edges.shape)}")
    if scores is not None and not (scores.is_floating_point() and scores.shape == edges.shape[:1]):
        raise expected("scores", f"floating-point numbers [{len(edges)}]", f"{scores.dtype} {list(scores.shape)}")
    # A short list may claim to be of any graph.
    shape = graph.n_senders, graph.n_receivers
    needed = shape[0] * shape[1] * (1 + (0 if scores is None else scores.itemsize))
    if needed > memory_bytes():
        raise expected("graph", "one whose mask fits into memory", f"{needed:,} bytes")
    senders, receivers = edges.long().T
    place = senders * shape[1] + receivers
    there = (edges >= 0).all(1) & (receivers < shape[1])
    there &= senders < graph.reach[receivers.clamp(0, shape[1] - 1)]
    if not there.all():
        raise expected("edges", "edges of the graph", f"{edges[~there][0].tolist()}")
    if (place.diff() <= 0).any():
        raise expected("edges", "each once, in order", f"{edges[1:][place.diff() <= 0][0].tolist()} out of order")
    found = {"mask": torch.zeros(shape, dtype=torch.bool)}
    found["mask"][senders, receivers] = True
    if scores is not None:
        _finite(graph, edges, scores)
        found["kept"] = torch.zeros(shape, dtype=scores.dtype)
        found["kept"][senders, receivers] = scores
    return Content(graph, found, info)


def _finite(graph: Graph, edges: Tensor, scores: Tensor) -> None:
    wrong = ~scores.isfinite()
    if wrong.any():
        first = graph.edge_name(*edges[wrong][0].tolist())
        raise expected("values", "finite numbers", f"{int(wrong.sum())} that are not, the first at {first}")
