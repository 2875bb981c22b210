"""Scores where a circuit runs: the gradient of its mask, against the run that is written out, and against EAP."""

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import logit_difference, prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import of_circuit, plain_run


def some_circuit(graph, seed=0):
    """Of the receivers some read nothing, some everything; some edges lead nowhere."""
    mask = torch.rand(graph.edge_mask.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    return eap.Circuit(graph, mask & graph.edge_mask)


def plain_metric(decoder, mask, data):
    """The mean logit difference of the circuit's run, with a gradient in its mask."""
    values = []
    for e in range(len(data)):
        clean, corrupted = (decoder.embed(tokens) for tokens in prompts(data, e))
        run = plain_run(decoder, clean, of_circuit(mask, plain_run(decoder, corrupted).c))
        values.append(logit_difference(run.logits, data, e))
    return torch.stack(values).mean()


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_they_are_the_gradient_of_the_circuit_s_mask(heads, kind, make_model, make_pairs, relative):
    """At edges that it keeps, and at those that it does not."""
    model, data = make_model(kind), make_pairs(seed=4, n=3)
    circuit = some_circuit(bind(model).graph(heads))
    edges = circuit.graph.edge_mask
    with StayDouble():
        found = eap.attribute_circuit(model, circuit, data)
        mask = circuit.mask.double().requires_grad_()
        (right,) = torch.autograd.grad(plain_metric(Decoder(model, heads), mask, data), mask)
    assert right[circuit.mask].any() and right[edges & ~circuit.mask].any()
    assert relative(found.values[edges], right[edges]) < 1e-6


def test_they_are_finite_differences_of_the_metric(make_model, make_pairs):
    model, data, step = make_model("llama"), make_pairs(seed=5, n=2), 1e-5
    decoder, circuit = Decoder(model, "kv"), some_circuit(bind(model).graph("kv"))
    with StayDouble():
        found = eap.attribute_circuit(model, circuit, data).values
        for seed in range(3):
            move = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)).double()
            move *= circuit.graph.edge_mask
            with torch.no_grad():
                high, low = (plain_metric(decoder, circuit.mask + sign * step * move, data) for sign in (1, -1))
            # float32 storage of the scores is the largest error.
            assert abs((found * move).sum() - (high - low) / (2 * step)) < 1e-6 * (found * move).abs().sum()


@pytest.mark.parametrize("ablation", ["patching", "zero", "mean"])
def test_of_all_edges_they_are_those_of_eap(ablation, make_model, make_pairs, relative):
    model, data = make_model("gemma2"), make_pairs(seed=4, n=4)
    with StayDouble():
        right = eap.attribute(model, data, "prob_diff", method="eap", ablation=ablation)
        whole = eap.Circuit(right.graph, right.graph.edge_mask)
        found = eap.attribute_circuit(model, whole, data, "prob_diff", ablation=ablation)
    assert relative(found.values, right.values) < 1e-6


def test_only_edges_that_would_be_on_a_path_have_scores(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(seed=4, n=4)
    scores = eap.attribute(model, data, method="eap")
    circuit = scores.select(8, exactly=True)
    found = eap.attribute_circuit(model, circuit, data).values
    scored = found.abs() > 1e-12 * found.abs().max()  # no more than rounding
    assert scored.sum() > circuit.n_edges
    for u, v in scored.nonzero().tolist():
        mask = circuit.mask.clone()
        mask[u, v] = True
        assert eap.Circuit(scores.graph, mask).pruned().mask[u, v]


def test_passes_change_only_rounding(make_model, make_pairs, relative):
    model, data = make_model("gpt2"), make_pairs(seed=4)
    circuit, done = some_circuit(bind(model).graph("kv")), []
    found = eap.attribute_circuit(model, circuit, data, progress=lambda *step: done.append(step))
    assert done[-1] == (len(data), len(data))
    for settings in ({"memory": 0}, {"reuse_prefix": False}):
        assert relative(eap.attribute_circuit(model, circuit, data, **settings).values, found.values) < 1e-6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"metric": "rank"}, "metric: expected one of .*kl_divergence"),
        ({"ablation": "optimal"}, "ablation: expected constants from eap.optimal_constants"),
        ({"circuit": None}, "circuit: expected a Circuit"),
        ({"circuit": "gpt2"}, "circuit: expected one of Graph"),
    ],
)
def test_what_cannot_be_is_refused(given, words, make_model, make_pairs):
    model = make_model("llama", torch.float32)
    asked = {"circuit": some_circuit(bind(model).graph("kv")), "data": make_pairs(n=2), **given}
    if asked["circuit"] == "gpt2":
        asked["circuit"] = some_circuit(bind(make_model("gpt2")).graph("kv"))
    with pytest.raises(eap.InputError, match=words):
        eap.attribute_circuit(model, **asked)
