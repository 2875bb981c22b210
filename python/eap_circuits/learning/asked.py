"""What calls that run circuits again and again refuse, and what their results say of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eap_kernels import explain

from ..errors import expected, instance, one_of, whole
from ..graph import EdgeScores, Graph
from ..metrics import METRICS
from ..provenance import provenance
from ..recording import ablation_of
from ..request import Request, check_no_spans


def check_constants(request: Request) -> None:
    """Refuse an ablation for which each circuit would learn constants of its own."""
    if ablation_of(request.ablation).learned:
        raise expected("ablation", "constants from eap.optimal_constants", repr(request.ablation))


def check_gradient(request: Request) -> None:
    """Refuse what circuits cannot be run for with a gradient of their masks."""
    request.refuse_parts()
    if not request.metric.differentiable:
        one_of("metric", request.metric.name, [each.name for each in METRICS.values() if each.differentiable])
    check_constants(request)


def check_start(start: EdgeScores, request: Request) -> None:
    """Refuse scores to start from that are not finite, or not of this model."""
    instance("start", start, EdgeScores)
    graph = start.graph
    check_no_spans("start", graph)
    if graph != request.arch.graph(graph.heads):
        raise expected("start", f"scores of {request.arch.graph(graph.heads)!r}", f"scores of {graph!r}")
    if not start.values[graph.edge_mask].isfinite().all():
        raise expected("start", "finite values", "some that are not")


def sizes_of(n_edges: object, n: int, shares: tuple[float, float]) -> tuple[int, int]:
    """The smallest and the largest size of `n_edges=`; by default these shares of the graph's n edges."""
    if n_edges is None:
        smallest, largest = (max(1, round(share * n)) for share in shares)
        return smallest, largest
    both = n_edges if isinstance(n_edges, (tuple, list)) else (n_edges, n_edges)
    if len(both) != 2:
        raise expected("n_edges", "a number of edges, or the smallest and the largest", repr(n_edges))
    return sizes_between(both, n)


def sizes_between(both: Sequence[object], n: int, name: str = "n_edges") -> tuple[int, int]:
    """The smallest and the largest of sizes of circuits of a graph of n edges, checked."""
    smallest, largest = (whole(name, each, 1, n, ", the edges of the graph") for each in both)
    if smallest > largest:
        raise expected(name, "the smaller number first", f"{smallest} and {largest}")
    return smallest, largest


def origin(request: Request, call: str, graph: Graph, method: str, dtype: torch.dtype) -> dict[str, Any]:
    """The `info` of a result: what ran, and where it came from; `dtype` is that of circuits' differences."""
    nothing = torch.empty(0, dtype=dtype, device=request.arch.device)
    info = {
        "method": method,
        "metric": request.metric.name,
        "ablation": ablation_of(request.ablation).name,
        **provenance(request, call, explain("masked_read", nothing, nothing, graph.edge_mask)),
    }
    if request.ablation_data is not None:
        info["ablation_data"] = request.ablation_data.name
    return info


def ranking(graph: Graph, order: Tensor, info: dict[str, Any]) -> EdgeScores:
    """Scores by ranks: of the graph's n edges the weakest has 1/n, the strongest 1.

    Args:
        order: [n], the edges' numbers from the weakest to the strongest.
    """
    values = torch.zeros(graph.edge_mask.shape, dtype=torch.float32)
    values[graph.edge_mask] = ((order.argsort() + 1).double() / graph.n_edges).float()
    return EdgeScores(graph, values, info)
