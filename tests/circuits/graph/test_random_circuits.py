"""Random circuits and the AUROC of scores, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eap_circuits import Circuit, EdgeScores, Graph, InputError, edge_auroc, random_circuit
from eap_circuits.graph import random_circuits


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    layers = draw(st.integers(1, 4))
    kv = tuple(draw(st.integers(1, 3)) for _ in range(layers))
    heads = tuple(n * draw(st.integers(1, 3)) for n in kv)
    return Graph(heads, kv, 8, draw(st.booleans()), draw(st.sampled_from(["kv", "query"])))


def on_a_path(circuit: Circuit) -> set[tuple[int, int]]:
    """Edges on a path from input to logits, by searching forwards and backwards node by node."""
    graph = circuit.graph
    receivers, senders = (t.tolist() for t in graph.inputs_of)
    owners = {v: {s for r, s in zip(receivers, senders) if r == v} for v in range(graph.n_receivers)}
    edges = [tuple(edge) for edge in circuit.mask.nonzero().tolist()]
    forward, backward = {0}, {graph.n_receivers - 1}
    while True:
        reached = forward | {s for u, v in edges if u in forward for s in owners[v]}
        leading = backward | {v for v in owners for u, w in edges if u in owners[v] and w in backward}
        if (reached, leading) == (forward, backward):
            return {(u, v) for u, v in edges if u in forward and v in backward}
        forward, backward = reached, leading


@settings(deadline=None, max_examples=60)
@given(graphs(), st.data(), st.integers(0, 1000))
def test_a_random_circuit_has_the_edges_asked_for_and_all_on_paths(
    graph: Graph, data: st.DataObject, seed: int
) -> None:
    n = data.draw(st.one_of(st.integers(0, min(12, graph.n_edges)), st.integers(0, graph.n_edges)))
    circuit = random_circuit(graph, n, seed=seed)
    assert circuit.n_edges == n
    assert circuit == circuit.pruned() == random_circuit(graph, n, seed=seed)
    if n <= 60:
        assert on_a_path(circuit) == {tuple(edge) for edge in circuit.mask.nonzero().tolist()}


def test_seeds_give_different_circuits_and_every_edge_its_chance() -> None:
    graph = Graph((2, 2), (1, 1), 8)
    seen = torch.zeros_like(graph.edge_mask)
    circuits = [random_circuit(graph, 6, seed=seed) for seed in range(200)]
    for circuit in circuits:
        seen |= circuit.mask
    assert torch.equal(seen, graph.edge_mask)
    assert len({tuple(circuit.mask.flatten().tolist()) for circuit in circuits}) > 150


@pytest.mark.parametrize("n", [-1, 9, 2.0, True, None])
def test_sizes_that_a_graph_does_not_have(n: object) -> None:
    with pytest.raises(InputError, match=r"^n_edges: expected a whole number from 0 to 8"):
        random_circuit(Graph((1,), (1,), 8), n)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=40)
@given(graphs(), st.integers(0, 1000), st.booleans(), st.data())
def test_auroc_is_the_share_of_pairs_in_order(graph: Graph, seed: int, signed: bool, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-4, 5, graph.edge_mask.shape, generator=generator).float()  # many ties
    values[~graph.edge_mask] = 100  # not edges: must not count
    circuit = random_circuit(graph, data.draw(st.integers(1, graph.n_edges - 1)), seed=seed)
    rank = values if signed else values.abs()
    inside, outside = rank[circuit.mask], rank[circuit.complement().mask]
    wins = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
    assert edge_auroc(EdgeScores(graph, values), circuit, signed=signed) == pytest.approx(float(wins.mean()))


def test_auroc_of_the_circuit_itself_and_of_its_opposite() -> None:
    graph = Graph((2, 2), (1, 1), 8)
    circuit = random_circuit(graph, 6)
    assert edge_auroc(EdgeScores(graph, circuit.mask.float()), circuit) == 1
    assert edge_auroc(EdgeScores(graph, -circuit.mask.float()), circuit, signed=True) == 0
    assert edge_auroc(EdgeScores(graph, torch.ones(circuit.mask.shape)), circuit) == 0.5


def test_auroc_of_what_cannot_be_compared() -> None:
    graph = Graph((1,), (1,), 8)
    scores = EdgeScores(graph, torch.ones(3, 5))
    for n in (0, 8):
        with pytest.raises(InputError, match="edges inside and outside"):
            edge_auroc(scores, random_circuit(graph, n))
    with pytest.raises(InputError, match="circuit: expected one of"):
        edge_auroc(scores, random_circuit(Graph((1,), (1,), 16), 3))
    with pytest.raises(InputError, match="finite"):
        edge_auroc(EdgeScores(graph, torch.full((3, 5), math.nan)), random_circuit(graph, 3))


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_edges_are_drawn_alike_however_many_are_looked_at_together(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Graph((4,) * 5, (2,) * 5, 16)
    n_edges = int(share * graph.n_edges)
    whole = random_circuit(graph, n_edges, seed=3).mask
    monkeypatch.setattr(random_circuits, "_AT_ONCE", 7)
    assert torch.equal(random_circuit(graph, n_edges, seed=3).mask, whole)
