"""Names, order and reach of a graph's nodes, by hand and as the published EAP-IG package has them."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from eap_circuits import Circuit, Graph, InputError
from eap_circuits.edges import layer_name
from eap_circuits.graph import prune

DATA = Path(__file__).parents[2] / "parity" / "data"


def oracle_graph(family: str) -> Graph:
    config = json.loads((DATA / family / "config.json").read_text())
    if family == "gpt2":
        layers, heads, kv, width = config["n_layer"], config["n_head"], config["n_head"], config["n_embd"]
    else:
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        kv, width = config["num_key_value_heads"], config["hidden_size"]
    return Graph((heads,) * layers, (kv,) * layers, width, heads="query")


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_nodes_and_edges_are_those_of_the_published_package(family: str) -> None:
    graph = oracle_graph(family)
    oracle = json.loads((DATA / family / "oracle.json").read_text())
    assert graph.senders == oracle["senders"]
    assert graph.receivers == oracle["receivers"]
    assert graph.n_edges == oracle["n_edges"]
    assert torch.equal(graph.edge_mask, load_file(DATA / family / "oracle.safetensors")["real_edges"])


@pytest.mark.parametrize("made_in", [nullcontext, torch.inference_mode])
def test_a_mask_changed_in_place_changes_no_graph(made_in: Callable[[], AbstractContextManager[None]]) -> None:
    graph = Graph((2, 2), (1, 1), d_model=8)
    with made_in():
        mask = graph.edge_mask
    kept = mask.clone()
    assert mask is graph.edge_mask and not mask.is_inference()
    mask[3] = False
    without = Circuit.from_mask(graph, mask)
    assert torch.equal(graph.edge_mask, kept) and int(kept.sum()) == graph.n_edges
    assert without.n_edges == graph.n_edges - int(kept[3].sum())
    assert torch.equal(without.complement().mask, kept & (torch.arange(7) == 3)[:, None])
    for again in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert again == graph and torch.equal(again.edge_mask, kept)


@pytest.mark.parametrize("encoder", [0, 1])
def test_a_mask_changed_in_place_changes_no_copy(encoder: int) -> None:
    graph = Graph((2, 2, 2), (2, 2, 2), d_model=8, encoder=encoder, mlps=(True, False, True))
    kept = graph.edge_mask.clone()
    for copied in (copy.deepcopy, copy.copy, lambda it: pickle.loads(pickle.dumps(it))):
        graph.edge_mask[:] = False
        assert torch.equal(copied(graph).edge_mask, kept)


def test_a_small_graph_by_hand() -> None:
    graph = Graph((2, 2), (1, 1), d_model=8)
    assert graph.senders == ["input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
    assert graph.receivers == [
        *["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h0<v>", "m0"],
        *["a1.h0<q>", "a1.h1<q>", "a1.h0<k>", "a1.h0<v>", "m1"],
        "logits",
    ]
    assert graph.reach.tolist() == [1, 1, 1, 1, 3, 4, 4, 4, 4, 6, 7]
    assert graph.n_edges == 36
    assert graph.edge_name(2, 4) == "a0.h1->m0"
    assert graph.head_senders(1) == slice(4, 6)
    assert graph.mlp_sender(1) == 6
    assert [graph.receivers_at(1, site) for site in ("q", "k", "v", "mlp")] == [
        *[slice(5, 7), slice(7, 8), slice(8, 9), slice(9, 10)],
    ]
    assert graph.logits_receiver == slice(10, 11)


def test_query_heads_have_their_own_keys_and_values() -> None:
    graph = Graph((2,), (1,), d_model=8, heads="query")
    assert graph.receivers == [
        *["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>", "m0", "logits"]
    ]
    assert graph.kv_receiver.tolist() == [0, 1, 2, 2, 3, 3, 4, 5]


def test_attention_and_mlp_of_a_parallel_layer_see_the_same_senders() -> None:
    graph = Graph((2, 2), (2, 2), d_model=8, parallel=True)
    assert graph.reach.tolist() == [*[1] * 7, *[4] * 7, 7]


def test_layers_may_differ_in_heads() -> None:
    graph = Graph((4, 2), (2, 1), d_model=8)
    assert graph.senders == ["input", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0", "a1.h0", "a1.h1", "m1"]
    assert graph.reach.tolist() == [*[1] * 8, 5, *[6] * 4, 8, 9]


def test_inputs_of_a_group_belong_to_all_of_its_heads() -> None:
    graph = Graph((4,), (2,), d_model=8)
    pairs = {(graph.receivers[v], graph.senders[u]) for v, u in zip(*graph.inputs_of, strict=True)}
    assert pairs == {
        *[("a0.h0<q>", "a0.h0"), ("a0.h1<q>", "a0.h1"), ("a0.h2<q>", "a0.h2"), ("a0.h3<q>", "a0.h3")],
        *[("a0.h0<k>", "a0.h0"), ("a0.h0<k>", "a0.h1"), ("a0.h1<k>", "a0.h2"), ("a0.h1<k>", "a0.h3")],
        *[("a0.h0<v>", "a0.h0"), ("a0.h0<v>", "a0.h1"), ("a0.h1<v>", "a0.h2"), ("a0.h1<v>", "a0.h3")],
        ("m0", "m0"),
    }


layers = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda gn: (gn[0] * gn[1], gn[0])),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=40)
@given(layers, st.booleans(), st.sampled_from(["kv", "query"]))
def test_an_edge_goes_forward_and_every_forward_pair_is_one(
    shape: list[tuple[int, int]], parallel: bool, heads: str
) -> None:
    graph = Graph(tuple(h for h, _ in shape), tuple(g for _, g in shape), 8, parallel, heads)  # type: ignore[arg-type]

    def depth(name: str) -> float:
        if name in ("input", "logits"):
            return -1 if name == "input" else 99
        layer = int(name[1:].partition(".")[0])
        return layer + (0.5 if name.startswith("m") and not parallel else 0)

    assert len(set(graph.senders)) == graph.n_senders == len(graph.edge_mask)
    assert len(set(graph.receivers)) == graph.n_receivers == graph.edge_mask.shape[1]
    for u, sender in enumerate(graph.senders):
        for v, receiver in enumerate(graph.receivers):
            assert bool(graph.edge_mask[u, v]) == (depth(sender) < depth(receiver))


def test_dict_round_trip_and_equality() -> None:
    graph = Graph((4, 2), (2, 1), 8, True, "query")
    assert Graph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph
    assert graph.with_heads("kv") != graph
    assert graph.with_heads("kv").with_heads("query") == graph


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_heads": (), "n_kv_heads": ()},
        {"n_heads": (2, 2), "n_kv_heads": (2,)},
        {"n_heads": (4,), "n_kv_heads": (3,)},
        {"n_heads": (4,), "n_kv_heads": (0,)},
        {"n_heads": (4,), "n_kv_heads": (4,), "heads": "group"},
    ],
)
def test_a_graph_that_cannot_be(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"^\w+: expected .*, found .*\.$"):
        Graph(**wrong, d_model=8)  # type: ignore[arg-type]


def test_a_graph_of_an_8b_model_is_arithmetic() -> None:
    graph = Graph((32,) * 32, (8,) * 32, 4096)
    assert graph.n_senders == 1 + 32 * 33
    assert graph.n_receivers == 32 * (32 + 8 + 8 + 1) + 1
    assert graph.n_edges == sum(48 * (1 + 33 * layer) + 1 + 33 * layer + 32 for layer in range(32)) + 1 + 32 * 33


def test_layers_with_other_inputs():
    """Latents shared by all heads, a gate for each, and layers with the usual three: names, reach and both graphs."""
    reads = ((("q", 1), ("kv", 1)), None, (("q", 4), ("k", 2), ("v", 2), ("gate", 4)))
    graph = Graph((4, 4, 4), (4, 2, 2), 8, reads=reads)
    assert graph.receivers[:3] == ["a0<q>", "a0<kv>", "m0"]
    assert graph.receivers[-6:] == ["a2.h0<gate>", "a2.h1<gate>", "a2.h2<gate>", "a2.h3<gate>", "m2", "logits"]
    assert graph.n_receivers == 3 + 9 + 13 + 1 and graph.reach.tolist()[:3] == [1, 1, 5]
    query = graph.with_heads("query")
    assert query.n_receivers == 3 + 13 + 17 + 1 and query.receivers[:3] == graph.receivers[:3]
    receivers, senders = graph.inputs_of
    shared = graph.receivers.index("a0<kv>")
    assert [graph.senders[u] for u in senders[receivers == shared]] == ["a0.h0", "a0.h1", "a0.h2", "a0.h3"]
    values = torch.rand(graph.n_senders, graph.n_receivers)
    torch.testing.assert_close(graph.to_kv(graph.to_query(values)), values)
    assert Graph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph
    assert graph != Graph((4, 4, 4), (4, 2, 2), 8)
    assert Graph((4,), (2,), 8, reads=(None,)) == Graph((4,), (2,), 8)


def test_parts_of_layers_and_keys_of_earlier_ones():
    """Layers of the model keep their numbers, and what needs an earlier layer's keys has them as inputs."""
    reads = (None, None, (("q", 4),), None)
    graph = Graph((4, 0, 4, 0), (2, 0, 2, 0), 8, reads=reads, keys=(0, 1, 0, 3), per_layer=(False, True) * 2)
    names = [*(f"a0.h{h}" for h in range(4)), "m0", "p0", *(f"a1.h{h}" for h in range(4)), "m1", "p1"]
    assert graph.senders == ["input", *names] and graph.numbers == (0, 0, 1, 1)
    assert graph.receivers[8:] == ["m0", "p0", *(f"a1.h{h}<q>" for h in range(4)), "m1", "p1", "logits"]
    assert [layer_name(graph, layer) for layer in range(4)] == ["layer 0", "p0", "layer 1", "p1"]
    inputs = {name: [graph.receivers[v] for v in graph.inputs[u]] for u, name in enumerate(graph.senders)}
    assert inputs["a1.h1"] == ["a1.h1<q>", "a0.h0<k>", "a0.h0<v>"] and inputs["p1"] == ["p1"]
    assert inputs["a1.h2"] == ["a1.h2<q>", "a0.h1<k>", "a0.h1<v>"]
    query = graph.with_heads("query")
    assert [query.receivers[v] for v in query.inputs[query.senders.index("a1.h1")]][1:] == ["a0.h1<k>", "a0.h1<v>"]
    values = torch.rand(graph.n_senders, graph.n_receivers)
    torch.testing.assert_close(graph.to_kv(graph.to_query(values)), values)
    assert Graph.from_dict(json.loads(json.dumps(graph.to_dict()))) == graph
    assert graph != Graph((4, 0, 4, 0), (2, 0, 2, 0), 8, reads=reads)


def test_paths_begin_at_per_layer_embeddings_too():
    graph = Graph((1, 0), (1, 0), 8, per_layer=(False, True))
    mask = torch.zeros_like(graph.edge_mask)
    mask[graph.senders.index("p0"), -1] = True
    assert torch.equal(prune(graph, mask), mask) and graph.connected(mask).tolist() == [False, False, False, True]
    mask = torch.zeros_like(graph.edge_mask)
    mask[graph.senders.index("m0"), graph.receivers.index("p0")] = True
    assert not prune(graph, mask).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"keys": (1, 1)},
        {"keys": (0,)},
        {"per_layer": (True, False)},
        {"per_layer": (False, True)},
        {"per_layer": (1.5, 0)},
    ],
)
def test_parts_and_keys_that_do_not_fit_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Graph((4, 4), (2, 2), 8, **wrong)


@pytest.mark.parametrize(
    "reads", [5, "ab", ((("q", 3),),), ((("q", 1), ("q", 1)),), ((("mlp", 1),),), (None, None), ((("q", 0),),)]
)
def test_other_inputs_that_do_not_fit_are_refused(reads):
    with pytest.raises(InputError, match="reads"):
        Graph((4,), (2,), 8, reads=reads)


def test_mixers_side_by_side_and_layers_of_one_block():
    reads, more = (
        (None, (("in", 1),), None, None),
        {"mlps": (False, True, False, True), "beside": (False, True, False, False)},
    )
    graph = Graph((2, 3, 1, 0), (1, 3, 1, 1), 8, reads=reads, **more)
    assert graph.senders == ["input", "a0.h0", "a0.h1", "b0.h0", "b0.h1", "b0.h2", "m0", "a1.h0", "m2"]
    seen = {name: graph.senders[: int(graph.reach[v])] for v, name in enumerate(graph.receivers)}
    assert seen["a0.h1<q>"] == seen["a0.h0<k>"] == seen["b0<in>"] == ["input"]
    assert seen["m0"] == ["input", "a0.h0", "a0.h1", "b0.h0", "b0.h1", "b0.h2"]
    assert seen["a1.h0<q>"] == [*seen["m0"], "m0"]
    assert seen["m2"] == [*seen["a1.h0<q>"], "a1.h0"]
    assert graph.inputs[graph.senders.index("b0.h2")] == [graph.receivers.index("b0<in>")]
    assert graph.edge_mask.sum() == graph.n_edges == sum(map(len, seen.values()))
    assert Graph.from_dict(graph.to_dict()) == graph
    parallel = replace(graph, parallel=True)
    assert parallel.reach[parallel.receivers.index("m0")] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"mlps": (True,)},
        {"mlps": (True, False)},
        {"beside": (True, False)},
        {"beside": (False, True)},
        {"beside": (False, True), "n_heads": (2, 2), "n_kv_heads": (1, 1)},
    ],
)
def test_layers_that_lack_what_stands_beside_them_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Graph(**{"n_heads": (2, 0), "n_kv_heads": (1, 0), "d_model": 8, **wrong})
