"""Pairs of unequal lengths: the corrupted prompt runs as it is and is read where it is aligned with the clean one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.forward import Runner, make_batches
from eap_circuits.intervention import run_circuits
from eap_circuits.recording import record_both_sides, record_run
from eap_circuits.selfcheck import StayDouble
from eap_circuits.tasks.tokens.alignment import align
from tests.circuits.conftest import logit_difference, prompts, random_circuit
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import plain_run
from tests.circuits.recording.unequal_pairs import V, residual, unequal_pairs


def test_the_pairs_are_what_the_tests_are_about():
    data = unequal_pairs(0)
    assert data.corrupted_lengths is not None
    change = data.corrupted_lengths - data.lengths
    assert (change > 0).any() and (change < 0).any() and (change == 0).any()


def test_all_edges_are_the_model_and_none_the_corrupted_run(kind, make_model):
    model, data = make_model(kind), unequal_pairs(4)
    with StayDouble():
        for heads in ("kv", "query"):
            graph = bind(model).graph(heads)
            masks = [graph.edge_mask, torch.zeros_like(graph.edge_mask)]
            circuits = [eap.Circuit.from_mask(graph, mask) for mask in masks]
            kept, ablated = eap.evaluate(model, circuits, data, batch_size=3)
            for e in range(len(data)):
                with torch.no_grad():
                    ends = [model(input_ids=tokens[None]).logits[0, -1] for tokens in prompts(data, e)]
                right = [float(logit_difference(logits, data, e)) for logits in ends]
                for result, i in ((kept, 0), (ablated, 1)):
                    assert float(result.values[e]) == pytest.approx(right[i], abs=1e-9)
                assert float(kept.clean_values[e]) == pytest.approx(right[0], abs=1e-9)
                assert float(kept.corrupted_values[e]) == pytest.approx(right[1], abs=1e-9)
            assert kept.faithfulness == pytest.approx(1) and ablated.faithfulness == pytest.approx(0)


def test_both_ends_are_limits(kind, make_model):
    """Edges kept all but wholly, or all but not: every receiver is then summed up from its senders."""
    model, data = make_model(kind), unequal_pairs(4)
    arch = bind(model)
    graph = arch.graph("query")
    with StayDouble(), torch.no_grad():
        for batch in make_batches(data, 4, True, torch.device("cpu")):
            runner = Runner(arch, graph, batch)
            record = record_run(runner, corrupted=True)
            masks = [graph.edge_mask * (1 - 1e-12), graph.edge_mask * 1e-12]
            whole, none = run_circuits(runner, graph, record, masks)
            torch.testing.assert_close(whole, runner.logits(runner.embed(batch.clean)))
            torch.testing.assert_close(none, record.logits)


def test_what_all_senders_differ_by_is_what_the_residual_stream_does(kind, make_model):
    """Learned positions are part of the input's difference: otherwise some of it would be no sender's."""
    model, data = make_model(kind), unequal_pairs(5)
    arch, decoder = bind(model), Decoder(model)
    with StayDouble(), torch.no_grad():
        for e in range(len(data)):
            (batch,) = make_batches(data[[e]], None, False, torch.device("cpu"))
            sides = record_both_sides(Runner(arch, arch.graph("query"), batch, every_mlp=True))
            total = sum(residual(nodes).sum(1) for nodes in sides.senders.nodes())
            clean, corrupted = (plain_run(decoder, decoder.embed(tokens)).x[-1] for tokens in prompts(data, e))
            π = align(*(tokens.tolist() for tokens in prompts(data, e)))
            right = (corrupted[π] - clean)[int(data.first_difference[e]) :]
            torch.testing.assert_close(total, right, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 3}, {"reuse_prefix": False}])
def test_results_do_not_depend_on_batching(kind, settings, make_model, relative):
    model, data = make_model(kind), unequal_pairs(6)
    circuit = random_circuit(bind(model).graph("kv"), 1, 0.6)
    right = eap.attribute(model, data, steps=2, quadrature="left").values
    assert relative(eap.attribute(model, data, steps=2, quadrature="left", **settings).values, right) < 1e-6
    values = eap.evaluate(model, circuit, data).values
    assert relative(eap.evaluate(model, circuit, data, **settings).values, values) < 1e-6


def test_pairs_of_equal_lengths_are_not_changed_by_those_beside_them(make_model, relative):
    model, data = make_model("gpt2"), unequal_pairs(0)
    assert data.corrupted_lengths is not None
    equal = (data.corrupted_lengths == data.lengths).nonzero()[:, 0]
    alone = data[equal]
    assert alone.alignment is None
    graph = bind(model).graph("kv")
    circuit = random_circuit(graph, 2, 0.5)
    found, right = (eap.evaluate(model, circuit, x, batch_size=4).values for x in (data, alone))
    torch.testing.assert_close(found[equal], right)


def test_an_interrupted_run_of_another_alignment_is_another_request(make_model, tmp_path):
    model, file = make_model("gpt2"), tmp_path / "exact.safetensors"
    fields = {"clean": [[1, 2, 3]], "corrupted": [[1, 4, 3]], "lengths": [3], "answers": [[1, 2]]}
    graph = bind(model).graph("kv")
    mask = torch.zeros_like(graph.edge_mask)
    mask[0, -1] = True
    data = [eap.PairedDataset.from_tokens(**fields, alignment=[[0, 0, 2]])]
    data.append(eap.PairedDataset.from_tokens(**fields))
    eap.attribute(model, data[0], method="exact", edges=mask, checkpoint=file)
    with pytest.raises(eap.InputError, match="checkpoint of this model, data and request"):
        eap.attribute(model, data[1], method="exact", edges=mask, checkpoint=file)


def test_prompts_may_end_at_the_models_last_position(make_model):
    """Padding beside a longer suffix reaches further than the model has positions."""
    model = make_model("gpt2")
    clean = torch.randint(V, (2, 48), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[0, 45], corrupted[1, 0] = (clean[0, 45] + 1) % V, (clean[1, 0] + 1) % V
    data = eap.PairedDataset.from_tokens(clean, corrupted, [48, 20], [[1, 2], [3, 4]])
    right = sum(eap.attribute(model, data[[e]], steps=2).values for e in range(2)) / 2
    torch.testing.assert_close(eap.attribute(model, data, steps=2, batch_size=2).values, right)


def test_a_corrupted_prompt_beyond_the_models_positions_is_refused(make_model):
    data = eap.PairedDataset.from_tokens([[1, 2]], [[1] * 49], [2], [[1, 2]], corrupted_lengths=[49])
    with pytest.raises(eap.InputError, match="example 0: expected at most the model's 48 tokens, found 49"):
        eap.attribute(make_model("gpt2"), data)


@pytest.mark.parametrize("rules", [None, "relp", "gim"])
@pytest.mark.parametrize("method", ["eap-ig-activations", "eap-conductance", "eap-gp"])
def test_other_paths_do_not_depend_on_batching_either(method, rules, make_model, relative):
    model, data = make_model("llama"), unequal_pairs()
    given = {"method": method, "steps": 2, "rules": rules}
    whole = eap.attribute(model, data, **given, keep="examples")
    single = eap.attribute(model, data, **given, batch_size=1, reuse_prefix=False)
    assert relative(single.values, whole.values) < 1e-6
    assert relative(whole.per_example.mean(0), whole.values) < 1e-6


def test_conductance_of_all_edges_into_the_logits_is_the_difference_of_its_ends(make_model):
    """The path begins at the aligned corrupted embeddings; the edges into the logits count all that is on it."""
    model, data = make_model("llama"), unequal_pairs()
    scores = eap.attribute(model, data, method="eap-conductance", steps=100)
    found = float(scores.values[:, scores.graph.logits_receiver].sum())
    clean = eap.evaluate(model, eap.Circuit.from_mask(scores.graph, scores.graph.edge_mask), data).clean
    assert abs(found - (clean - start_of_path(model, data))) < 1e-2 * abs(clean)


def start_of_path(model: Any, data: eap.PairedDataset) -> float:
    """The metric where the path begins: the clean prompt's places with the embeddings that they are compared with."""
    values = []
    with torch.no_grad():
        for e in range(len(data)):
            clean, corrupted = prompts(data, e)
            π = align(clean.tolist(), corrupted.tolist())
            logits = model(input_ids=corrupted[None, π]).logits[0, -1]
            values.append(float(logit_difference(logits, data, e)))
    return sum(values) / len(values)


@pytest.mark.parametrize("ablation", ["zero", "mean", "mean-positional"])
def test_constants_do_not_depend_on_how_long_the_corrupted_prompts_are(ablation, make_model, relative):
    """Only the metric may look at these; here one is longer than every clean prompt."""
    model, data = make_model("gpt2"), unequal_pairs(6)[[0, 1]]
    assert data.corrupted_lengths is not None and data.corrupted_lengths.max() > data.lengths.max()
    same = eap.PairedDataset.from_tokens(data.clean, data.clean, data.lengths, data.answers)
    circuit = random_circuit(bind(model).graph("kv"), 1, 0.6)
    found, right = (eap.attribute(model, x, method="eap", ablation=ablation).values for x in (data, same))
    assert relative(found, right) < 1e-6
    found, right = (eap.evaluate(model, circuit, x, ablation=ablation).values for x in (data, same))
    torch.testing.assert_close(found, right)
