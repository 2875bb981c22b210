"""Circuits of exactly n edges, against all circuits of tiny graphs."""

from __future__ import annotations

import importlib.util
import json
import warnings

import pytest
import torch
from torch import Tensor

import eap_circuits as eap
from eap_circuits.graph import prune

GRAPHS = {
    "one layer": eap.Graph((2,), (1,), 8),
    "parallel": eap.Graph((1, 1), (1, 1), 8, parallel=True),
    "two layers": eap.Graph((1, 1), (1, 1), 8),
    "shared keys": eap.Graph((2, 2), (1, 1), 8),
    "three layers": eap.Graph((1, 1, 1), (1, 1, 1), 8),
    "per-layer embeddings": eap.Graph((1, 0, 1, 0), (1, 0, 1, 0), 8, per_layer=(False, True) * 2),
    "keys of an earlier layer": eap.Graph((1, 1), (1, 1), 8, reads=(None, (("q", 1),)), keys=(0, 0)),
}


def sizes(graph: eap.Graph, allowed: Tensor) -> set[int]:
    """How many edges the connected circuits within `allowed` have, by trying all sets of edges."""
    edges = allowed.nonzero().tolist()
    inputs: list[list[int]] = [[] for _ in graph.senders]
    for receiver, sender in zip(*(t.tolist() for t in graph.inputs_of), strict=True):
        inputs[sender].append(receiver)
    leaving = [sum(1 << i for i, (u, _) in enumerate(edges) if u == node) for node in range(graph.n_senders)]
    coming = [sum(1 << i for i, (_, v) in enumerate(edges) if v in inputs[node]) for node in range(graph.n_senders)]
    found = set()
    for kept in range(1 << len(edges)):
        alive = {
            n for n, name in enumerate(graph.senders) if kept & leaving[n] and (name[0] in "ip" or kept & coming[n])
        }
        read = {v for node in alive for v in inputs[node]} | {graph.n_receivers - 1}
        if all(u in alive and v in read for i, (u, v) in enumerate(edges) if kept >> i & 1):
            found.add(kept.bit_count())
    return found


def random_scores(graph: eap.Graph, seed: int) -> eap.EdgeScores:
    values = torch.randn(graph.n_senders, graph.n_receivers, generator=torch.Generator().manual_seed(seed))
    # Some are rounded, so that there are equal ones and zeros.
    return eap.EdgeScores(graph, (values if seed % 3 else values.round()) * graph.edge_mask)


def check(scores: eap.EdgeScores, n: int, wanted: int, **options: object) -> eap.Circuit:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        circuit = scores.select(n, exactly=True, **options)  # type: ignore[arg-type]
    assert circuit.n_edges == wanted
    assert torch.equal(prune(scores.graph, circuit.mask), circuit.mask)
    assert [f"this one has {wanted}" in str(each.message) for each in said] == ([] if wanted == n else [True])
    return circuit


@pytest.mark.parametrize("how", ["top", "greedy", "optimal"])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS.keys())
def test_every_number_that_can_be_reached_among_some_edges(graph: eap.Graph, how: str) -> None:
    if how == "optimal":
        pytest.importorskip("scipy")
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        edges = graph.edge_mask.nonzero()
        among = torch.zeros_like(graph.edge_mask)
        among[tuple(edges[torch.randperm(len(edges), generator=generator)[: 6 + seed % 4]].T)] = True
        possible = sizes(graph, among)
        for n in range(int(among.sum()) + 1):
            wanted = max(size for size in possible if size <= n)
            circuit = check(random_scores(graph, seed), n, wanted, how=how, signed=bool(seed % 2), among=among)
            assert not (circuit.mask & ~among).any()


@pytest.mark.parametrize("how", ["top", "greedy"])
@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS.keys())
def test_every_number_of_a_whole_graph_without_scipy(
    graph: eap.Graph, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for seed in range(2):
        for n in range(graph.n_edges + 1):
            check(random_scores(graph, seed), n, n, how=how, signed=bool(seed))


def test_a_number_between_two_chains_needs_the_integer_program() -> None:
    """Chains of 2, 3 and 4 edges: any total that some of them have, whichever of them is strongest."""
    pytest.importorskip("scipy")
    graph = eap.Graph((1,) * 6, (1,) * 6, 8)
    chains = (["m0"], ["m1", "m2"], ["m3", "m4", "m5"])
    among = torch.zeros_like(graph.edge_mask)
    for chain in chains:
        for u, v in zip(["input", *chain], [*chain, "logits"], strict=True):
            among[graph.senders.index(u), graph.receivers.index(v)] = True
    wanted = {0: 0, 1: 0, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6, 7: 7, 8: 7, 9: 9}
    for seed in range(4):
        for n, size in wanted.items():
            for how in ("top", "greedy", "optimal"):
                check(random_scores(graph, seed), n, size, how=how, among=among)


def test_it_takes_the_strongest_edges_that_are_connected() -> None:
    """All edges of the circuit are among those taken until n are connected, and the weakest of these are left out."""
    for seed in range(20):
        graph = GRAPHS["shared keys"]
        scores = random_scores(graph, 3 * seed + 1)
        strength = scores.values.abs()
        for n in (12, 20, 28):
            taken = next(
                kept
                for k in range(1, graph.n_edges + 1)
                if (kept := prune(graph, scores.select(k, prune=False).mask)).sum() >= n
            )
            circuit = scores.select(n, exactly=True)
            if not (circuit.mask & ~taken).any():
                # Nothing weaker than the strongest one left out could be left out in its place, by itself.
                for u, v in (taken & ~circuit.mask).nonzero().tolist():
                    for a, b in (circuit.mask & (strength < strength[u, v])).nonzero().tolist():
                        other = circuit.mask.clone()
                        other[u, v], other[a, b] = True, False
                        assert int(prune(graph, other).sum()) < n


def test_what_is_connected_already_is_the_published_selection() -> None:
    for graph in GRAPHS.values():
        for n in range(graph.n_edges + 1):
            published = random_scores(graph, 1).select(n)
            if published.n_edges == n:
                assert random_scores(graph, 1).select(n, exactly=True) == published


def test_the_optimum_is_that_of_all_circuits_with_so_many_edges() -> None:
    pytest.importorskip("scipy")
    graph = GRAPHS["one layer"]
    edges = graph.edge_mask.nonzero()
    # With negative scores, the best circuit of at most n edges has fewer.
    scores = eap.EdgeScores(graph, -1 - torch.rand(graph.n_senders, graph.n_receivers) * graph.edge_mask)
    best: dict[int, float] = {}
    for kept in range(1 << len(edges)):
        mask = torch.zeros_like(graph.edge_mask)
        mask[tuple(edges[[i for i in range(len(edges)) if kept >> i & 1]].T)] = True
        if torch.equal(prune(graph, mask), mask):
            size, total = int(mask.sum()), float(scores.values[mask].sum())
            best[size] = max(best.get(size, total), total)
    for n, total in best.items():
        circuit = check(scores, n, n, how="optimal", signed=True)
        assert float(scores.values[circuit.mask].sum()) == pytest.approx(total, rel=1e-5)
        assert circuit.info["selection"]["gap"] == 0


def test_the_number_kept_is_said() -> None:
    scores = random_scores(GRAPHS["shared keys"], 1)
    pruned = next(c for n in range(1, 40) if (c := scores.select(n)).n_edges < n)
    asked = pruned.info["selection"]["n_edges"]
    assert f"{pruned.n_edges} of {pruned.graph.n_edges} edges; {asked} were asked for" in repr(pruned)
    exact = scores.select(asked, exactly=True)
    assert "asked" not in repr(exact) and exact.info["selection"]["exactly"]


def test_numpy_numbers_and_refusals() -> None:
    numpy = pytest.importorskip("numpy")
    scores = random_scores(GRAPHS["two layers"], 1)
    circuit = scores.select(numpy.int64(6), exactly=True)
    assert circuit == scores.select(6, exactly=True)
    json.dumps(circuit.info)
    json.dumps(scores.select(how="threshold", threshold=numpy.float32(0.5)).info)
    json.dumps(eap.random_circuit(scores.graph, numpy.int16(5), seed=numpy.int64(1)).info)
    with pytest.raises(eap.InputError, match=r"^select\(exactly=True\): expected n_edges, .* found how='threshold'"):
        scores.select(how="threshold", threshold=0.5, exactly=True)
    with pytest.raises(eap.InputError, match=r"^select\(exactly=True\): expected prune=True"):
        scores.select(6, exactly=True, prune=False)
    for wrong in (True, numpy.bool_(True), 6.0, numpy.float64(6), "6", -1, 10**6):
        with pytest.raises(eap.InputError, match=r"^n_edges: expected a whole number from 0 to 23"):
            scores.select(wrong)
