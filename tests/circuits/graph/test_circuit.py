"""Circuits, scores and their two head graphs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eap_circuits import Circuit, EdgeScores, Graph, InputError, edge_overlap, node_overlap
from eap_circuits.edges import Heads, prune

GRAPH = Graph((2,), (1,), d_model=8)  # input, a0.h0, a0.h1, m0 -> q q k v m logits


def circuit_of(*edges: tuple[str, str], graph: Graph = GRAPH) -> Circuit:
    mask = torch.zeros_like(graph.edge_mask)
    for sender, receiver in edges:
        mask[graph.senders.index(sender), graph.receivers.index(receiver)] = True
    return Circuit.from_mask(graph, mask)


def test_edges_and_nodes_by_name() -> None:
    circuit = circuit_of(("input", "a0.h1<q>"), ("a0.h1", "logits"))
    assert circuit.n_edges == 2
    assert circuit.edges == [("input", "a0.h1<q>"), ("a0.h1", "logits")]
    assert circuit.nodes == ["input", "a0.h1"]
    assert circuit_of(("input", "a0.h0<v>"), ("a0.h0", "logits")).nodes == ["input", "a0.h0", "a0.h1"]
    assert circuit_of().nodes == []


def test_complement_is_every_other_edge() -> None:
    circuit = circuit_of(("input", "a0.h1<q>"), ("a0.h1", "logits"))
    assert circuit.complement().n_edges == GRAPH.n_edges - 2
    assert not (circuit.complement().mask & circuit.mask).any()
    assert circuit.complement().complement() == circuit


def test_pruned_drops_dead_ends() -> None:
    live = circuit_of(("input", "a0.h1<q>"), ("a0.h1", "logits"))
    assert circuit_of(("input", "a0.h1<q>"), ("a0.h1", "logits"), ("input", "m0")).pruned() == live


def test_a_node_circuit_has_every_edge_between_the_nodes_on_paths() -> None:
    graph = Graph((2, 2), (1, 1), d_model=8)
    edges = [("input", "a0.h0<v>"), ("a0.h1", "m1"), ("m1", "logits"), ("input", "m0"), ("m0", "a1.h0<q>")]
    found = circuit_of(*edges, graph=graph).node_circuit()
    # m0 leads nowhere, as nothing reads a1.h0; a0.h1 shares its key and its value with a0.h0, which writes nothing.
    right = [("input", "a0.h1<q>"), ("input", "a0.h0<k>"), ("input", "a0.h0<v>"), ("input", "m1"), ("a0.h1", "m1")]
    right += [(sender, "logits") for sender in ("input", "a0.h1", "m1")]
    assert sorted(found.edges) == sorted(right)
    assert circuit_of(graph=graph).node_circuit().edges == [("input", "logits")]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("heads", ["kv", "query"])
def test_pruning_leaves_what_its_rule_leaves(parallel: bool, heads: Heads) -> None:
    """Until nothing changes: a sender stays if an edge leaves it and, except for `input`, one feeds it."""
    graph = Graph((4,) * 4, (2,) * 4, 16, parallel, heads)
    receivers, senders = graph.inputs_of
    generator = torch.Generator().manual_seed(0)
    for share in (0.01, 0.02, 0.04, 0.07, 0.1, 0.2, 0.5, 0.9) * 5:
        mask = (torch.rand(graph.edge_mask.shape, generator=generator) < share) & graph.edge_mask
        kept, before = mask, torch.zeros_like(mask)
        while not torch.equal(kept, before):
            before = kept
            fed = {0, *(u for v, u in zip(receivers.tolist(), senders.tolist(), strict=True) if before[:, v].any())}
            alive = [u in fed and bool(before[u].any()) for u in range(graph.n_senders)]
            read = {v for v, u in zip(receivers.tolist(), senders.tolist(), strict=True) if alive[u]}
            used = torch.tensor([v in read or v == graph.n_receivers - 1 for v in range(graph.n_receivers)])
            kept = before & torch.tensor(alive)[:, None] & used
        assert torch.equal(prune(graph, mask), kept)


def test_circuits_of_the_same_edges_are_equal() -> None:
    assert circuit_of(("input", "m0")) == circuit_of(("input", "m0"))
    assert circuit_of(("input", "m0")) != circuit_of(("input", "logits"))
    assert circuit_of() != circuit_of(graph=GRAPH.with_heads("query"))


def test_a_circuit_keeps_a_copy_of_its_mask() -> None:
    mask = GRAPH.edge_mask.clone()
    circuit = Circuit.from_mask(GRAPH, mask)
    mask.zero_()
    assert circuit.n_edges == GRAPH.n_edges


def test_what_comes_of_a_result_has_info_of_its_own() -> None:
    scores = EdgeScores(GRAPH, GRAPH.edge_mask.float(), {"method": "eap"})
    circuit = scores.select(4)
    for each in (scores.node_scores(), circuit.pruned(), circuit.across_spans(), circuit.to_query()):
        each.info["note"] = "mine"
    assert "note" not in scores.info | circuit.info


def test_masks_that_cannot_be() -> None:
    with pytest.raises(InputError, match=r"^circuit mask: expected shape \[4, 6\] .*, found \[2, 2\]\.$"):
        Circuit.from_mask(GRAPH, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(InputError, match=r"^circuit mask: expected a bool tensor, found torch.float32\.$"):
        Circuit.from_mask(GRAPH, torch.zeros(4, 6))
    with pytest.raises(InputError, match=r"^circuit mask: .* found 1 that do not, the first m0->m0\.$"):
        circuit_of(("m0", "m0"))
    with pytest.raises(InputError, match=r"^circuit values: expected shape \[4, 6\] .*, found \[4\]\.$"):
        Circuit(GRAPH, GRAPH.edge_mask, torch.zeros(4))
    with pytest.raises(InputError, match=r"^score values: expected shape \[4, 6\] .*, found \[6, 4\]\.$"):
        EdgeScores(GRAPH, torch.zeros(6, 4))


def test_to_kv_sums_the_scores_of_a_group() -> None:
    query = GRAPH.with_heads("query")
    values = torch.arange(32.0).view(4, 8)
    scores = EdgeScores(query, values, {"method": "eap"}).to_kv()
    assert scores.graph == GRAPH
    assert scores.info == {"method": "eap"}
    assert scores.values[0].tolist() == [0.0, 1.0, 2.0 + 3.0, 4.0 + 5.0, 6.0, 7.0]
    assert scores.to_kv() is scores


def test_to_query_expands_edges_and_shares_scores() -> None:
    values = torch.zeros(4, 6)
    values[0] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    circuit = Circuit(GRAPH, circuit_of(("input", "a0.h0<k>"), ("a0.h1", "logits")).mask, values)
    query = circuit.to_query()
    assert query.edges == [("input", "a0.h0<k>"), ("input", "a0.h1<k>"), ("a0.h1", "logits")]
    assert query.values is not None
    assert query.values[0].tolist() == [1.0, 2.0, 1.5, 1.5, 2.0, 2.0, 5.0, 6.0]
    assert query.to_query() is query


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31))
def test_to_kv_undoes_to_query(layers: int, groups: int, size: int, seed: int) -> None:
    graph = Graph((groups * size,) * layers, (groups,) * layers, 8)
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(graph.edge_mask.shape, generator=generator) * graph.edge_mask
    mask = (torch.rand(graph.edge_mask.shape, generator=generator) < 0.3) & graph.edge_mask
    query = Circuit(graph, mask, values).to_query()
    assert query.values is not None
    assert torch.allclose(EdgeScores(query.graph, query.values).to_kv().values, values)
    assert query.pruned() == Circuit(graph, mask).pruned().to_query().pruned()


def test_top_edges_are_the_largest_in_order() -> None:
    values = torch.zeros(4, 6)
    values[0, 0], values[1, 4], values[3, 5] = 0.5, -2.0, 1.0
    top = EdgeScores(GRAPH, values).top_edges(3)
    assert top == [("a0.h0", "m0", -2.0), ("m0", "logits", 1.0), ("input", "a0.h0<q>", 0.5)]
    assert len(EdgeScores(GRAPH, values).top_edges(10_000)) == GRAPH.n_edges


def test_overlap_of_edges_and_nodes() -> None:
    first = circuit_of(("input", "a0.h1<q>"), ("a0.h1", "logits"), ("input", "logits"))
    second = circuit_of(("input", "logits"), ("input", "m0"), ("m0", "logits"), ("a0.h1", "logits"))
    edges = edge_overlap(first, second)
    assert (edges.n_first, edges.n_second, edges.n_shared) == (3, 4, 2)
    assert (edges.iou, edges.of_first, edges.of_second) == (2 / 5, 2 / 3, 2 / 4)
    nodes = node_overlap(first, second)
    assert (nodes.n_first, nodes.n_second, nodes.n_shared) == (2, 3, 2)
    assert edge_overlap(circuit_of(), circuit_of()).iou == 0


def test_overlap_needs_one_graph() -> None:
    with pytest.raises(InputError, match=r"^second circuit: expected one of Graph\(.*\), found .*\.$"):
        edge_overlap(circuit_of(), circuit_of(graph=GRAPH.with_heads("query")))
