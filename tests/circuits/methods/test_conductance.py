"""Conductance: against other methods, completeness over every cut, and its definition."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import KINDS, fast_by_kind, logit_difference, prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import differences, gradients, plain_run


@fast_by_kind
def test_conductance_of_the_input_is_integrated_gradients(family, make_model, make_pairs, relative):
    """The embeddings change evenly along the path: their edges have EAP-IG's scores, by the trapezoid rule."""
    model, data = make_model(family), make_pairs(n=4)
    with StayDouble():
        found = eap.attribute(model, data, method="eap-conductance", steps=3)
        left, right = (eap.attribute(model, data, steps=3, quadrature=side).values for side in ("left", "right"))
    assert relative(found.values[0], (left + right)[0] / 2) < 1e-6


@fast_by_kind
def test_conductance_of_one_segment_is_clean_corrupted(family, make_model, make_pairs, relative):
    """Then every sender's change is its whole difference, and the gradients are those of the two ends."""
    model, data = make_model(family), make_pairs(n=4)
    with StayDouble():
        found = eap.attribute(model, data, method="eap-conductance", steps=1, heads="query")
        right = eap.attribute(model, data, method="clean-corrupted", heads="query")
    assert relative(found.values, right.values) < 1e-6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3-moe"])  # experts' choice jumps on the path
def test_conductance_over_every_cut_is_the_metrics_difference(kind, make_model, make_pairs):
    """Each layer's boundary separates `input` from `logits`; the trapezoid rule's error falls with M²."""
    model, data = make_model(kind), make_pairs(n=2)
    errors = []
    with StayDouble():
        for steps in (16, 64):
            scores = eap.attribute(model, data, method="eap-conductance", steps=steps)
            graph = scores.graph
            result = eap.evaluate(model, eap.Circuit.from_mask(graph, graph.edge_mask), data)
            cuts = []
            for layer in range(graph.n_layers):
                first = graph.receivers_at(layer, "q").start
                cuts.append(float(scores.values[: graph.reach_at(layer, "q"), first:].double().sum()))
            cuts.append(float(scores.values[:, -1].double().sum()))
            errors.append([abs(cut - (result.clean - result.corrupted)) for cut in cuts])
    scale = float(scores.values.abs().max())
    coarse, fine = (max(error) for error in errors)
    assert fine <= coarse / 8 or fine <= 1e-5 * scale  # a sixteenth, were the fourth power of the step nothing
    assert fine <= 0.01 * scale


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_conductance_is_its_definition(kind, make_model, make_pairs, relative):
    model, data, steps = make_model(kind), make_pairs(n=3), 4
    decoder = Decoder(model, heads="kv")
    with StayDouble():
        found = eap.attribute(model, data, method="eap-conductance", steps=steps)
        right = torch.zeros(found.values.shape, dtype=torch.float64)
        for e in range(len(data)):
            clean, corrupted = (decoder.embed(tokens) for tokens in prompts(data, e))
            points = [plain_run(decoder, torch.lerp(corrupted, clean, k / steps)) for k in range(steps + 1)]
            g = [gradients(-logit_difference(run.logits, data, e), run.x) for run in points]
            for k in range(steps):
                delta = differences(clean=points[k + 1], corrupted=points[k])
                right += torch.einsum("utd,vtd->uv", delta, g[k] + g[k + 1]) / 2 / len(data)
    edges = found.graph.edge_mask
    assert relative(found.values[edges], right[edges]) < 1e-6
