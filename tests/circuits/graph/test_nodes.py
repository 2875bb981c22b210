"""Scores of nodes and of their dimensions: their definition, and what they are used for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import eap_circuits as eap
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import KINDS, fast_by_kind, logit_difference, prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import differences, gradients, plain_run

PATHS = {"eap": [(1.0, 1.0)], "eap-ig-inputs": [(0.5, 0.5), (1.0, 0.5)], "clean-corrupted": [(0.0, 0.5), (1.0, 0.5)]}


CASES = [*((family, "eap-ig-inputs") for family in KINDS), ("gemma2", "eap"), ("gemma2", "clean-corrupted")]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_score_is_the_derivative_of_the_loss_by_what_the_node_writes(
    family, method, make_model, make_pairs, relative
):
    """Σ_t Δ_u(t) ⊙ Σ_k w_k ∂loss/∂c_u(t), by dimension and summed over dimensions."""
    model, data = make_model(family), make_pairs(n=3, longest=7)[[0, 1]]
    decoder = Decoder(model)
    with StayDouble():
        scores = eap.attribute(model, data, method=method, steps=2, keep="neurons").node_scores()
        right = torch.zeros(scores.neurons.shape, dtype=torch.float64)
        for e in range(len(data)):
            x, y = (decoder.embed(tokens) for tokens in prompts(data, e))
            delta = differences(plain_run(decoder, x), plain_run(decoder, y))
            for alpha, weight in PATHS[method]:
                run = plain_run(decoder, torch.lerp(y, x, alpha).requires_grad_())
                slope = gradients(-logit_difference(run.logits, data, e), run.c)
                right += weight * (delta * slope).sum(1) / len(data)
    assert relative(scores.values, right.sum(1)) < 1e-6
    assert float((scores.neurons - right).abs().max()) < 1e-6 * float(scores.neurons.abs().max())


@fast_by_kind
def test_dimensions_sum_to_nodes_and_nodes_do_not_depend_on_the_head_graph(family, make_model, make_pairs, relative):
    """The sum over edges and the gradient summed from the logits down are two ways to the same."""
    model, data = make_model(family), make_pairs(seed=5, n=4)
    kv, query = (eap.attribute(model, data, heads=h, steps=2, keep="neurons") for h in ("kv", "query"))
    assert relative(kv.neurons.sum(1), kv.node_scores().values) < 1e-5
    assert relative(query.node_scores().values, kv.node_scores().values) < 1e-5
    assert relative(query.neurons, kv.neurons) < 1e-5


def test_scores_that_do_not_add_up_are_refused(make_model, make_pairs):
    scores = eap.attribute(make_model("gpt2"), make_pairs(), method="exact", edges=torch.zeros(9, 21).bool())
    with pytest.raises(eap.InputError, match=r"node_scores\(\): expected scores of a gradient method, found 'exact'"):
        scores.node_scores()


GRAPHS = [
    eap.Graph((2, 4), (1, 2), 8),
    eap.Graph((2, 4), (1, 2), 8, heads="query"),
    eap.Graph((3, 3), (3, 3), 8, parallel=True),
]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(GRAPHS), st.data())
def test_a_circuit_of_nodes_is_every_edge_between_them(graph, data):
    values = torch.tensor(data.draw(st.lists(st.integers(-9, 9), min_size=graph.n_senders, max_size=graph.n_senders)))
    scores = eap.NodeScores(graph, values.float())
    n, signed = data.draw(st.integers(0, graph.n_senders - 1)), data.draw(st.booleans())
    circuit = scores.select(n, signed)
    rank = values if signed else values.abs()
    best = sorted(range(1, graph.n_senders), key=lambda u: -int(rank[u]))[:n]
    kept = {"input", *(graph.senders[u] for u in best)}

    def reads(receiver):
        """The nodes that read it: for a key or a value, the query heads of its group."""
        if receiver == "logits" or receiver[0] == "m":
            return {receiver}
        layer, head = (int(x) for x in receiver[1:-3].split(".h"))
        shared = graph.n_heads[layer] // graph.n_kv_heads[layer] if graph.heads == "kv" and receiver[-2] != "q" else 1
        return {f"a{layer}.h{h}" for h in range(head * shared, (head + 1) * shared)}

    right = {
        (sender, receiver)
        for u, sender in enumerate(graph.senders)
        for v, receiver in enumerate(graph.receivers)
        if graph.edge_mask[u, v] and sender in kept and (receiver == "logits" or reads(receiver) & kept)
    }
    assert set(circuit.edges) == right
    assert circuit.pruned() == circuit
    assert circuit.info["selection"] == {"how": "nodes", "n_nodes": n, "signed": signed}


def test_node_circuits_run(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(seed=2)
    scores = eap.attribute(model, data).node_scores()
    everything, some, nothing = (scores.select(n) for n in (len(scores.graph.senders) - 1, 8, 0))
    assert everything.mask.equal(scores.graph.edge_mask)
    assert nothing.edges == [("input", "logits")]
    whole, part, least = eap.evaluate(model, [everything, some, nothing], data)
    assert whole.faithfulness == pytest.approx(1, abs=1e-5)
    assert part.faithfulness != pytest.approx(least.faithfulness, abs=1e-5)


@pytest.mark.parametrize(("n", "found"), [(-1, "-1"), (9, "9"), (True, "True"), (2.0, "2.0")])
def test_numbers_of_nodes_outside_the_graph_are_refused(n, found):
    with pytest.raises(
        eap.InputError,
        match=f"n_nodes: expected a whole number from 0 to 8, the heads and MLPs of the graph, found {found}",
    ):
        eap.NodeScores(GRAPHS[0], torch.zeros(9)).select(n)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(eap.InputError, match="node scores: expected finite values"):
        eap.NodeScores(GRAPHS[0], torch.full((9,), torch.nan)).select(1)


def test_the_strongest_come_first():
    values = torch.arange(9.0) * torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1])
    neurons = torch.zeros(9, 8)
    neurons[3, 5], neurons[7, 0] = -4, 3
    scores = eap.NodeScores(GRAPHS[0], values, neurons)
    assert scores.top_nodes(2) == [("m1", 8.0), ("a1.h3", -7.0)]
    assert scores.top_neurons(2) == [("m0", 5, -4.0), ("a1.h3", 0, 3.0)]
    with pytest.raises(eap.InputError, match=r'neurons: expected scores of attribute\(keep="neurons"\), found none'):
        eap.NodeScores(GRAPHS[0], values).top_neurons()


@pytest.mark.parametrize("neurons", [None, torch.randn(9, 8)])
def test_files(tmp_path, neurons):
    scores = eap.NodeScores(GRAPHS[0], torch.randn(9), neurons, {"method": "eap"})
    scores.save(tmp_path / "nodes.safetensors")
    loaded = eap.NodeScores.load(tmp_path / "nodes.safetensors")
    assert loaded.graph == scores.graph and loaded.info == scores.info and torch.equal(loaded.values, scores.values)
    assert (loaded.neurons is None) == (neurons is None)
    assert neurons is None or torch.equal(loaded.neurons, neurons)
    with pytest.raises(eap.InputError, match=r"found 'eap-circuits/nodes-1'"):
        eap.EdgeScores.load(tmp_path / "nodes.safetensors")
    eap.EdgeScores(GRAPHS[0], torch.zeros(9, 15)).save(tmp_path / "edges.safetensors")
    with pytest.raises(eap.InputError, match=r"edges.safetensors.*expected format 'eap-circuits/nodes-1'"):
        eap.NodeScores.load(tmp_path / "edges.safetensors")


@pytest.mark.parametrize("content", [b"", b"something else", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(eap.InputError, match="expected"):
        eap.NodeScores.load(tmp_path / "x.safetensors")


def test_other_files_are_refused(tmp_path):
    for name in ("x.json", "x.pt"):
        with pytest.raises(eap.InputError, match=r"expected a name ending in \.safetensors"):
            eap.NodeScores.load(tmp_path / name)
    with pytest.raises(eap.InputError, match=r"expected a name ending in \.safetensors, \.json, \.pt"):
        eap.NodeScores(GRAPHS[0], torch.zeros(9)).save(tmp_path / "x.csv")
    with pytest.raises(eap.InputError, match="expected a file, found nothing there"):
        eap.NodeScores.load(tmp_path / "x.safetensors")
    graph = '{"n_heads": [2], "n_kv_heads": [1], "d_model": 8}'
    metadata = {"format": "eap-circuits/nodes-1", "graph": graph, "info": "{}"}
    for tensors, words in (({"x": torch.zeros(4)}, "without values"), ({"values": torch.zeros(3)}, r"shape \[4\]")):
        save_file(tensors, tmp_path / "x.safetensors", metadata=metadata)
        with pytest.raises(eap.InputError, match=words):
            eap.NodeScores.load(tmp_path / "x.safetensors")
