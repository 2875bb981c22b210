"""Optimal selection, against every connected circuit of small graphs."""

from __future__ import annotations

import sys
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eap_circuits import EdgeScores, Graph, InputError
from eap_circuits.graph import prune


@pytest.fixture(scope="module")
def solver() -> None:
    pytest.importorskip("scipy")


SMALL = (
    Graph((1,), (1,), 8),
    Graph((2,), (1,), 8),
    Graph((2,), (1,), 8, heads="query"),
    Graph((2,), (2,), 8, parallel=True),
    Graph((1, 1), (1, 1), 8, parallel=True),
    Graph((1, 0), (1, 0), 8, per_layer=(False, True)),
    Graph((1, 1), (1, 1), 8, reads=(None, (("q", 1),)), keys=(0, 0)),
)


@cache
def connected(graph: Graph) -> Tensor:
    """Every set of edges that pruning leaves as it is: bool [circuits, edges]."""
    edges = graph.edge_mask.nonzero()
    if len(edges) > 13:  # too many sets: those of every second edge
        edges = edges[::2]
    sets = torch.arange(2 ** len(edges))[:, None].bitwise_right_shift(torch.arange(len(edges))) & 1
    found = []
    for chosen in sets.bool():
        mask = torch.zeros_like(graph.edge_mask)
        mask[edges[chosen, 0], edges[chosen, 1]] = True
        if torch.equal(prune(graph, mask), mask):
            found.append(mask[graph.edge_mask])
    return torch.stack(found)


def scores_of(graph: Graph, seed: int) -> EdgeScores:
    """Whole numbers of very different sizes, with ties: greedy ways to choose go wrong."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, 5, graph.edge_mask.shape, generator=generator)
    signs = torch.randint(0, 2, sizes.shape, generator=generator) * 2 - 1
    return EdgeScores(graph, (signs * 3**sizes).float() * graph.edge_mask)


@pytest.mark.usefixtures("solver")
@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SMALL), st.integers(0, 10**6), st.booleans(), st.data())
def test_no_connected_circuit_of_as_many_edges_has_a_greater_sum(
    graph: Graph, seed: int, signed: bool, data: st.DataObject
) -> None:
    scores, n = scores_of(graph, seed), data.draw(st.integers(0, graph.n_edges))
    among = None
    candidates = connected(graph)
    if graph.n_edges > 13:
        among = torch.zeros_like(graph.edge_mask)
        among[graph.edge_mask] = candidates.any(0)
    circuit = scores.select(n, how="optimal", signed=signed, among=among)
    rank = (scores.values if signed else scores.values.abs())[graph.edge_mask]
    best = (candidates[candidates.sum(1) <= n] * rank).sum(1).max()
    assert circuit.n_edges <= n
    assert circuit == circuit.pruned()
    assert among is None or not (circuit.mask & ~among).any()
    assert float(rank[circuit.mask[graph.edge_mask]].sum()) == pytest.approx(float(best), abs=1e-4)
    assert circuit.info["selection"]["gap"] == 0


@pytest.mark.usefixtures("solver")
@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("signed", [False, True])
def test_on_larger_graphs_it_is_connected_and_no_worse_than_the_others(heads: str, signed: bool) -> None:
    graph = Graph((4,) * 6, (2,) * 6, 8, heads=heads)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(graph.edge_mask.shape, generator=generator).pow(5) * graph.edge_mask
    scores = EdgeScores(graph, values)
    rank = values if signed else values.abs()
    for n in (2, 40, 200, graph.n_edges):
        circuit = scores.select(n, how="optimal", signed=signed)
        assert circuit.n_edges <= n
        assert circuit == circuit.pruned()
        assert circuit.info["selection"]["gap"] == 0
        for how in ("top", "greedy"):
            other = scores.select(n, how=how, signed=signed)
            assert float(rank[circuit.mask].sum()) >= float(rank[other.mask].sum()) * (1 - 1e-6)


@pytest.mark.usefixtures("solver")
@settings(deadline=None, max_examples=15)
@given(st.sampled_from(SMALL[:4]), st.integers(0, 10**6), st.integers(1, 8))
def test_out_of_time_the_gap_still_holds(graph: Graph, seed: int, n: int) -> None:
    scores = scores_of(graph, seed)
    circuit = scores.select(n, how="optimal", seconds=0)
    rank, candidates = scores.values.abs()[graph.edge_mask], connected(graph)
    best = float((candidates[candidates.sum(1) <= n] * rank).sum(1).max())
    value = float(rank[circuit.mask[graph.edge_mask]].sum())
    assert circuit == circuit.pruned()
    assert circuit.n_edges <= n
    gap = circuit.info["selection"]["gap"]
    assert value <= best + 1e-4
    assert value >= best * (1 - gap) - 1e-4


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(InputError, match="pip install scipy"):
        scores_of(SMALL[0], 0).select(3, how="optimal")
    assert scores_of(SMALL[0], 0).select(3).n_edges <= 3
