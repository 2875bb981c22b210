"""Selection and pruning, against the published package's circuits and against brute force."""

from __future__ import annotations

import math
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from eap_circuits import Circuit, EdgeScores, Graph, InputError
from eap_circuits.graph import prune

DATA = Path(__file__).parents[2] / "parity" / "data"
GRAPHS = {
    "gpt2": Graph((4,) * 3, (4,) * 3, 32, heads="query"),
    "llama": Graph((4,) * 3, (2,) * 3, 32, heads="query"),
    "qwen2": Graph((4,) * 3, (2,) * 3, 32, heads="query"),
}


@pytest.mark.parametrize("percent", [2, 5, 10, 20, 50, 100])
@pytest.mark.parametrize(("how", "name"), [("top", "topn"), ("greedy", "greedy")])
@pytest.mark.parametrize("family", sorted(GRAPHS))
def test_circuits_are_those_of_the_published_package(family: str, how: str, name: str, percent: int) -> None:
    graph, oracle = GRAPHS[family], load_file(DATA / family / "oracle.safetensors")
    scores = EdgeScores(graph, oracle["scores.eap_ig_inputs"])
    circuit = scores.select(int(graph.n_edges * percent / 100), how=how)
    assert torch.equal(circuit.mask, oracle[f"circuit.{name}.{percent}"])


@pytest.mark.parametrize("n_edges", [500, 2000, 8000, 30000])
@pytest.mark.parametrize("method", ["eap", "eap_ig_inputs"])
def test_circuit_sizes_in_smollm2_are_those_of_the_published_package(method: str, n_edges: int) -> None:
    oracle = load_file(DATA / "smollm2-ioi.safetensors")
    scores = EdgeScores(Graph((9,) * 30, (3,) * 30, 576, heads="query"), oracle[f"scores.{method}"])
    assert scores.select(n_edges).n_edges == oracle[f"n_edges.{method}.{n_edges}"].item()


# Random graphs, scores and masks.

graphs = st.builds(
    lambda shape, parallel, heads: Graph(tuple(h for h, _ in shape), tuple(g for _, g in shape), 8, parallel, heads),
    st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 2)).map(lambda gn: (gn[0] * gn[1], gn[0])),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
    st.sampled_from(["kv", "query"]),
)
seeds = st.integers(0, 2**31)
densities = st.sampled_from([0.05, 0.15, 0.3, 0.6])


def random_scores(graph: Graph, seed: int) -> EdgeScores:
    """Scores of which no two have the same absolute value, and garbage where there is no edge."""
    generator = torch.Generator().manual_seed(seed)
    n = graph.edge_mask.numel()
    sizes = (1 + torch.randperm(n, generator=generator)).float() / n
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    values = (sizes * signs).view_as(graph.edge_mask)
    return EdgeScores(graph, values.masked_fill(~graph.edge_mask, math.nan))


def random_mask(graph: Graph, seed: int, density: float) -> Tensor:
    noise = torch.rand(graph.edge_mask.shape, generator=torch.Generator().manual_seed(seed))
    return (noise < density) & graph.edge_mask


def owners(graph: Graph, receiver: str) -> list[str]:
    """The nodes a receiver is an input of, from its name alone."""
    if "<" not in receiver:
        return [receiver]
    head, letter = receiver[:-1].split("<")
    layer, number = (int(part) for part in head[1:].split(".h"))
    if letter == "q" or graph.heads == "query":
        return [head]
    group = graph.n_heads[layer] // graph.n_kv_heads[layer]
    return [f"a{layer}.h{h}" for h in range(number * group, (number + 1) * group)]


def on_a_path(graph: Graph, mask: Tensor) -> Tensor:
    """The edges of `mask` on a path from input to logits, by graph search."""
    kept = [(graph.senders[u], graph.receivers[v], u, v) for u, v in mask.nonzero().tolist()]
    nodes = nx.DiGraph([(sender, node) for sender, receiver, *_ in kept for node in owners(graph, receiver)])
    nodes.add_nodes_from(["input", "logits"])
    fed = nx.descendants(nodes, "input") | {"input"}
    leading = nx.ancestors(nodes, "logits") | {"logits"}
    found = torch.zeros_like(mask)
    for sender, receiver, u, v in kept:
        found[u, v] = sender in fed and not leading.isdisjoint(owners(graph, receiver))
    return found


@settings(deadline=None, max_examples=150)
@given(graphs, seeds, densities)
def test_prune_keeps_exactly_the_edges_on_a_path(graph: Graph, seed: int, density: float) -> None:
    mask = random_mask(graph, seed, density)
    pruned = prune(graph, mask)
    assert torch.equal(pruned, on_a_path(graph, mask))
    assert torch.equal(prune(graph, pruned), pruned)


@settings(deadline=None, max_examples=50)
@given(graphs, seeds, densities)
def test_prune_is_monotone_and_leaves_its_argument(graph: Graph, seed: int, density: float) -> None:
    more = random_mask(graph, seed, density)
    fewer = more & random_mask(graph, seed + 1, 0.7)
    before = more.clone()
    assert not (prune(graph, fewer) & ~prune(graph, more)).any()
    assert torch.equal(more, before)


@settings(deadline=None, max_examples=50)
@given(graphs, seeds, st.data(), st.booleans())
def test_top_keeps_the_n_largest(graph: Graph, seed: int, data: st.DataObject, signed: bool) -> None:
    n = data.draw(st.integers(0, graph.n_edges))
    scores = random_scores(graph, seed)
    circuit = scores.select(n, signed=signed, prune=False)
    rank = scores.values if signed else scores.values.abs()
    largest = rank[graph.edge_mask].sort(descending=True).values[:n]
    assert torch.equal(rank[circuit.mask].sort(descending=True).values, largest)
    assert torch.equal(scores.select(n, signed=signed).mask, prune(graph, circuit.mask))


def greedy_by_hand(graph: Graph, rank: Tensor, n: int) -> Tensor:
    reached, mask = {"logits"}, torch.zeros_like(graph.edge_mask)
    for _ in range(n):
        candidates = [
            (rank[u, v].item(), u, v)
            for u, v in (graph.edge_mask & ~mask).nonzero().tolist()
            if not reached.isdisjoint(owners(graph, graph.receivers[v]))
        ]
        if not candidates:
            break
        _, u, v = max(candidates)
        mask[u, v] = True
        reached.add(graph.senders[u])
    return mask


@settings(deadline=None, max_examples=40)
@given(graphs, seeds, st.data(), st.booleans())
def test_greedy_equals_brute_force(graph: Graph, seed: int, data: st.DataObject, signed: bool) -> None:
    n = data.draw(st.integers(0, min(graph.n_edges, 25)))
    scores = random_scores(graph, seed)
    rank = scores.values if signed else scores.values.abs()
    circuit = scores.select(n, how="greedy", signed=signed, prune=False)
    assert torch.equal(circuit.mask, greedy_by_hand(graph, rank, n))


@settings(deadline=None, max_examples=30)
@given(graphs, seeds)
def test_every_selection_of_all_edges_is_the_graph(graph: Graph, seed: int) -> None:
    scores = random_scores(graph, seed)
    for how in ("top", "greedy"):
        assert torch.equal(scores.select(graph.n_edges, how=how).mask, graph.edge_mask)
    assert torch.equal(scores.select(how="threshold", threshold=0).mask, graph.edge_mask)


@settings(deadline=None, max_examples=30)
@given(graphs, seeds, st.floats(-1, 1), st.booleans())
def test_threshold_keeps_every_score_from_it_up(graph: Graph, seed: int, least: float, signed: bool) -> None:
    scores = random_scores(graph, seed)
    rank = scores.values if signed else scores.values.abs()
    circuit = scores.select(how="threshold", threshold=least, signed=signed, prune=False)
    assert torch.equal(circuit.mask, (rank >= least) & graph.edge_mask)


def test_equal_scores_are_taken_in_order() -> None:
    graph = Graph((1,), (1,), 8)
    circuit = EdgeScores(graph, torch.ones(3, 5)).select(2, prune=False)
    assert circuit.edges == [("input", "a0.h0<q>"), ("input", "a0.h0<k>")]


def test_a_circuit_records_how_it_was_chosen() -> None:
    graph = Graph((1,), (1,), 8)
    circuit = EdgeScores(graph, torch.ones(3, 5), {"method": "eap"}).select(4, how="greedy", signed=True)
    assert circuit.info == {
        "method": "eap",
        "selection": {"how": "greedy", "n_edges": 4, "threshold": None, "signed": True},
    }
    assert circuit.values is not None
    assert torch.equal(circuit.values, torch.ones(3, 5))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_edges": 3, "how": "best"}, "^how: expected one of 'greedy', 'optimal', 'threshold', 'top', found 'best'"),
        ({"n_edges": 9}, "^n_edges: expected a whole number from 0 to 8, .* found 9"),
        ({"n_edges": -1, "how": "greedy"}, "^n_edges: expected a whole number from 0 to 8, .* found -1"),
        ({"n_edges": torch.tensor([1, 2])}, "^n_edges: expected a whole number from 0 to 8, .* found tensor"),
        ({}, "a whole number n_edges .* found n_edges=None"),
        ({"n_edges": 2.0}, "^n_edges: expected a whole number .* found 2.0"),
        ({"n_edges": True}, "^n_edges: expected a whole number .* found True"),
        ({"n_edges": 3, "threshold": 0.1}, "no threshold, found n_edges=3, threshold=0.1"),
        ({"how": "threshold"}, "threshold= and no n_edges, found threshold=None"),
        ({"how": "threshold", "threshold": 0.1, "n_edges": 3}, "found threshold=0.1, n_edges=3"),
        ({"n_edges": 3, "positive_ratio": 1.1}, "^positive_ratio: expected a share from 0 to 1, found 1.1"),
        ({"n_edges": 3, "positive_ratio": 0.5, "signed": True}, "with how='top' and signed=False"),
        ({"n_edges": 3, "positive_ratio": 0.5, "how": "greedy"}, "with how='top' and signed=False"),
        ({"n_edges": 3, "among": torch.ones(3, 4, dtype=torch.bool)}, r"^among: expected shape \[3, 5\]"),
        ({"n_edges": 3, "among": torch.ones(3, 5)}, r"^among: expected a bool tensor, found torch.float32"),
        ({"n_edges": 3, "how": "optimal", "seconds": "1"}, "^seconds: expected a number of at least 0, found '1'"),
        ({"n_edges": 3, "exactly": True, "seconds": -1}, "^seconds: expected a number of at least 0, found -1"),
    ],
)
def test_a_selection_that_cannot_be(wrong: dict[str, object], message: str) -> None:
    scores = EdgeScores(Graph((1,), (1,), 8), torch.ones(3, 5))
    assert scores.graph.n_edges == 8
    with pytest.raises(InputError, match=message):
        scores.select(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_not_ranked(value: float) -> None:
    graph = Graph((1,), (1,), 8)
    values = torch.ones(3, 5)
    values[1, 3] = value
    with pytest.raises(InputError, match=rf"^scores: expected finite values, found {value} at a0.h0->m0\.$"):
        EdgeScores(graph, values).select(2)


def test_a_circuit_without_a_path_is_empty() -> None:
    graph = Graph((1,), (1,), 8)
    mask = torch.zeros_like(graph.edge_mask)
    mask[0, 0] = True  # input -> a0.h0<q>, which leads nowhere
    mask[2, 4] = True  # m0 -> logits, which nothing feeds
    assert Circuit.from_mask(graph, mask).pruned().n_edges == 0


@settings(deadline=None, max_examples=40)
@given(graphs, seeds, st.floats(0, 1), st.data())
def test_a_share_of_positive_edges_first(graph: Graph, seed: int, ratio: float, data: st.DataObject) -> None:
    scores = random_scores(graph, seed)
    n = data.draw(st.integers(0, graph.n_edges))
    circuit = scores.select(n, positive_ratio=ratio, prune=False)
    ranked = sorted((float(scores.values[u, v]), u, v) for u, v in graph.edge_mask.nonzero().tolist())[::-1]
    first = [entry for entry in ranked if entry[0] > 0][: round(ratio * n)]
    rest = sorted((entry for entry in ranked if entry not in first), key=lambda entry: -abs(entry[0]))
    assert {tuple(edge) for edge in circuit.mask.nonzero().tolist()} == {
        entry[1:] for entry in (first + rest[: n - len(first)])
    }
    assert circuit.info["selection"]["positive_ratio"] == ratio


@settings(deadline=None, max_examples=40)
@given(graphs, seeds, st.sampled_from(["top", "greedy", "threshold"]), st.booleans(), st.floats(0, 1))
def test_only_edges_among_those_allowed(graph: Graph, seed: int, how: str, signed: bool, share: float) -> None:
    scores = random_scores(graph, seed)
    among = torch.rand(graph.edge_mask.shape, generator=torch.Generator().manual_seed(seed)) < share
    chosen: dict[str, float] = {"threshold": -9.0} if how == "threshold" else {"n_edges": graph.n_edges}
    circuit = scores.select(how=how, signed=signed, among=among, prune=False, **chosen)  # type: ignore[arg-type]
    assert not (circuit.mask & ~among).any()
    if how != "greedy":
        assert torch.equal(circuit.mask, among & graph.edge_mask)
    assert circuit.info["selection"]["among"] == int((among & graph.edge_mask).sum())
