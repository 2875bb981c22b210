"""Exact scores: each edge alone corrupted, against circuits of all edges but one; interruption and going on."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.methods.exact import method as exact
from tests.circuits.conftest import circuit_of, fast_by_kind, random_edges


def all_but_one(model, data, graph, edges):
    """m(clean) − m(all edges but one), mean over examples, by the circuit run."""
    circuits = []
    for u, v in edges:
        mask = graph.edge_mask.clone()
        mask[u, v] = False
        circuits.append(eap.Circuit.from_mask(graph, mask))
    return torch.tensor([result.clean - result.mean for result in eap.evaluate(model, circuits, data)])


@fast_by_kind
@pytest.mark.parametrize("heads", ["kv", "query"])
def test_an_edge_alone_corrupted_is_the_circuit_without_it(family, heads, make_model, make_pairs, relative):
    model, data = make_model(family), make_pairs(seed=5)
    graph = eap.attribute(model, data[:1], method="eap", heads=heads).graph
    edges = random_edges(graph, 15, seed=2)
    chosen = circuit_of(graph, edges)
    scores = eap.attribute(model, data, method="exact", heads=heads, edges=chosen)
    found = torch.stack([scores.values[u, v].double() for u, v in edges])
    # Some norms compute in float32 whatever the model's dtype.
    assert relative(found, all_but_one(model, data, graph, edges)) < 1e-5
    assert not scores.values[~chosen.mask].any() and scores.info["edges"] == 15


@pytest.mark.parametrize("settings", [{"batch_size": 2}, {"reuse_prefix": False}, {"together": 1}])
def test_scores_do_not_depend_on_batching(settings, make_model, make_pairs, relative, monkeypatch):
    model, data = make_model("gpt2"), make_pairs(seed=6)
    right = eap.attribute(model, data, method="exact")
    monkeypatch.setattr(exact, "TOKENS_TOGETHER", settings.pop("together", 64))
    found = eap.attribute(model, data, method="exact", **settings)
    assert relative(found.values, right.values) < 1e-6
    assert found.info["steps"] is None and "edges" not in found.info


def test_scores_of_a_circuits_edges(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs()
    approximate = eap.attribute(model, data)
    circuit = approximate.select(30)
    found = eap.attribute(model, data, method="exact", edges=circuit)
    whole = eap.attribute(model, data, method="exact")
    assert torch.equal(found.values != 0, circuit.mask & (found.values != 0))
    scale = float(whole.values.abs().max())
    assert float((found.values - whole.values)[circuit.mask].abs().max()) < 1e-6 * scale


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_run_goes_on(after, tmp_path, make_model, make_pairs, relative, monkeypatch):
    """What was measured before the interruption is neither lost nor counted twice."""
    model, data = make_model("gpt2"), make_pairs(seed=7)
    right = eap.attribute(model, data, method="exact", batch_size=3)
    monkeypatch.setattr("eap_circuits.checkpoint.file.SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(exact, "TOKENS_TOGETHER", 256)
    file, calls = tmp_path / "exact.safetensors", []

    def stop(done, of):
        calls.append((done, of))
        if len(calls) == after:
            raise Stop

    with pytest.raises(Stop):
        eap.attribute(model, data, method="exact", batch_size=3, checkpoint=file, progress=stop)
    first = len(calls)
    found = eap.attribute(model, data, method="exact", batch_size=3, checkpoint=file, progress=stop)
    assert relative(found.values, right.values) < 1e-6
    everything = len(calls) - first
    calls.clear()
    whole = eap.attribute(model, data, method="exact", batch_size=3, progress=lambda *x: calls.append(x))
    assert relative(whole.values, right.values) < 1e-6
    n_edges = int(right.graph.edge_mask.sum())
    assert everything == len(calls) - first and calls[-1] == (n_edges, n_edges)
    assert calls == sorted(calls)
    # Done already: nothing runs again.
    monkeypatch.setattr(exact, "prepare_patching", None)
    again = eap.attribute(model, data, method="exact", batch_size=3, checkpoint=file)
    assert torch.equal(again.values, found.values)


@pytest.mark.parametrize("change", ["data", "embedding", "layer", "metric", "file"])
def test_another_requests_checkpoint_is_refused_and_kept(change, tmp_path, make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs(seed=7)
    file = tmp_path / "exact.safetensors"
    edges = eap.attribute(model, data, method="eap").select(3)
    given = {"method": "exact", "edges": edges, "checkpoint": file}
    eap.attribute(model, data, **given)
    if change == "data":
        data = make_pairs(seed=8)
    elif change == "embedding":
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
    elif change == "layer":
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
    elif change == "metric":
        given["metric"] = "prob_diff"
    else:
        file.write_bytes(b"something else")
    before = file.read_bytes()
    with pytest.raises(eap.InputError, match=r"exact\.safetensors: expected a checkpoint"):
        eap.attribute(model, data, **given)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "eap", "edges": torch.zeros(2, 2, dtype=torch.bool)}, "edges: expected None, except for"),
        ({"method": "eap", "checkpoint": "x.pt"}, "checkpoint: expected a name ending in .safetensors"),
        ({"edges": torch.zeros(2, 2, dtype=torch.bool)}, "edges: expected a circuit or a bool mask"),
        ({"edges": [("m0", "logits")]}, "edges: expected a circuit or a bool mask"),
        ({"checkpoint": "scores.json"}, "checkpoint: expected a name ending in .safetensors"),
        ({"checkpoint": "/no/such/folder/x.safetensors"}, "expected a folder that exists"),
    ],
)
def test_bad_requests_are_one_sentence(settings, words, make_model, make_pairs):
    with pytest.raises(eap.InputError, match=words):
        eap.attribute(make_model("gpt2"), make_pairs(), **{"method": "exact", **settings})
