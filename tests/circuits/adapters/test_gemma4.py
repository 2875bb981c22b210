"""Gemma 4: per-layer embeddings, and layers that multiply the residual stream, against what they are by hand."""

from __future__ import annotations

import copy

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.selfcheck import StayDouble
from eap_circuits.tasks import PairedDataset
from eap_kernels.testing import relative_error
from tests.circuits.conftest import circuit_of, logit_difference, pairs_for, prompts, random_circuit, tiny_model
from tests.circuits.models import VOCABULARY


@torch.no_grad()
def without_scales(model):
    """A model that computes the same, but no layer multiplies the residual stream: gains, eps and gates do it."""
    plain, unit = copy.deepcopy(model), 1.0
    for layer in plain.model.layers:
        for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm):
            norm.eps /= unit**2
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm, layer.post_per_layer_input_norm):
            norm.weight /= unit
        layer.per_layer_input_gate.weight *= unit
        unit *= float(layer.layer_scalar)
        layer.layer_scalar.fill_(1)
    plain.model.norm.eps /= unit**2
    return plain


def inputs_of(model, modules, tokens):
    """What modules read in a run of one prompt."""
    seen = []
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in modules]
    model(input_ids=tokens[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("eap-ig-inputs", {}),
        ("eap-ig-inputs", {"rules": "relp"}),
        ("eap-ig-activations", {}),
        ("eap-conductance", {}),
        ("information-flow-routes", {}),
        ("exact", {}),
    ],
)
def test_scores_do_not_depend_on_what_multiplies_the_residual_stream(method, options):
    model, data = tiny_model("gemma4"), pairs_for("gemma4")
    with StayDouble():
        found, right = (eap.attribute(each, data, method=method, **options) for each in (model, without_scales(model)))
    assert relative_error(found.values, right.values) < 1e-5  # values are float32


@pytest.mark.parametrize("ablation", ["patching", "mean"])
def test_neither_do_circuits(ablation):
    model, data = tiny_model("gemma4"), pairs_for("gemma4")
    graph = bind(model).graph("kv")
    circuits = [random_circuit(graph, seed, 0.6) for seed in range(2)]
    with StayDouble():
        pair = [eap.evaluate(each, circuits, data, ablation=ablation) for each in (model, without_scales(model))]
    for found, right in zip(*pair, strict=True):
        torch.testing.assert_close(found.values, right.values)


def test_a_path_begins_at_the_corrupted_prompts_and_ends_at_the_clean_ones():
    """With one segment every sender's change, also that of per-layer embeddings, is its whole difference."""
    model, data = tiny_model("gemma4"), pairs_for("gemma4")
    with StayDouble():
        found = eap.attribute(model, data, method="eap-conductance", steps=1)
        right = eap.attribute(model, data, method="clean-corrupted")
    assert relative_error(found.values, right.values) < 1e-5


def test_conductance_into_the_logits_is_the_metrics_difference():
    """The trapezoid rule's error falls with M²."""
    model, data = tiny_model("gemma4"), pairs_for("gemma4")
    errors = []
    with StayDouble():
        for steps in (16, 64):
            scores = eap.attribute(model, data, method="eap-conductance", steps=steps)
            result = eap.evaluate(model, eap.Circuit.from_mask(scores.graph, scores.graph.edge_mask), data)
            errors.append(abs(float(scores.values[:, -1].double().sum()) - (result.clean - result.corrupted)))
    assert errors[1] < errors[0] / 8 or errors[1] < 1e-5 * float(scores.values.abs().max())


@torch.no_grad()
def test_per_layer_embeddings_of_a_circuit_are_the_clean_prompts():
    """Of the corrupted run only what one layer makes of them is replaced, and only the logits read that."""
    model, pairs, index = tiny_model("gemma4"), pairs_for("gemma4"), 1
    other, last = pairs.clean.clone(), (torch.arange(len(pairs)), pairs.lengths - 1)
    other[last] = (other[last] + 1) % VOCABULARY  # the logits read only the last token's
    data = PairedDataset.from_tokens(pairs.clean, other, pairs.lengths, pairs.answers)
    graph = bind(model).graph("kv")
    circuit = circuit_of(graph, [(graph.senders.index(f"p{index}"), graph.n_receivers - 1)])
    layer, body = model.model.layers[index], model.model
    later = torch.stack([one.layer_scalar for one in body.layers[index:]]).prod()

    def inputs(tokens):
        own = body.get_per_layer_inputs(tokens[None])
        return body.project_per_layer_inputs(body.embed_tokens(tokens[None]), own)[:, :, index]

    def written(stream, per_layer):
        gated = layer.act_fn(layer.per_layer_input_gate(stream)) * per_layer
        return layer.post_per_layer_input_norm(layer.per_layer_projection(gated))

    with StayDouble():
        found = eap.evaluate(model, circuit, data)
        for e in range(len(data)):
            clean, corrupted = prompts(data, e)
            stream, end = inputs_of(model, (layer.per_layer_input_gate, body.norm), corrupted)
            apart = written(stream, inputs(clean)) - written(stream, inputs(corrupted))
            logits = model.lm_head(body.norm(end + later * apart))[0, -1]
            cap = model.config.final_logit_softcapping
            torch.testing.assert_close(found.values[e], logit_difference(cap * torch.tanh(logits / cap), data, e))
    assert (found.values - found.corrupted_values).abs().max() > 1e-3


def test_a_layer_that_forgets_the_residual_stream_is_refused():
    model = tiny_model("gemma4")
    model.model.layers[0].layer_scalar.fill_(0)
    with pytest.raises(eap.InputError, match=r"Gemma4TextDecoderLayer.layer_scalar: expected a number other than 0"):
        bind(model)


def test_fewer_per_layer_embeddings_than_tokens(make_model, make_pairs):
    model, fewer = make_model("gemma4"), VOCABULARY // 2
    table = model.model.embed_tokens_per_layer
    table.weight = torch.nn.Parameter(table.weight[:fewer])
    assert all(check.passed for check in eap.check_model(model))
    data = make_pairs(n=3)
    with pytest.raises(eap.InputError, match=f"expected token ids below the model's {fewer}"):
        eap.attribute(model, data)
