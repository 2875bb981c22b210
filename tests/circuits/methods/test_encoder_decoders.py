"""Encoder-decoders: every method, ablation and kept score against runs of T5 and BART that are written out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.methods import METHODS
from eap_circuits.methods.quadrature import QUADRATURES
from eap_circuits.recording import RULES
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import (
    ENCODER_DECODERS,
    VOCABULARY,
    circuit_of,
    groups_of,
    loss_of,
    pairs_for,
    prompts,
    random_circuit,
    random_edges,
    tiny_model,
)
from tests.circuits.learning.test_sequential import one_after_another
from tests.circuits.two_sides import TwoSides, differences, gradients, of_circuit, of_moved, scores

N = 2
GROUPS = QUADRATURES["right"].points(2)


@pytest.fixture(params=["t5", "bart-two-sides"])
def by_hand(request):
    model = tiny_model(request.param)
    with StayDouble():
        yield model, TwoSides(model), pairs_for(request.param, n=N)


class Pair:
    """One prompt pair's tokens and runs."""

    def __init__(self, hand, data, e):
        start, own = torch.tensor([hand.model.config.decoder_start_token_id]), data.decoder[e]
        self.hand, self.decoder, self.loss = hand, torch.cat([start, own[own >= 0]]), loss_of(data, e)
        self.tokens = prompts(data, e)
        self.clean, self.corrupted = (hand.run(tokens, self.decoder) for tokens in self.tokens)
        self.delta = differences(self.clean.c, self.corrupted.c)

    def run(self, read=None, start=None):
        return self.hand.run(self.tokens[0], self.decoder, **({"read": read} if read else {}), start=start)

    def between(self, alpha):
        """The run of a point between the prompts' embeddings."""
        return self.run(start=torch.lerp(self.corrupted.c[0], self.clean.c[0], alpha))


def pairs(hand, data):
    return [Pair(hand, data, e) for e in range(len(data))]


def mean(found):
    return torch.stack(list(found)).mean(0)


def near(found, right, edges=None, bound=1e-6):
    found, right = (x if edges is None else x[..., edges] for x in (found.double(), right))
    assert right.abs().max() > 0
    assert (found - right).abs().max() < bound * right.abs().max()


# Methods.


def test_conductance_of_one_segment_and_of_several(by_hand):
    model, hand, data = by_hand
    found = eap.attribute(model, data, method="eap-conductance", steps=3)
    right = []
    for pair in pairs(hand, data):
        runs = [pair.between(k / 3) for k in range(4)]
        g = [gradients([(0.5, run)], pair.loss) for run in runs]
        total = 0
        for k in range(3):
            delta = differences(runs[k + 1].c, runs[k].c)
            ends = [a + b for a, b in zip(g[k], g[k + 1], strict=True)]
            total = total + scores(found.graph.edge_mask, delta, ends)
        right.append(total)
    near(found.values, mean(right))


def test_paths_down_the_distance_of_logits(by_hand):
    model, hand, data = by_hand
    found = eap.attribute(model, data, method="eap-gp", steps=2)
    right = []
    for pair in pairs(hand, data):
        here, runs = pair.clean.c[0].detach(), []
        for _ in range(2):
            here.requires_grad_()
            apart = (pair.run(start=here).logits - pair.corrupted.logits.detach()).square().sum()
            (slope,) = torch.autograd.grad(apart, here)
            here = (here - slope / slope.norm().clamp(min=1e-300)).detach()
            runs.append((0.5, pair.run(start=here)))
        right.append(scores(found.graph.edge_mask, pair.delta, gradients(runs, pair.loss)))
    near(found.values, mean(right))


@pytest.mark.parametrize(("rules", "ablation"), [("gim", "patching"), (None, "zero")])
def test_paths_of_activations(by_hand, rules, ablation):
    model, _, data = by_hand
    found = eap.attribute(model, data, method="eap-ig-activations", steps=2, rules=rules, ablation=ablation)
    right = []
    for pair in pairs(TwoSides(model, rules), data):
        (instead,) = ablated([pair], ablation)
        delta, total = differences(pair.clean.c, instead), torch.zeros(found.values.shape, dtype=torch.float64)
        for group in groups_of(found.graph):
            runs = [(w, pair.run(of_moved(group, alpha, pair.clean, delta))) for alpha, w in GROUPS]
            total[group] += scores(found.graph.edge_mask, delta, gradients(runs, pair.loss))[group]
        right.append(total)
    near(found.values, mean(right))


def test_each_edge_patched_alone(by_hand):
    model, hand, data = by_hand
    graph = bind(model).graph("kv")
    edges = circuit_of(graph, random_edges(graph, 12))
    found = eap.attribute(model, data, method="exact", edges=edges.mask)
    right = torch.zeros(found.values.shape, dtype=torch.float64)
    for pair in pairs(hand, data):
        for u, v in edges.mask.nonzero().tolist():
            without = graph.edge_mask.double()
            without[u, v] = 0
            with torch.no_grad():
                patched = pair.run(of_circuit(without, pair.corrupted.c))
            right[u, v] += (pair.loss(patched.logits) - pair.loss(pair.clean.logits)).item() / N
    near(found.values, right)


def test_information_flow_is_its_definition_in_each_stream(by_hand):
    model, hand, data = by_hand
    found = eap.attribute(model, data, method="information-flow-routes")
    right = torch.zeros(found.values.shape, dtype=torch.float64)
    for pair in pairs(hand, data):
        for v, x in enumerate(pair.clean.x):
            senders = found.graph.edge_mask[:, v].nonzero()[:, 0].tolist()
            read = torch.stack([pair.clean.c[u] for u in senders])  # [s, T, D]
            closer = (x.abs().sum(1) - (x - read).abs().sum(2)).clamp(min=0)
            right[senders, v] += torch.nan_to_num(closer / closer.sum(0)).mean(1).detach() / N
    near(found.values, right)


@pytest.mark.parametrize("rules", sorted(RULES))
def test_scores_under_backward_rules(by_hand, rules):
    model, _, data = by_hand
    found = eap.attribute(model, data, method="eap", rules=rules)
    each = pairs(TwoSides(model, rules), data)
    right = [scores(found.graph.edge_mask, pair.delta, gradients([(1, pair.clean)], pair.loss)) for pair in each]
    near(found.values, mean(right))


# What is kept beside the mean.


@pytest.mark.parametrize("from_end", [False, True])
def test_scores_by_example_position_and_feature(by_hand, from_end):
    model, hand, data = by_hand
    where = "positions-from-end" if from_end else "positions"
    found = eap.attribute(model, data, method="eap", keep=["examples", where, "neurons"])
    edges, size = found.graph.edge_mask, max(int(data.lengths.max()), 1 + data.decoder.shape[1])
    apart, by_position = torch.zeros(N, *edges.shape).double(), torch.zeros(size, *edges.shape).double()
    neurons = torch.zeros(edges.shape[0], found.graph.d_model, dtype=torch.float64)
    for e, pair in enumerate(pairs(hand, data)):
        g = gradients([(1, pair.clean)], pair.loss)
        for u, v in edges.nonzero().tolist():
            product = pair.delta[u] * g[v]
            begin = size - len(product) if from_end else 0
            by_position[begin : begin + len(product), u, v] += product.sum(1) / N
            neurons[u] += product.sum(0) / N
            apart[e, u, v] = product.sum()
    near(found.per_example, apart)
    near(found.per_position, by_position)
    near(found.neurons, neurons)
    near(found.variance, apart.var(0, unbiased=False))
    near(found.values, apart.mean(0))


# Ablations.


def ablated(each, ablation):
    """What every sender gives where it is ablated, in each pair's run."""
    if ablation == "patching":
        return [pair.corrupted.c for pair in each]
    if ablation == "zero":
        return [[torch.zeros_like(c) for c in pair.clean.c] for pair in each]
    senders = list(zip(*(pair.clean.c for pair in each), strict=True))
    if ablation == "mean":
        means = [torch.cat(c).mean(0) for c in senders]
        return [[m.expand_as(c) for m, c in zip(means, pair.clean.c, strict=True)] for pair in each]
    found = [[] for _ in each]
    for c in senders:
        at = [torch.stack([x[t] for x in c if t < len(x)]).mean(0) for t in range(max(map(len, c)))]
        for own, x in zip(found, c, strict=True):
            own.append(torch.stack(at[: len(x)]))
    return found


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_scores_and_circuits_under_constants(by_hand, ablation):
    model, hand, data = by_hand
    each = pairs(hand, data)
    constants = [[x.detach() for x in own] for own in ablated(each, ablation)]
    graph = bind(model).graph("kv")
    found = eap.attribute(model, data, method="eap", ablation=ablation)
    if ablation == "zero":  # what the decoder reads is ablated, too
        assert found.values[graph.input_senders[1]].any()
    right = [
        scores(graph.edge_mask, differences(pair.clean.c, own), gradients([(1, pair.clean)], pair.loss))
        for pair, own in zip(each, constants, strict=True)
    ]
    near(found.values, mean(right))
    circuits = [random_circuit(graph, seed, share) for seed, share in enumerate((0.4, 0.8))]
    circuits.append(eap.Circuit(graph, torch.zeros_like(graph.edge_mask)))
    for circuit, result in zip(circuits, eap.evaluate(model, circuits, data, ablation=ablation), strict=True):
        with torch.no_grad():
            reads = [of_circuit(circuit.mask.double(), own) for own in constants]
            values = [float(-pair.loss(pair.run(read).logits)) for pair, read in zip(each, reads, strict=True)]
        assert result.values.tolist() == pytest.approx(values, rel=1e-6, abs=1e-9)
    one = circuit_of(graph, random_edges(graph, 5))
    exact = eap.attribute(model, data, method="exact", edges=one.mask, ablation=ablation)
    for u, v in one.mask.nonzero().tolist():
        without = graph.edge_mask.clone()
        without[u, v] = False
        result = eap.evaluate(model, eap.Circuit(graph, without), data, ablation=ablation)
        assert float(exact.values[u, v]) == pytest.approx(result.clean - result.mean, rel=1e-5, abs=1e-6)


def test_constants_are_learned(by_hand):
    """They beat the means that they start from, and are of this model's sites."""
    model, _, data = by_hand
    circuit = random_circuit(bind(model).graph("kv"), 1, 0.6)
    mean, learned = (
        eap.evaluate(model, circuit, data, "kl_divergence", ablation=each)
        for each in ("mean", eap.optimal_constants(model, circuit, data, "kl_divergence", steps=10))
    )
    assert learned.mean > mean.mean


# Learning.


def test_scores_at_a_circuit_are_the_gradient_of_its_mask(by_hand):
    model, hand, data = by_hand
    circuit = random_circuit(bind(model).graph("kv"), 2, 0.5)
    mask = circuit.mask.double().requires_grad_()
    for ablation in ("patching", "zero"):
        found = eap.attribute_circuit(model, circuit, data, ablation=ablation)
        each = pairs(hand, data)
        values = [
            -pair.loss(pair.run(of_circuit(mask, [x.detach() for x in own])).logits)
            for pair, own in zip(each, ablated(each, ablation), strict=True)
        ]
        (right,) = torch.autograd.grad(torch.stack(values).mean(), mask)
        near(found.values, right, circuit.graph.edge_mask)


def test_circuits_are_learned_pruned_refined_and_found_one_edge_after_another():
    model, data = tiny_model("t5", torch.float32), pairs_for("t5", n=N)
    start = eap.attribute(model, data, method="eap")
    n = start.graph.n_edges // 8
    chosen = start.select(n)
    learned = eap.learn_mask(model, data, start=start, n_edges=n, steps=10)
    pruned = eap.prune_gradually(model, data, start=start, n_edges=(n, start.graph.n_edges))
    assert all(found.values[start.graph.edge_mask].isfinite().all() for found in (learned, pruned))
    before, after, gone = (
        eap.evaluate(model, circuit, data) for circuit in (chosen, eap.refine(model, chosen, data), pruned.select(n))
    )
    apart = [abs(result.faithfulness - 1) for result in (before, after, gone)]
    assert apart[1] <= apart[0] and apart[2] < apart[0]


@pytest.mark.parametrize("name", sorted(set(ENCODER_DECODERS) - {"t5", "bart-two-sides"}))
def test_other_families_by_every_method(name):
    """However examples are cut into batches; each edge patched alone is the circuit without it."""
    model, data = tiny_model(name), pairs_for(name, n=N)
    for method in sorted(METHODS.keys() - {"exact"}):
        found, alone = (
            eap.attribute(model, data, method=method, steps=1, heads="query", batch_size=size) for size in (None, 1)
        )
        near(alone.values, found.values.double(), bound=1e-4)
    graph = bind(model).graph("kv")
    edges = random_edges(graph, 3)
    found = eap.attribute(model, data, method="exact", edges=circuit_of(graph, edges))
    for edge in edges:
        without = graph.edge_mask.clone()
        without[edge] = False
        result = eap.evaluate(model, eap.Circuit(graph, without), data)
        assert float(found.values[edge]) == pytest.approx(result.clean - result.mean, rel=1e-5, abs=1e-6)


def test_acdc_is_the_sequential_algorithm():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=VOCABULARY, initializer_factor=8.0, decoder_start_token_id=0, **sizes)
    model, data = T5ForConditionalGeneration(config).double().eval(), pairs_for("t5", n=N)
    graph = bind(model).graph("kv")
    for ablation in ("patching", "zero"):
        right, _ = one_after_another(model, graph, data, 0.05, "logit_diff", ablation=ablation)
        found = eap.acdc(model, data, 0.05, "logit_diff", ablation=ablation)
        assert 0 < int(right.sum()) < graph.n_edges
        assert torch.equal(found.mask, eap.Circuit(graph, right).pruned().mask)
