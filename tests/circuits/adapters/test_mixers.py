"""Other mixers than attention with queries, keys and values, what else a layer or a model may be: every method."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.selfcheck import check_model
from tests.circuits.conftest import (
    ENCODERS,
    HYBRIDS,
    MIXERS,
    NEWER,
    pairs_for,
    random_circuit,
    random_edges,
    tiny_model,
)
from tests.circuits.untouched import snapshot

# A scan that does not go on from a state with several tokens, and a cache of what an index of keys reads.
ANEW = {"axk2", "jamba", "mamba", "minimax"}
# Before the residual stream begins, a norm reads positions too.
PLACED = {"bart", "bert"}
REWRITING = {"bart", "bert", "marian", "minimax", *ENCODERS} - {"modernbert", "modernbert-classes", "llama-classes"}
pytestmark = pytest.mark.filterwarnings("ignore:.*prefixes are not reused")


@pytest.fixture(params=[*MIXERS, *ENCODERS, *NEWER, *HYBRIDS])
def mixer(request):
    return request.param


def test_self_check_passes(mixer):
    checks = check_model(tiny_model(mixer), n_edges=4)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert ("prefix reuse" in {check.name for check in checks}) == (
        mixer in ANEW | PLACED | {*ENCODERS} - {"llama-classes"}
    )


def test_an_edge_alone_corrupted_is_the_circuit_without_it(mixer):
    model, data = tiny_model(mixer), pairs_for(mixer)
    scores = eap.attribute(model, data, method="exact")
    edges = random_edges(scores.graph, 5)
    circuits = []
    for edge in edges:
        mask = scores.graph.edge_mask.clone()
        mask[edge] = False
        circuits.append(eap.Circuit.from_mask(scores.graph, mask))
    found = torch.tensor([r.clean - r.mean for r in eap.evaluate(model, circuits, data)])
    right = torch.stack([scores.values[edge] for edge in edges])
    assert (found - right).abs().max() < 1e-5 * scores.values.abs().max()


@pytest.mark.parametrize(
    "method", ["clean-corrupted", "eap-ig-activations", "eap-conductance", "eap-gp", "information-flow-routes"]
)
def test_methods_run_and_leave_the_model_untouched(mixer, method):
    model, data = tiny_model(mixer), pairs_for(mixer)
    before = snapshot(model)
    scores = eap.attribute(model, data, method=method)
    assert scores.values.isfinite().all() and scores.values.any()
    if method == "information-flow-routes":  # shares of what each receiver reads
        shares = scores.values.sum(0)
        # A block that rewrites the residual stream leaves so little of it that at some tokens no sender is near.
        assert (shares < 1 + 1e-5).all() and (mixer in REWRITING or torch.allclose(shares, torch.ones(len(shares))))
    assert snapshot(model) == before


def test_circuits_of_every_size_and_ablation(mixer, tmp_path):
    model, data = tiny_model(mixer), pairs_for(mixer)
    scores = eap.attribute(model, data, method="eap")
    graph = scores.graph
    full = eap.Circuit.from_mask(graph, graph.edge_mask)
    some = [random_circuit(graph, seed, 0.6) for seed in range(2)]
    for ablation in ("patching", "zero", "mean"):
        results = eap.evaluate(model, [full, *some], data, ablation=ablation)
        assert results[0].faithfulness == pytest.approx(1, abs=1e-6)
        alone = eap.evaluate(model, some[1], data, ablation=ablation)  # together or alone: the same
        torch.testing.assert_close(alone.values, results[2].values, rtol=1e-5, atol=1e-6)
    scores.save(tmp_path / "scores.safetensors")
    loaded = eap.EdgeScores.load(tmp_path / "scores.safetensors")
    assert loaded.graph == graph and torch.equal(loaded.values, scores.values)
