"""Conductance: against other methods, completeness over every cut, and plain runs written out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import eap_circuits as eap
from eap_circuits.evaluation.check import StayDouble
from tests.circuits.conftest import KINDS
from tests.circuits.plain_runs import SITES, by_layer, plain_run


def test_conductance_of_the_input_is_integrated_gradients(family, make_model, make_pairs, relative):
    """The embeddings change evenly along the path: their edges have EAP-IG's scores, by the trapezoid rule."""
    model, data = make_model(family), make_pairs(n=4)
    with StayDouble():
        found = eap.attribute(model, data, method="eap-conductance", steps=3)
        left, right = (eap.attribute(model, data, steps=3, quadrature=side).values for side in ("left", "right"))
    assert relative(found.values[0], (left + right)[0] / 2) < 1e-6


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
                cuts.append(float(scores.values[: graph.attention_reach(layer), first:].double().sum()))
            cuts.append(float(scores.values[:, -1].double().sum()))
            errors.append([abs(cut - (result.clean - result.corrupted)) for cut in cuts])
    scale = float(scores.values.abs().max())
    coarse, fine = (max(error) for error in errors)
    assert fine <= coarse / 8 or fine <= 1e-5 * scale  # a sixteenth, were the fourth power of the step nothing
    assert fine <= 0.01 * scale


@pytest.mark.parametrize("kind", SITES)
def test_conductance_head_by_head_with_plain_autograd(kind, make_model, make_pairs, relative):
    model, data, steps = make_model(kind), make_pairs(n=3), 4
    with StayDouble():
        scores = eap.attribute(model, data, method="eap-conductance", steps=steps)
        graph = scores.graph
        right = torch.zeros(graph.n_senders, 2 * graph.n_layers + 1, dtype=torch.float64)
        for e in range(len(data)):
            n, (good, bad) = int(data.lengths[e]), data.answers[e].tolist()
            embed = model.get_input_embeddings()
            clean, corrupted = (embed(x[e, None, :n]).detach() for x in (data.clean, data.corrupted))
            points = []
            for k in range(steps + 1):
                logits, _, reads, contributions = plain_run(model, kind, torch.lerp(corrupted, clean, k / steps))
                (logits[bad] - logits[good]).backward()
                model.zero_grad()
                points.append((contributions.detach(), torch.stack([x.grad[0] for x in reads])))
            for (c, g), (c_next, g_next) in pairwise(points):
                right += torch.einsum("std,vtd->sv", c - c_next, (g + g_next) / 2) / len(data)
    right *= by_layer(graph, graph.edge_mask.double()) > 0
    assert relative(by_layer(graph, scores.values), right) < 1e-6
