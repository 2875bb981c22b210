"""Circuits run: against first principles, the two ends, batching, curves, comparisons, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.evaluation import comparison
from eap_circuits.forward import Runner, borrowed, make_batches
from eap_circuits.graph import Graph
from eap_circuits.request import Measurement, prepare
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import both_heads, logit_difference, prompts, random_circuit
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import of_circuit, plain_run


def graph_of(model, heads="kv") -> Graph:
    return bind(model).graph(heads)


def plain_values(model, data, tokens):
    values = []
    with torch.no_grad():
        for e in range(len(data)):
            logits = model(input_ids=tokens[None, e, : int(data.lengths[e])]).logits[0, -1]
            values.append(logits[data.answers[e, 0]] - logits[data.answers[e, 1]])
    return torch.stack(values)


@both_heads
def test_all_edges_are_the_model_and_none_the_corrupted_run(family, heads, make_model, make_pairs):
    model, data = make_model(family), make_pairs(seed=1)
    graph = graph_of(model, heads)
    full = eap.Circuit.from_mask(graph, graph.edge_mask)
    none = eap.Circuit.from_mask(graph, torch.zeros_like(graph.edge_mask))
    with StayDouble():
        kept, ablated = eap.evaluate(model, [full, none], data, batch_size=3)
        clean, corrupted = plain_values(model, data, data.clean), plain_values(model, data, data.corrupted)
    for found, right in (
        (kept.values, clean),
        (kept.clean_values, clean),
        (ablated.values, corrupted),
        (ablated.corrupted_values, corrupted),
    ):
        torch.testing.assert_close(found, right)
    assert kept.faithfulness == pytest.approx(1) and ablated.faithfulness == pytest.approx(0)
    assert kept.clean == pytest.approx(float(clean.mean()))


@pytest.mark.parametrize("heads", ["kv", "query"])
@torch.no_grad()
def test_circuit_run_is_its_definition(kind, heads, make_model, make_pairs):
    model, data = make_model(kind), make_pairs(seed=2, n=4)
    decoder, graph = Decoder(model, heads), graph_of(model, heads)
    circuits = [random_circuit(graph, seed, share) for seed, share in enumerate((0.1, 0.4, 0.8, 0.97))]
    with StayDouble():
        results = eap.evaluate(model, circuits, data)
        for e in range(len(data)):
            clean, corrupted = (decoder.embed(tokens) for tokens in prompts(data, e))
            ablated = plain_run(decoder, corrupted).c
            for kept, result in zip(circuits, results):
                right = logit_difference(plain_run(decoder, clean, of_circuit(kept.mask, ablated)).logits, data, e)
                assert float(result.values[e]) == pytest.approx(float(right), abs=1e-9)


@given(share=st.floats(0.02, 0.98), seed=st.integers(0, 10**6), size=st.integers(1, 7), reuse=st.booleans())
@settings(max_examples=25, deadline=None)
def test_results_do_not_depend_on_batching(share, seed, size, reuse):
    model, data = _model(), _pairs()
    for heads in ("kv", "query"):
        circuit = random_circuit(graph_of(model, heads), seed, share)
        right = eap.evaluate(model, circuit, data)
        found = eap.evaluate(model, circuit, data, batch_size=size, reuse_prefix=reuse)
        assert float((found.values - right.values).abs().max()) < 1e-6


_cache: dict[str, object] = {}


def _model():
    """hypothesis runs without function fixtures; one model serves all examples."""
    if "model" not in _cache:
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,
        )
        _cache["model"] = AutoModelForCausalLM.from_config(config).double().eval()
    return _cache["model"]


def _pairs():
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(31, (6, 9), generator=generator)
    corrupted = clean.clone()
    for row, first in enumerate((0, 2, 2, 5, 6, 3)):
        corrupted[row, first] = (clean[row, first] + 1) % 31
    lengths = torch.tensor([9, 9, 7, 6, 8, 5])
    return eap.PairedDataset.from_tokens(clean, corrupted, lengths, torch.tensor([[1, 2]] * 6))


def test_query_circuit_equals_its_kv_circuit(make_model, make_pairs):
    """Keeping an edge to a key/value head is keeping it to every head of the group."""
    model, data = make_model("llama"), make_pairs(seed=3)
    circuit = random_circuit(graph_of(model), 5, 0.5)
    kv, query = eap.evaluate(model, [circuit, circuit.to_query()], data)
    torch.testing.assert_close(kv.values, query.values)


def test_list_equals_one_by_one(make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs(seed=4)
    circuits = [random_circuit(graph_of(model), seed, 0.5) for seed in range(3)]
    for circuit, found in zip(circuits, eap.evaluate(model, circuits, data)):
        torch.testing.assert_close(found.values, eap.evaluate(model, circuit, data).values)
    assert eap.evaluate(model, [], data) == []


def test_results_share_no_memory(make_model, make_pairs):
    """So one can be changed, or pickled, by itself."""
    model, data = make_model("gpt2"), make_pairs(seed=4)
    first, second = eap.evaluate(model, [random_circuit(graph_of(model), seed, 0.5) for seed in range(2)], data)
    right = second.faithfulness
    for values in (first.values, first.clean_values, first.corrupted_values):
        values.zero_()
        assert values.untyped_storage().nbytes() == values.nbytes
    assert second.faithfulness == right


def test_curve_ends_at_the_model_and_areas_are_trapezoids(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(seed=5)
    scores = eap.attribute(model, data)
    fractions = (0.05, 0.2, 0.6, 1.0)
    curve = eap.faithfulness_curve(model, scores, data, fractions, how="greedy")
    assert curve.faithfulness[-1] == pytest.approx(1) and curve.n_edges[-1] == scores.graph.n_edges
    for fraction, circuit, found in zip(fractions, curve.circuits, curve.faithfulness):
        chosen = scores.select(int(fraction * scores.graph.n_edges), how="greedy")
        assert chosen == circuit
        assert eap.evaluate(model, chosen, data).faithfulness == pytest.approx(found)
    x, y = torch.tensor(fractions), torch.tensor(curve.faithfulness)
    assert curve.cpr == pytest.approx(float(torch.trapezoid(y, x)))
    assert curve.cmd == pytest.approx(float(torch.trapezoid((1 - y).abs(), x)))
    assert curve.to_dict()["faithfulness"] == list(curve.faithfulness)


def test_a_curve_of_nodes_has_shares_of_all_heads_and_mlps(make_model, make_pairs):
    model, data = make_model("llama", torch.float32), make_pairs(seed=4)
    scores = eap.attribute(model, data, method="eap").node_scores()
    curve = eap.faithfulness_curve(model, scores, data, (0.1, 0.5, 1.0), signed=True)
    circuits = [scores.select(n, signed=True) for n in (2, 10, 21)]  # of 3 layers of 6 heads and an MLP
    assert list(curve.circuits) == circuits
    assert curve.faithfulness == pytest.approx([found.faithfulness for found in eap.evaluate(model, circuits, data)])
    assert curve.info["how"] == "nodes"
    with pytest.raises(eap.InputError, match="another how than 'top', or with among, found NodeScores"):
        eap.faithfulness_curve(model, scores, data, how="greedy")


def test_baselines_are_other_circuits_of_the_same_sizes(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(seed=5)
    scores = eap.attribute(model, data)
    fractions = (0.05, 0.2, 0.6)
    plain = eap.faithfulness_curve(model, scores, data, fractions)
    curve = eap.faithfulness_curve(model, scores, data, fractions, baselines=("complement", "random"), seeds=(4, 9))
    assert curve.faithfulness == pytest.approx(plain.faithfulness)
    assert plain.baselines == {} and list(curve.baselines) == ["complement", "random"]
    wanted = {
        "complement": [[circuit.complement() for circuit in curve.circuits]],
        "random": [[eap.random_circuit(scores.graph, n, seed=seed) for n in curve.n_edges] for seed in (4, 9)],
    }
    x = torch.tensor(fractions)
    for name, draws in wanted.items():
        baseline = curve.baselines[name]
        right = [[eap.evaluate(model, circuit, data).faithfulness for circuit in row] for row in draws]
        assert [pytest.approx(row) for row in right] == [list(row) for row in baseline.draws]
        assert baseline.faithfulness == pytest.approx(torch.tensor(right).mean(0).tolist())
        areas = [float(torch.trapezoid(torch.tensor(row), x)) for row in right]
        assert baseline.cpr == pytest.approx(sum(areas) / len(areas))
        assert baseline.cmd == pytest.approx(
            sum(float(torch.trapezoid((1 - torch.tensor(row)).abs(), x)) for row in right) / len(right)
        )
    assert curve.to_dict()["baselines"]["random"]["draws"] == [list(row) for row in curve.baselines["random"].draws]


@pytest.mark.parametrize("wrong", [{"baselines": ("best",)}, {"baselines": ("random",), "seeds": ()}])
def test_bad_baselines_are_refused(wrong, make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs()
    graph = graph_of(model)
    scores = eap.EdgeScores(graph, torch.zeros(graph.n_senders, graph.n_receivers))
    with pytest.raises(eap.InputError, match=r"baselines|seeds"):
        eap.faithfulness_curve(model, scores, data, **wrong)


@pytest.mark.parametrize("fractions", [(), (0.0, 1.0), (0.5, 0.2), (0.5, 0.5), (0.1, 1.1), (float("nan"),)])
def test_bad_fractions_are_refused(fractions, make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs()
    graph = graph_of(model)
    scores = eap.EdgeScores(graph, torch.zeros(graph.n_senders, graph.n_receivers))
    with pytest.raises(eap.InputError, match="fractions"):
        eap.faithfulness_curve(model, scores, data, fractions)


def test_compare_two_circuits_on_both_tasks(make_model, make_pairs):
    model = make_model("llama")
    tasks = [make_pairs(seed=6), make_pairs(seed=7)]
    circuits = [random_circuit(graph_of(model), seed, 0.6) for seed in (1, 2)]
    found = eap.compare(model, *circuits, *tasks)
    for i, circuit in enumerate(circuits):
        for j, data in enumerate(tasks):
            right = eap.evaluate(model, circuit, data).faithfulness
            assert found.faithfulness[i][j] == pytest.approx(right)
    shared = int((circuits[0].mask & circuits[1].mask).sum())
    assert found.edges.n_shared == shared
    assert found.edges.iou == pytest.approx(shared / int((circuits[0].mask | circuits[1].mask).sum()))
    assert set(circuits[0].nodes) & set(circuits[1].nodes) and 0 < found.nodes.iou <= 1


def test_what_is_wrong_with_the_second_task_is_said_before_the_first_runs(make_model, make_pairs, monkeypatch):
    model, data = make_model("llama"), make_pairs()
    monkeypatch.setattr(comparison, "evaluate", lambda *_, **__: pytest.fail("it ran"))
    circuit = random_circuit(graph_of(model), 0, 0.5)
    beyond = replace(data, answers=data.answers + 1000)
    with pytest.raises(eap.InputError, match=r"answers of example 0: expected token ids below"):
        eap.compare(model, circuit, circuit, data, beyond)


def test_circuit_of_another_model_is_refused(make_model, make_pairs):
    graph = graph_of(make_model("gpt2"))
    with pytest.raises(eap.InputError, match=r"circuit.*3 layers.*2 layers"):
        eap.evaluate(make_model("llama"), eap.Circuit.from_mask(graph, graph.edge_mask), make_pairs())
    with pytest.raises(eap.InputError, match=r"circuit.*str"):
        eap.evaluate(make_model("llama"), ["circuit.json"], make_pairs())


def test_mask_of_the_wrong_shape_is_refused(make_model):
    graph = graph_of(make_model("gpt2"))
    with pytest.raises(eap.InputError, match=r"mask.*\[9, 21\].*\[3, 4\]"):
        eap.Circuit.from_mask(graph, torch.ones(3, 4, dtype=torch.bool))
    with pytest.raises(eap.InputError, match="edges that exist"):
        eap.Circuit.from_mask(graph, torch.ones(9, 21, dtype=torch.bool))


def test_no_difference_between_the_runs_is_not_a_number(make_model):
    tokens = torch.tensor([[1, 2, 3, 4]])
    data = eap.PairedDataset.from_tokens(tokens, tokens, torch.tensor([4]), torch.tensor([[5, 6]]))
    model = make_model("gpt2")
    graph = graph_of(model)
    result = eap.evaluate(model, eap.Circuit.from_mask(graph, graph.edge_mask), data)
    assert result.faithfulness != result.faithfulness
    # The two prompts may run in batches of different sizes, which round differently.
    assert float(eap.attribute(model, data).values.abs().max()) < 1e-12


def test_only_the_answers_logits_are_computed_for_what_looks_at_no_others(family, make_model, make_pairs):
    """By whatever way a model ends: the same logits, and the same metric for sets of answers of unequal sizes."""
    model, data = make_model(family), make_pairs(seed=8, n=5)
    sets = data.answers[:, :, None].repeat(1, 1, 2)
    sets[:3, :, 1] = -1
    for row in sets[3:]:
        row[:, 1] = torch.tensor([token for token in range(5) if token not in row[:, 0]][:2])
    data = eap.PairedDataset.from_tokens(data.clean, data.corrupted, data.lengths, sets)
    run = prepare(model, data, "logit_diff", "patching", None)
    graph = run.arch.graph("kv")
    with borrowed(model), torch.no_grad():
        for batch in make_batches(data, 3, True, run.arch.device):
            every, few = Runner(run.arch, graph, batch), run.runner(graph, batch)
            right, found = (runner.logits(runner.embed(batch.clean)) for runner in (every, few))
            assert found.shape == (batch.n_examples, len(batch.answer_tokens))
            torch.testing.assert_close(found, right[:, batch.answer_tokens])
            values = [Measurement(run, batch, logits, logits).values(logits) for logits in (right, found)]
            torch.testing.assert_close(*values)


@pytest.mark.parametrize("metric", ["kl_divergence", "prob_diff", "rank", lambda logits, batch: logits.amax(1)])
def test_other_metrics_are_given_all_logits(metric, make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(seed=8)
    run, vocabulary = prepare(model, data, metric, "patching", None), model.config.vocab_size
    with borrowed(model), torch.no_grad():
        for batch in make_batches(data, None, True, run.arch.device):
            runner = run.runner(run.arch.graph("kv"), batch)
            assert runner.logits(runner.embed(batch.clean)).shape == (batch.n_examples, vocabulary)
