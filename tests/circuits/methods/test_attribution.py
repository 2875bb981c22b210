"""Edge scores: first principles, invariance, methods, and everything that is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import Architecture
from eap_circuits.forward import Runner, borrowed, make_batches
from eap_circuits.intervention import run_circuits
from eap_circuits.methods.quadrature import QUADRATURES
from eap_circuits.metrics import get_metric
from eap_circuits.recording import record_run
from eap_circuits.request import Measurement, prepare
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import both_heads, fast_by_kind, prompts, random_edges
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import differences, plain_run, scores


def losses(model, graph, data, masks, metric="logit_diff"):
    """−metric summed over the data with soft masks, by the circuit run: [masks]."""
    total = torch.zeros(len(masks), dtype=torch.float64)
    run = prepare(model, data, metric, "patching", None)
    with borrowed(model), torch.no_grad():
        for batch in make_batches(data, 3, True, run.arch.device):
            runner = Runner(run.arch, graph, batch)
            clean = runner.logits(runner.embed(batch.clean))
            record = record_run(runner, corrupted=True)
            for i, logits in enumerate(run_circuits(runner, graph, record, masks)):
                total[i] -= Measurement(run, batch, clean, record.logits).values(logits).sum()
    return total


@both_heads
def test_score_is_derivative_of_loss_by_edge(family, heads, make_model, make_pairs):
    """EAP's score of an edge is d loss / d ε where the edge carries clean + ε (corrupted − clean)."""
    model, data = make_model(family), make_pairs(n=5)
    with StayDouble():
        scores = eap.attribute(model, data, method="eap", heads=heads)
        graph, scale = scores.graph, scores.values.abs().max()
        chosen = random_edges(graph, 12)
        step = 1e-5
        masks = []
        for u, v in chosen:
            for sign in (1, -1):
                mask = graph.edge_mask.double()
                mask[u, v] -= sign * step
                masks.append(mask)
        found = losses(model, graph, data, masks)
    derivatives = (found[::2] - found[1::2]) / (2 * step) / len(data)
    # float32 storage of the scores is the largest error: 6e-8; the difference's own is about 1e-9.
    for (u, v), derivative in zip(chosen, derivatives.tolist()):
        assert abs(float(scores.values[u, v]) - derivative) <= 1e-6 * scale, graph.edge_name(u, v)


@pytest.mark.parametrize("metric", ["prob_diff", "kl_divergence"])
def test_path_scores_are_their_definition(metric, make_model, make_pairs, relative):
    model, data, steps = make_model("llama"), make_pairs(n=3), 4
    decoder = Decoder(model, heads="kv")
    with StayDouble():
        found = eap.attribute(model, data, metric=metric, steps=steps, quadrature="midpoint", batch_size=1)
        total = torch.zeros(found.values.shape, dtype=torch.float64)
        for e in range(len(data)):
            x, y = (decoder.embed(tokens) for tokens in prompts(data, e))
            clean, corrupted = plain_run(decoder, x), plain_run(decoder, y)
            request = prepare(model, data[[e]], metric, "patching", None)
            (batch,) = make_batches(data[[e]], None, False, request.arch.device)

            def loss(logits, request=request, batch=batch, ends=(clean.logits, corrupted.logits)):
                return -Measurement(request, batch, *(x.detach()[None] for x in ends)).values(logits[None]).sum()

            points = [(1 / steps, plain_run(decoder, torch.lerp(y, x, (k + 0.5) / steps))) for k in range(steps)]
            total += scores(differences(clean, corrupted), points, loss) / len(data)
    edges = found.graph.edge_mask
    assert relative(found.values[edges], total[edges]) < 1e-6


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 3}, {"reuse_prefix": False}])
def test_scores_do_not_depend_on_batching(kind, settings, make_model, make_pairs, relative):
    model, data = make_model(kind), make_pairs(seed=3)
    for heads in ("kv", "query"):
        right = eap.attribute(model, data, heads=heads, steps=3)
        assert relative(eap.attribute(model, data, heads=heads, steps=3, **settings).values, right.values) < 1e-6


def test_scores_do_not_depend_on_order_padding_or_threads(kind, make_model, make_pairs, relative):
    model, data = make_model(kind), make_pairs(seed=4)
    right = eap.attribute(model, data, steps=2).values
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    assert relative(eap.attribute(model, data[order], steps=2, batch_size=2).values, right) < 1e-6
    wide = (
        torch.nn.functional.pad(data.clean, (0, 6), value=7),
        torch.nn.functional.pad(data.corrupted, (0, 6)),
    )
    padded = eap.PairedDataset.from_tokens(*wide, data.lengths, data.answers)
    assert relative(eap.attribute(model, padded, steps=2).values, right) < 1e-6
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert relative(eap.attribute(model, data, steps=2).values, right) < 1e-6
    finally:
        torch.set_num_threads(threads)


@fast_by_kind
def test_kv_scores_are_group_sums_of_query_scores(family, make_model, make_pairs, relative):
    model, data = make_model(family), make_pairs(seed=5)
    query = eap.attribute(model, data, heads="query", steps=3)
    kv = eap.attribute(model, data, heads="kv", steps=3)
    assert query.to_kv().graph == kv.graph
    assert relative(query.to_kv().values, kv.values) < 1e-6


def test_attention_implementations_agree(make_model, make_pairs, relative):
    for family in ("llama", "gpt2", "mistral-window", "falcon", "smollm3"):
        data = make_pairs(seed=6)
        values = []
        for attention in ("sdpa", "eager"):
            model = make_model(family, attn_implementation=attention)
            with StayDouble():
                values.append(eap.attribute(model, data, heads="query").values)
            assert model.config._attn_implementation == attention
        assert relative(*values) < 1e-6


@fast_by_kind
def test_eap_is_the_path_of_one_point_and_clean_corrupted_of_two_ends(family, make_model, make_pairs, relative):
    model, data = make_model(family), make_pairs(seed=7)
    one = eap.attribute(model, data, steps=1, quadrature="right").values
    assert relative(eap.attribute(model, data, method="eap", steps=9).values, one) < 1e-6
    ends = (one + eap.attribute(model, data, steps=1, quadrature="left").values) / 2
    assert relative(eap.attribute(model, data, method="clean-corrupted").values, ends) < 1e-6


@pytest.mark.parametrize("name", sorted(QUADRATURES))
def test_quadratures_integrate(name):
    """Weights sum to one; each rule is exact for what it must be exact for."""
    for steps in (1, 2, 5, 8):
        alpha, weight = (torch.tensor(x, dtype=torch.float64) for x in zip(*QUADRATURES[name].points(steps)))
        assert abs(float(weight.sum()) - 1) < 1e-12
        degree = {"gauss-legendre": 2 * steps - 1, "midpoint": 1}.get(name, 0)
        for power in range(degree + 1):
            assert abs(float((weight * alpha**power).sum()) - 1 / (power + 1)) < 1e-12
    assert QUADRATURES["right"].points(4) == [(0.25, 0.25), (0.5, 0.25), (0.75, 0.25), (1.0, 0.25)]
    assert QUADRATURES["left"].points(2) == [(0.0, 0.5), (0.5, 0.5)]


def test_accumulation_is_flushed_in_bounded_memory(make_model, make_pairs, relative, monkeypatch):
    model, data = make_model("qwen2"), make_pairs(seed=8)
    right = eap.attribute(model, data, steps=4).values
    monkeypatch.setattr("eap_circuits.methods.gradient.method.HELD_BYTES", 1)
    monkeypatch.setattr("eap_circuits.methods.gradient.method.HELD_POINTS", 1)
    assert relative(eap.attribute(model, data, steps=4).values, right) < 1e-6


def test_half_precision_weights(make_model, make_pairs, relative):
    data = make_pairs(seed=9)
    right = eap.attribute(make_model("llama"), data).values
    found = eap.attribute(make_model("llama", dtype=torch.bfloat16), data)
    assert found.values.dtype == torch.float32
    # bfloat16 keeps 8 bits and the gradient passes three layers of them: the order of 2⁻⁸ times ten.
    assert relative(found.values, right) < 0.1


def test_contraction_in_bfloat16_moves_scores_by_its_rounding(make_model, make_pairs, relative, monkeypatch):
    """What a GPU does for a model in low precision, on this processor."""
    model, data = make_model("llama", torch.bfloat16), make_pairs()
    right = eap.attribute(model, data, keep="neurons")
    monkeypatch.setattr(Architecture, "contraction_dtype", torch.bfloat16)
    found = eap.attribute(model, data, keep="neurons")
    # Values, weights and the norm's term are each rounded by half an eps, on both sides; their errors are independent.
    for one, other in ((found.values, right.values), (found.neurons, right.neurons)):
        assert 0 < relative(one, other) <= 3 * torch.finfo(torch.bfloat16).eps


def test_callable_metric_gets_what_it_was_promised(make_model, make_pairs, relative):
    model, data = make_model("gpt2"), make_pairs(seed=10)
    plain = {}
    with torch.no_grad():
        for e in range(len(data)):
            n = int(data.lengths[e])
            plain[e] = [model(input_ids=x[None, e, :n]).logits[0, -1] for x in (data.clean, data.corrupted)]

    def metric(logits, batch):
        assert logits.shape == batch.clean_logits.shape == (len(batch.index), model.config.vocab_size)
        for row, e in enumerate(batch.index.tolist()):
            torch.testing.assert_close(batch.clean_logits[row], plain[e][0])
            torch.testing.assert_close(batch.corrupted_logits[row], plain[e][1])
            assert batch.answers[row].tolist() == data.answers[e].tolist()
            assert batch.lengths[row] == data.lengths[e]
        return get_metric("logit_diff")(logits, batch)

    found = eap.attribute(model, data, metric=metric, batch_size=3)
    assert relative(found.values, eap.attribute(model, data).values) < 1e-6
    assert found.info["metric"] == "metric"


def test_progress_counts_examples(make_model, make_pairs):
    seen = []
    eap.attribute(make_model("gpt2"), make_pairs(), batch_size=3, progress=lambda *x: seen.append(x))
    assert [n for n, _ in seen] == sorted({n for n, _ in seen}) and seen[-1] == (7, 7)


def test_works_whatever_the_callers_grad_mode(make_model, make_pairs, relative):
    model, data = make_model("llama"), make_pairs()
    right = eap.attribute(model, data).values
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert relative(eap.attribute(model, data).values, right) < 1e-6


def test_what_is_made_in_inference_mode_is_of_use_outside(make_model, make_pairs):
    """Masks and results can be changed, and learned with."""
    model = make_model("gpt2")
    with torch.inference_mode():
        data = make_pairs(n=3)
        scores = eap.attribute(model, data, keep="neurons")
        circuit, result = scores.select(20), eap.evaluate(model, scores.select(20), data)
        nodes = scores.node_scores()
    right = eap.evaluate(model, circuit, data)
    assert torch.equal(result.values, right.values) and torch.equal(result.clean_values, right.clean_values)
    held = (scores.values, scores.neurons, scores.graph.edge_mask, circuit.mask, circuit.values, nodes.values)
    for x in (*held, result.values, result.clean_values):
        x.copy_(x.clone())
    weight = torch.ones_like(scores.values).requires_grad_()
    (weight * scores.values).sum().backward()
    assert torch.equal(weight.grad, scores.values)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, ["steps", "1 to 10,000", "0"]),
        ({"steps": 2.5}, ["steps", "2.5"]),
        ({"method": "eap-gi"}, ["method", "'eap-ig-inputs'", "'eap-gi'"]),
        ({"quadrature": "simpson"}, ["quadrature", "'gauss-legendre'", "'simpson'"]),
        ({"heads": "all"}, ["heads", "'kv'", "'all'"]),
        ({"ablation": "noise"}, ["ablation", "'mean-positional'", "'noise'"]),
        ({"ablation": "optimal"}, ["ablation", "eap.optimal_constants", "'optimal'"]),
        ({"metric": "accuracy"}, ["metric", "'logit_diff'", "'accuracy'"]),
        ({"batch_size": 0}, ["batch_size", "at least 1", "0"]),
        ({"compat": "acdc"}, ["compat", "'eap-ig'", "'acdc'"]),
    ],
)
def test_bad_settings_are_one_sentence(settings, words, make_model, make_pairs):
    with pytest.raises(eap.InputError) as error:
        eap.attribute(make_model("gpt2"), make_pairs(), **settings)
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text and text.endswith(".")


def test_an_answer_that_the_model_embeds_and_does_not_predict_is_named(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=2)
    model.lm_head = torch.nn.Linear(24, 30).double()
    data = replace(data, answers=torch.tensor([[1, 2], [3, 30]]))
    for call in (lambda: eap.attribute(model, data), lambda: eap.summarise(model, data)):
        with pytest.raises(eap.InputError, match=r"^answers of example 1: expected .* below the model's 30, .*30"):
            call()


def test_token_beyond_the_vocabulary_is_named(make_model, make_pairs):
    data = make_pairs()
    clean = data.clean.clone()
    clean[2, 1] = 1000
    bad = eap.PairedDataset.from_tokens(clean, data.corrupted, data.lengths, data.answers)
    with pytest.raises(eap.InputError, match=r"clean of example 2.*59.*1000"):
        eap.attribute(make_model("gpt2"), bad)


def test_prompt_beyond_the_models_context_is_named(make_model):
    tokens = torch.ones(2, 60, dtype=torch.int64)
    data = eap.PairedDataset.from_tokens(tokens, tokens, torch.tensor([9, 60]), torch.tensor([[1, 2], [1, 2]]))
    with pytest.raises(eap.InputError, match=r"example 1.*48.*60"):
        eap.attribute(make_model("gpt2"), data)


def test_metric_that_is_not_finite_names_the_example(make_model, make_pairs):
    def metric(logits, batch):
        return logits[:, 0] + torch.where(batch.index == 4, torch.nan, 0.0)

    with pytest.raises(eap.InputError, match=r"example 4.*nan"):
        eap.attribute(make_model("gpt2"), make_pairs(), metric=metric, batch_size=2)


def test_a_metric_whose_gradient_is_not_finite_is_refused(make_model, make_pairs):
    def metric(logits, batch):
        return torch.where(batch.index < 9, logits[:, 0], logits[:, 0] * float("nan"))  # 0 · NaN in the backward pass

    with pytest.raises(eap.InputError, match=r"^scores: expected finite numbers, .* of the float64 model are not\.$"):
        eap.attribute(make_model("gpt2"), make_pairs(), metric=metric)


def test_data_of_another_kind_are_refused(make_model):
    with pytest.raises(eap.InputError, match=r"PairedDataset.*list"):
        eap.attribute(make_model("gpt2"), [("a", "b")])
