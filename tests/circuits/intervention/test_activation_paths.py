"""Paths of activations: against circuit runs and plain runs written out, what is run, and the memory it takes."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.budget import PeakBytes
from eap_circuits.evaluation.check import StayDouble
from eap_circuits.methods.gradient import method as gradient
from tests.circuits.budget.test_memory import longer_pairs
from tests.circuits.conftest import FAMILIES
from tests.circuits.methods.test_attribution import losses
from tests.circuits.plain_runs import SITES, by_layer, plain_run


def chosen_edges(graph, n, seed=1):
    edges = graph.edge_mask.nonzero()
    return edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed))[:n]].tolist()


def group_of(graph, sender):
    """The senders that move with one: the input, a layer's heads, its MLP, found by their names."""
    name = graph.senders[sender].split(".")[0]
    return [u for u, other in enumerate(graph.senders) if other.split(".")[0] == name]


@pytest.mark.parametrize(("family", "quadrature"), [*((name, "right") for name in FAMILIES), ("gemma2", "midpoint")])
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
        edges = chosen_edges(graph, 6)
        for u, v in edges:
            for k in range(steps):
                alpha = (k + 1) / steps if quadrature == "right" else (k + 0.5) / steps
                for sign in (1, -1):
                    mask = graph.edge_mask.double()
                    mask[group_of(graph, u)] *= alpha
                    mask[u, v] -= sign * step
                    masks.append(mask)
        found = losses(model, graph, data, masks).view(len(edges), steps, 2)
    derivatives = (found[..., 0] - found[..., 1]).mean(1) / (2 * step) / len(data)
    scale = float(scores.values.abs().max())
    for (u, v), derivative in zip(edges, derivatives.tolist()):
        assert abs(float(scores.values[u, v]) - derivative) <= 1e-6 * scale, graph.edge_name(u, v)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", SITES)
def test_activation_paths_head_by_head_with_plain_autograd(kind, published, make_model, make_pairs, relative):
    model, data, steps = make_model(kind), make_pairs(n=3), 3
    compat = "eap-ig" if published else None
    with StayDouble():
        scores = eap.attribute(model, data, method="eap-ig-activations", steps=steps, compat=compat)
        graph = scores.graph
        groups = [group_of(graph, u) for u in range(graph.n_senders)]
        groups = [list(group) for group in dict.fromkeys(map(tuple, groups))]
        right = torch.zeros(graph.n_senders, len(groups), dtype=torch.float64)
        for e in range(len(data)):
            n, (good, bad) = int(data.lengths[e]), data.answers[e].tolist()
            embed = model.get_input_embeddings()
            clean, corrupted = (embed(x[e, None, :n]).detach() for x in (data.clean, data.corrupted))
            (_, from_clean, _, c), (_, from_corrupted, _, c_corrupted) = (
                plain_run(model, kind, x) for x in (clean, corrupted)
            )
            delta = (c_corrupted - c).detach()  # [S, T, D]
            for index, group in enumerate(groups):
                for k in range(1, steps + 1):
                    point = torch.lerp(from_corrupted[index], from_clean[index], k / steps).detach()
                    if index == 0:
                        logits, _, reads, _ = plain_run(model, kind, point)
                    else:
                        logits, _, reads, _ = plain_run(model, kind, clean, (index, point))
                    (logits[bad] - logits[good]).backward()
                    model.zero_grad()
                    for site, x in enumerate(reads):
                        if x.grad is None:
                            continue  # what it feeds was replaced
                        if published and index == 0 and site == 0 and kind == "llama":
                            continue  # the package's embeddings are constants there
                        part = (delta @ x.grad[0].T).diagonal(dim1=1, dim2=2).sum(1) / steps / len(data)
                        if published:
                            right[:, site] += part / len(groups)
                        else:
                            right[group, site] += part[group]
    right *= by_layer(graph, graph.edge_mask.double()) > 0
    assert relative(by_layer(graph, scores.values), right) < 1e-6


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
        layer.mlp.register_forward_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    eap.attribute(model, data, method="eap-ig-activations", steps=1, quadrature="midpoint", reuse_prefix=False)
    # Two plain runs, the path of the embeddings, and those of a layer's heads and MLP for every layer up to one's own.
    batches = calls[0] // 5
    assert calls == [5 * batches, 7 * batches, 9 * batches]
