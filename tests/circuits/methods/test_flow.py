"""Information flow routes: against their definition, what they are shares of, and memory."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.budget import PeakBytes
from eap_circuits.forward import Runner, borrowed, make_batches
from eap_circuits.methods import flow
from eap_circuits.recording import record_run
from eap_circuits.request import prepare
from eap_circuits.selfcheck import StayDouble
from tests.circuits.budget.test_memory import longer_pairs
from tests.circuits.conftest import prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import plain_run


def shares(x, contributions):
    """The definition for one token: x [D], contributions [S, D] -> [S]."""
    proximity = [max(0.0, float(x.abs().sum() - (x - c).abs().sum())) for c in contributions]
    total = sum(proximity)
    return torch.tensor([p / total if total else 0.0 for p in proximity], dtype=torch.float64)


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_flow_is_its_definition(kind, heads, make_model, make_pairs, relative):
    model, data = make_model(kind), make_pairs(n=3)
    decoder = Decoder(model, heads)
    with StayDouble(), torch.no_grad():
        scores = eap.attribute(model, data, method="information-flow-routes", heads=heads)
        right = torch.zeros(scores.values.shape, dtype=torch.float64)
        for e in range(len(data)):
            run = plain_run(decoder, decoder.embed(prompts(data, e)[0]))
            c, n = torch.stack(run.c), int(data.lengths[e])
            for v, (x, reach) in enumerate(zip(run.x, scores.graph.reach.tolist(), strict=True)):
                for t in range(n):
                    right[:reach, v] += shares(x[t], c[:reach, t]) / n / len(data)
    assert relative(scores.values, right) < 1e-6


def test_what_flow_takes_for_contributions_adds_up(family, make_model, make_pairs, relative):
    """Between two runs the last norm's input differs by what the senders' contributions do: nothing else does."""
    model, data = make_model(family), make_pairs()
    run = prepare(model, data, "logit_diff", "patching", None)
    (batch,) = make_batches(data, len(data), False, run.arch.device)
    with borrowed(model), torch.no_grad(), StayDouble():
        runner, rows, sums, reads = Runner(run.arch, run.arch.graph("kv"), batch), batch.rows, [], []
        for corrupted in (False, True):
            record = record_run(runner, corrupted)
            sums.append(sum(written.sum(1) for written in flow._contributions(run, record, 0, rows)))
            reads.append(record.norm_inputs[run.arch.final_norm].flatten(0, 1)[rows])
    assert relative(sums[0] - sums[1], reads[0] - reads[1]) < 1e-8


def test_flow_is_shares_of_the_clean_prompts_inputs(family, make_model, make_pairs, relative):
    model, data = make_model(family), make_pairs()
    scores = eap.attribute(model, data, method="information-flow-routes")
    graph = scores.graph
    assert float(scores.values.min()) >= 0 and not scores.values[~graph.edge_mask].any()
    # Not all: a token where no sender brings a receiver nearer to its input has no shares.
    assert float(scores.values.sum(0).max()) <= 1 + 1e-6 and float(scores.values.sum(0).min()) > 0
    other = eap.PairedDataset.from_tokens(data.clean, data.clean.flip(0), data.lengths, data.answers.flip(0))
    assert (
        relative(eap.attribute(model, other, "kl_divergence", method="information-flow-routes").values, scores.values)
        < 1e-6
    )
    assert scores.info["metric"] is None and scores.info["steps"] is None
    query = eap.attribute(model, data, method="information-flow-routes", heads="query")
    columns = [graph.receivers.index("logits"), graph.receivers.index("a1.h0<k>")]
    names = [query.graph.receivers.index(graph.receivers[column]) for column in columns]
    assert relative(query.values[:, names], scores.values[:, columns]) < 1e-6


def test_flow_needs_no_tensor_of_all_senders(make_model, relative, monkeypatch):
    model, data = make_model("llama"), longer_pairs()
    right = eap.attribute(model, data, method="information-flow-routes").values
    with PeakBytes() as whole:
        eap.attribute(model, data, method="information-flow-routes")
    monkeypatch.setattr(flow, "WORKSPACE", 2**14)
    with PeakBytes() as tiled:
        found = eap.attribute(model, data, method="information-flow-routes").values
    assert relative(found, right) < 1e-6 and tiled.peak < whole.peak


def test_flow_of_a_token_without_input_counts_nothing(make_model, make_pairs):
    """Gemma's padding token has a zero embedding: 0 / 0 in the published package, whose scores are then NaN."""
    model, data = make_model("llama"), make_pairs(n=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[data.clean[0, 0]] = 0
    values = eap.attribute(model, data, method="information-flow-routes").values
    n, missing = int(data.lengths[0]), int((data.clean[0, : data.lengths[0]] == data.clean[0, 0]).sum())
    assert abs(float(values[0, 0]) - (n - missing) / n) < 1e-6
