"""Pairs of unequal lengths: what is recorded, scored and run is as defined."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.forward import Runner, make_batches
from eap_circuits.recording import less_clean, record_both_sides, record_corrupted_side
from eap_circuits.selfcheck import StayDouble
from eap_circuits.tasks.tokens.alignment import align
from tests.circuits.conftest import circuit_of, logit_difference, loss_of, prompts, random_circuit, random_edges
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import Run, differences, of_circuit, plain_run, scores
from tests.circuits.recording.unequal_pairs import residual, unequal_pairs


class Pair(NamedTuple):
    """The runs of one prompt pair; everything of the corrupted one is aligned but its logits."""

    clean: Run
    corrupted: Run
    delta: Tensor  # Δ_u(t) = c_u(x')(π(t)) − c_u(x)(t), [S, T, D]


def pair(decoder: Decoder, data: eap.PairedDataset, e: int) -> Pair:
    tokens, other = prompts(data, e)
    π = align(tokens.tolist(), other.tolist())
    clean, corrupted = (plain_run(decoder, decoder.embed(x).detach()) for x in (tokens, other))
    c = [contribution[π].detach() for contribution in corrupted.c]
    # The input carries what learned positions differ by.
    c[0] = c[0] + (decoder.positions(len(other))[π] - decoder.positions(len(tokens))).detach()
    corrupted = corrupted._replace(c=c)
    return Pair(clean, corrupted, differences(clean, corrupted))


@pytest.fixture(params=["gpt2", "llama"])
def case(request, make_model):
    model = make_model(str(request.param))
    return model, bind(model).graph("query"), unequal_pairs(3), Decoder(model)


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_differences_are_of_aligned_contributions(case, reuse_prefix, together):
    model, graph, data, decoder = case
    with torch.no_grad(), StayDouble():
        for batch in make_batches(data, 3, reuse_prefix, torch.device("cpu")):
            runner = Runner(bind(model), graph, batch, every_mlp=True)
            sides = (record_both_sides if together else record_corrupted_side)(runner)
            senders = sides.senders
            if not together:
                senders, _ = less_clean(sides, batch, partial(runner.logits, sides.clean_embeddings))
            found = torch.cat([residual(nodes) for nodes in senders.nodes()], 1)  # [N, S, D]
            right = []
            for row, e in enumerate(batch.index.tolist()):
                one, first = pair(decoder, data, e), int(data.first_difference[e])
                right.append(one.delta[:, first:])
                assert not first or float(one.delta[:, :first].abs().max()) < 1e-9  # before, nothing differs
                torch.testing.assert_close(sides.corrupted_logits[row], one.corrupted.logits)
            torch.testing.assert_close(found, torch.cat(right, 1).transpose(0, 1))


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs", "clean-corrupted"])
def test_scores_are_their_definition(case, method, relative):
    model, graph, data, decoder = case
    points = {"eap": [(1.0, 1.0)], "clean-corrupted": [(1.0, 0.5), (0.0, 0.5)]}
    path = points.get(method, [((k + 0.5) / 3, 1 / 3) for k in range(3)])
    with StayDouble():
        found = eap.attribute(model, data, method=method, steps=3, quadrature="midpoint", heads="query").values
        total = torch.zeros(found.shape, dtype=torch.float64)
        for e in range(len(data)):
            clean, corrupted, delta = pair(decoder, data, e)
            runs = ((w, plain_run(decoder, torch.lerp(corrupted.c[0], clean.c[0], alpha))) for alpha, w in path)
            total += scores(delta, runs, loss_of(data, e)) / len(data)
    assert relative(found[graph.edge_mask], total[graph.edge_mask]) < 1e-6


def test_a_circuits_run_and_an_exact_score_are_their_definitions(case):
    model, graph, data, decoder = case
    edges = random_edges(graph, 4, seed=2)
    # A receiver of a circuit of all edges but one reads the sum of all others.
    alone = [eap.Circuit(graph, graph.edge_mask & ~circuit_of(graph, [edge]).mask) for edge in [*edges, (0, -1)]]
    circuits = [*(random_circuit(graph, seed, share) for seed, share in enumerate((0.1, 0.5, 0.95))), *alone]
    with StayDouble(), torch.no_grad():
        results = eap.evaluate(model, circuits, data)
        exact = eap.attribute(model, data, method="exact", heads="query", edges=circuit_of(graph, edges)).values
        right = torch.zeros(len(data), len(circuits), dtype=torch.float64)
        for e in range(len(data)):
            clean, corrupted, _ = pair(decoder, data, e)
            for i, kept in enumerate(circuits):
                run = plain_run(decoder, clean.c[0], of_circuit(kept.mask, corrupted.c))
                right[e, i] = logit_difference(run.logits, data, e)
    for i, result in enumerate(results):
        torch.testing.assert_close(result.values, right[:, i], atol=1e-9, rtol=0)
    for i, (u, v) in enumerate(edges):
        score = float((results[0].clean_values - right[:, 3 + i]).mean())
        assert float(exact[u, v]) == pytest.approx(score, rel=1e-5, abs=1e-7)
