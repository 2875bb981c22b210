"""Paths of activations: against circuit runs and their definition, what is run, and the memory it takes."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.budget import PeakBytes
from eap_circuits.methods.gradient import method as gradient
from eap_circuits.selfcheck import StayDouble
from tests.circuits.budget.test_memory import longer_pairs
from tests.circuits.conftest import fast_by_kind, groups_of, loss_of, prompts, random_edges, watch
from tests.circuits.decoders import Decoder
from tests.circuits.methods.test_attribution import losses
from tests.circuits.plain_runs import differences, of_moved, plain_run, scores


@fast_by_kind
@pytest.mark.parametrize("quadrature", ["right", "midpoint"])
def test_activation_paths_give_derivatives_at_points_of_the_senders_own_path(
    family, quadrature, make_model, make_pairs
):
    """Where every edge out of u's group carries corrupted + α (clean − corrupted), which the circuit run does with a
    soft mask, the derivative by the mask of (u, v) is u's part of the score."""
    model, data, steps, step = make_model(family), make_pairs(n=4), 2, 1e-5
    given = {"method": "eap-ig-activations", "steps": steps, "quadrature": quadrature}
    with StayDouble():
        scores = eap.attribute(model, data, heads="query", **given)
        graph, masks = scores.graph, []
        groups = groups_of(graph)
        edges = random_edges(graph, 6)
        for u, v in edges:
            for k in range(steps):
                alpha = (k + 1) / steps if quadrature == "right" else (k + 0.5) / steps
                for sign in (1, -1):
                    mask = graph.edge_mask.double()
                    mask[next(group for group in groups if u in group)] *= alpha
                    mask[u, v] -= sign * step
                    masks.append(mask)
        found = losses(model, graph, data, masks).view(len(edges), steps, 2)
    derivatives = (found[..., 0] - found[..., 1]).mean(1) / (2 * step) / len(data)
    scale = float(scores.values.abs().max())
    for (u, v), derivative in zip(edges, derivatives.tolist()):
        assert abs(float(scores.values[u, v]) - derivative) <= 1e-6 * scale, graph.edge_name(u, v)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_activation_paths_are_their_definition(kind, published, make_model, make_pairs, relative):
    """While a group moves, the edges out of it are scored; in the published package all edges are, for every group."""
    model, data, steps = make_model(kind), make_pairs(n=3), 3
    compat = "eap-ig" if published else None
    decoder = Decoder(model, heads="kv")
    with StayDouble():
        found = eap.attribute(model, data, method="eap-ig-activations", steps=steps, compat=compat)
        graph = found.graph
        right = torch.zeros(found.values.shape, dtype=torch.float64)
        for e in range(len(data)):
            x, y = (decoder.embed(tokens) for tokens in prompts(data, e))
            clean, corrupted = plain_run(decoder, x), plain_run(decoder, y)
            delta = differences(clean, corrupted)
            for group in groups_of(graph):
                reads = [of_moved(group, k / steps, clean, delta) for k in range(1, steps + 1)]
                points = [(1 / steps / len(data), plain_run(decoder, x, read)) for read in reads]
                part = scores(delta, points, loss_of(data, e))
                if published and group == [0] and kind == "llama":
                    part[:, : graph.receivers_at(0, "mlp").start] = 0  # the package's embeddings are constants there
                if published:
                    right += part / len(groups_of(graph))
                else:
                    right[group] += part[group]
    edges = graph.edge_mask
    assert relative(found.values[edges], right[edges]) < 1e-6


def test_activation_paths_in_bounded_memory(make_model, make_pairs, relative, monkeypatch):
    model, data = make_model("qwen2"), make_pairs(seed=8)
    given = {"method": "eap-ig-activations", "steps": 4, "quadrature": "left"}
    right = eap.attribute(model, data, **given).values
    monkeypatch.setattr(gradient, "HELD_BYTES", 1)
    monkeypatch.setattr(gradient, "HELD_POINTS", 1)
    assert relative(eap.attribute(model, data, **given).values, right) < 1e-6


@pytest.mark.parametrize("settings", [{}, {"quadrature": "left"}, {"steps": 2}, {"steps": 1}])
def test_what_activation_paths_take_is_predicted(settings, make_model, monkeypatch):
    model, data = make_model("llama"), longer_pairs()
    monkeypatch.setattr(gradient, "most_tokens", lambda device: 300)
    quadrature = settings.pop("quadrature", "right")
    plan = eap.plan(model, data, method="eap-ig-activations", **settings)
    with PeakBytes() as count:
        eap.attribute(model, data, method="eap-ig-activations", quadrature=quadrature, **settings)
    assert abs(plan.bytes - count.peak) <= 0.1 * count.peak


def test_runs_start_at_the_senders_layer(make_model, make_pairs, monkeypatch):
    """The layers before a group do not run again: counted by the calls of each layer's MLP."""
    model, data = make_model("llama"), make_pairs(n=2)
    calls = [0] * 3
    for index, layer in enumerate(model.model.layers):
        watch(layer.mlp, lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    eap.attribute(model, data, method="eap", reuse_prefix=False)  # a first call looks at one prompt besides
    calls[:] = [0] * 3
    eap.attribute(model, data, method="eap-ig-activations", steps=1, quadrature="midpoint", reuse_prefix=False)
    # Two plain runs, the path of the embeddings, and those of a layer's heads and MLP for every layer up to one's own.
    batches = calls[0] // 5
    assert calls == [5 * batches, 7 * batches, 9 * batches]
