"""What is kept besides the mean: scores of examples and positions against runs of single examples, and their uses."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import eap_circuits as eap
from eap_circuits.methods.exact import method as exact
from eap_circuits.methods.gradient import method as gradient
from eap_circuits.request import asked
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import logit_difference, prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import differences, gradients, plain_run

METHODS = [{"method": "eap"}, {"steps": 3}, {"method": "clean-corrupted"}, {"method": "exact"}]
ALL = ("examples", "positions", "neurons")


@pytest.mark.parametrize("settings", METHODS, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_an_examples_scores_are_those_of_a_run_of_it_alone(family, settings, make_model, make_pairs, relative):
    model, data = make_model(family), make_pairs(n=4, longest=7)
    if settings.get("method") == "exact":
        settings = {**settings, "edges": eap.attribute(model, data).select(12)}
    scores = eap.attribute(model, data, keep="examples", **settings)
    alone = torch.stack([eap.attribute(model, data[[e]], **settings).values for e in range(len(data))])
    # Some norms compute in float32 whatever the model's dtype.
    assert relative(scores.per_example, alone) < 1e-5
    assert relative(scores.variance, alone.double().var(0, correction=0)) < 1e-5
    assert relative(scores.values, alone.double().mean(0)) < 1e-5
    assert scores.info["keep"] == ["examples"]


@pytest.mark.parametrize("keep", [None, "variance", "examples", "positions", "positions-from-end", "neurons", ALL])
def test_the_mean_and_one_statistic_do_not_depend_on_what_else_is_kept(keep, make_model, make_pairs, relative):
    model, data = make_model("llama"), make_pairs(seed=2)
    right = eap.attribute(model, data, steps=3)
    assert right.statistics() == {} and "keep" not in right.info
    scores = eap.attribute(model, data, steps=3, keep=keep)
    assert relative(scores.values, right.values) < 1e-6
    everything = eap.attribute(model, data, steps=3, keep=ALL)
    for name, found in scores.statistics().items():
        if keep != "positions-from-end":
            assert relative(found, everything.statistics()[name]) < 1e-6
    kinds = {"variance": 1, "examples": 2, "positions": 1, "positions-from-end": 1, "neurons": 1, ALL: 4, None: 0}
    assert len(scores.statistics()) == kinds[keep]


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 3}, {"reuse_prefix": False}])
def test_statistics_do_not_depend_on_batching(kind, settings, make_model, make_pairs, relative):
    model, data = make_model(kind), make_pairs(seed=3)
    for ends in ("positions", "positions-from-end"):
        given = {"method": "eap", "keep": ("examples", "neurons", ends)}
        right, found = (eap.attribute(model, data, **given, **more).statistics() for more in ({}, settings))
        assert right.keys() == found.keys()
        for name in right:
            # A variance is a difference of squares of float32 numbers.
            assert relative(found[name], right[name]) < 1e-5, name


def test_positions_are_those_of_the_prompts(make_model, make_pairs, relative):
    """Position by position: the same prompts with one position's difference in contributions at a time."""
    model, data = make_model("gpt2"), make_pairs(seed=4)
    start = eap.attribute(model, data, steps=2, keep="positions").per_position
    end = eap.attribute(model, data, steps=2, keep="positions-from-end").per_position
    each = eap.attribute(model, data, steps=2, keep="examples").per_example
    longest = int(data.lengths.max())
    assert start.shape == end.shape == (longest, *each.shape[1:])
    by_start, by_end = torch.zeros_like(start), torch.zeros_like(end)
    for e in range(len(data)):
        n = int(data.lengths[e])
        own = eap.attribute(model, data[[e]], steps=2, keep="positions").per_position
        # Of a pair that differs nowhere, or not where it matters, there is nothing but rounding.
        assert (own.sum(0) - each[e]).norm() < 1e-5 * each.norm()
        # Before the first difference nothing differs.
        assert not own[: int(data.first_difference[e])].any()
        by_start[:n] += own / len(data)
        by_end[longest - n :] += own / len(data)
    assert relative(start, by_start) < 1e-5
    assert relative(end, by_end) < 1e-5
    assert relative(start.sum(0), each.mean(0)) < 1e-5


def test_a_positions_score_is_its_definition(make_model, make_pairs, relative):
    """Σ_k w_k ⟨Δ_u(t), ∂loss/∂x_v(t)⟩ of one position t alone."""
    model, data = make_model("gpt2"), make_pairs(seed=6, n=1, longest=8)
    clean, corrupted = data.clean.clone(), data.corrupted.clone()
    corrupted[0, 1:3] = (clean[0, 1:3] + 1) % 59
    data = eap.PairedDataset.from_tokens(clean, corrupted, data.lengths, data.answers)
    decoder = Decoder(model)
    with StayDouble():
        scores = eap.attribute(model, data, method="eap", keep="positions")
        clean, corrupted = (plain_run(decoder, decoder.embed(tokens)) for tokens in prompts(data, 0))
        g = gradients(-logit_difference(clean.logits, data, 0), clean.x)
        right = torch.einsum("utd,vtd->tuv", differences(clean, corrupted), g) * scores.graph.edge_mask
    assert relative(scores.per_position, right) < 1e-6


OTHERS = [
    {"method": "eap-ig-activations"},
    {"method": "eap-ig-activations", "compat": "eap-ig"},
    {"method": "eap-conductance"},
    {"method": "eap-gp"},
    {"rules": "relp"},
    {"rules": "gim"},
    {"ablation": "zero"},
]


@pytest.mark.parametrize("settings", OTHERS, ids=str)
@pytest.mark.parametrize("family", ["gemma2", "gpt-neox"])
def test_terms_of_every_other_methods_scores_add_up(family, settings, make_model, make_pairs, relative):
    model, data = make_model(family), make_pairs(seed=1, n=3)
    given = {"steps": 2, **settings}
    plain = eap.attribute(model, data, **given).values
    scores = eap.attribute(model, data, keep=ALL, **given)
    assert relative(scores.values, plain) < 1e-5
    assert relative(scores.per_example.mean(0), plain) < 1e-5
    assert relative(scores.per_position.sum(0), plain) < 1e-5
    assert relative(scores.neurons.sum(1), scores.node_scores().values) < 1e-5
    one = eap.attribute(model, data[[1]], **given).values
    assert relative(scores.per_example[1], one) < 1e-5


@pytest.mark.parametrize("method", ["eap", "exact"])
def test_works_in_the_callers_inference_mode(method, tmp_path, make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs(n=3)
    right = eap.attribute(model, data, method=method, keep="examples")
    file = {"checkpoint": tmp_path / "x.safetensors"}
    for _ in range(2):
        with torch.inference_mode():
            found = eap.attribute(model, data, method=method, keep="examples", **file)
        assert torch.equal(found.values, right.values) and torch.equal(found.variance, right.variance)


def test_chunks_of_the_path_do_not_matter(make_model, make_pairs, relative, monkeypatch):
    model, data = make_model("qwen2"), make_pairs(seed=8)
    right = eap.attribute(model, data, steps=4, keep=ALL)
    monkeypatch.setattr("eap_circuits.methods.gradient.method.HELD_BYTES", 1)
    monkeypatch.setattr("eap_circuits.methods.gradient.method.HELD_POINTS", 2)
    found = eap.attribute(model, data, steps=4, keep=ALL)
    for name, tensor in found.statistics().items():
        assert relative(tensor, right.statistics()[name]) < 1e-5, name


def test_kv_statistics_are_group_sums(make_model, make_pairs, relative):
    model, data = make_model("llama"), make_pairs(seed=5)
    kv = eap.attribute(model, data, keep=ALL)
    query = eap.attribute(model, data, heads="query", keep=ALL).to_kv()
    for name, tensor in kv.statistics().items():
        assert relative(query.statistics()[name], tensor) < 1e-5, name
    unknown = eap.attribute(model, data, heads="query", keep="variance").to_kv()
    assert unknown.statistics() == {}


@pytest.mark.parametrize("kept", ["examples", "variance"])
def test_an_interrupted_exact_run_keeps_its_statistics(kept, tmp_path, make_model, make_pairs, monkeypatch):
    model, data = make_model("gpt2"), make_pairs(seed=7)
    given = {"method": "exact", "batch_size": 3, "keep": kept}
    right = eap.attribute(model, data, **given)
    monkeypatch.setattr("eap_circuits.checkpoint.file.SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(exact, "TOKENS_TOGETHER", 256)
    calls = []

    def stop(*of):
        calls.append(of)
        if len(calls) == 4:
            raise KeyboardInterrupt

    file = tmp_path / "exact.safetensors"
    with pytest.raises(KeyboardInterrupt):
        eap.attribute(model, data, checkpoint=file, progress=stop, **given)
    found = eap.attribute(model, data, checkpoint=file, progress=stop, **given)
    for name, tensor in right.statistics().items():
        assert torch.allclose(found.statistics()[name], tensor, rtol=1e-5, atol=1e-7), name
    with pytest.raises(eap.InputError, match="a checkpoint of this model, data and request"):
        eap.attribute(model, data, checkpoint=file, **{**given, "keep": None})


def test_confidence_is_that_of_the_examples_or_of_the_variance(make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs(seed=9)
    scores = eap.attribute(model, data, keep="examples")
    assert torch.equal(scores.confidence(), eap.bootstrap_confidence(scores.per_example))
    few = eap.attribute(model, data, keep="variance")
    assert torch.equal(few.confidence(), eap.normal_confidence(few.values, few.variance, len(data)))
    sure = scores.confidence() >= 0.95
    assert 0 < int(sure.sum()) < scores.graph.n_edges
    circuit = scores.select(40, prune=False, among=sure)
    assert not (circuit.mask & ~sure).any()
    with pytest.raises(eap.InputError, match=r'confidence\(\): expected scores of attribute\(keep="variance"\)'):
        eap.attribute(model, data).confidence()


@pytest.mark.parametrize("keep", ["examples", "positions"])
def test_what_it_takes_is_predicted_and_kept_within_the_budget(keep, make_model, make_pairs, relative, monkeypatch):
    from eap_circuits.budget import PeakBytes
    from tests.circuits.budget.test_memory import longer_pairs

    model, data = make_model("llama"), longer_pairs()
    monkeypatch.setattr(gradient, "most_tokens", lambda device: 300)
    plan = eap.plan(model, data, keep=keep)
    with PeakBytes() as count:
        right = eap.attribute(model, data, keep=keep)
    held = {"examples": 12 * 4 + 2 * 8, "positions": 24 * (8 + 4)}[keep] * right.values.numel()
    assert abs(plan.bytes + held - count.peak) <= 0.15 * count.peak
    few = eap.plan(model, data, keep=keep, memory=plan.bytes // 3)
    assert few.bytes <= plan.bytes // 3 and few.tokens < plan.tokens
    found = eap.attribute(model, data, keep=keep, memory=plan.bytes // 3)
    for name, tensor in right.statistics().items():
        assert relative(found.statistics()[name], tensor) < 1e-5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"keep": "everything"}, "keep: expected one of 'examples'.*found 'everything'"),
        ({"keep": {"variance", "everything"}}, "keep: expected one of 'examples'.*found 'everything'"),
        ({"keep": 3}, "keep: expected a name or names of 'variance'.*found 3"),
        ({"keep": ("positions", "positions-from-end")}, "keep: expected positions counted from one end"),
        ({"keep": "positions", "method": "exact"}, "keep: expected 'variance' or 'examples' for method 'exact'"),
        (
            {"keep": "variance", "method": "information-flow-routes"},
            "keep: expected nothing for method 'info",
        ),
        ({"keep": "neurons", "method": "exact"}, "keep: expected 'variance' or 'examples' for method 'exact'"),
    ],
)
def test_bad_requests_are_one_sentence(settings, words, make_model, make_pairs):
    with pytest.raises(eap.InputError, match=words):
        eap.attribute(make_model("gpt2"), make_pairs(), **settings)


@pytest.mark.parametrize("method", ["eap", "exact"])
def test_scores_beyond_memory_are_refused_with_their_bytes(method, make_model, make_pairs, monkeypatch):
    model, data = make_model("gpt2"), make_pairs()
    edges = 9 * 21  # senders × receivers of two layers of three heads
    needed = 7 * edges * 4 + 2 * edges * 8
    monkeypatch.setattr("eap_circuits.methods.statistics.free_bytes", lambda device: needed - 1)
    monkeypatch.setattr(asked, "make_batches", None)
    with pytest.raises(eap.InputError, match=f"keep: expected scores that fit into the {needed - 1:,} bytes"):
        eap.attribute(model, data, method=method, keep="examples")


def test_the_pages_example_runs(tmp_path, make_model, make_pairs, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "statistics.md").read_text()
    names = {"eap": eap, "model": make_model("llama"), "data": make_pairs(n=9)}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["last"].shape == names["sure"].shape == names["scores"].graph.edge_mask.shape
    assert names["each"].shape == (9, len(names["scores"].graph.senders))
    assert int(names["circuit"].mask.any(1).sum()) == 21 and math.isfinite(names["result"].faithfulness)
    assert torch.equal(eap.NodeScores.load("nodes.safetensors").neurons, names["scores"].neurons)
    assert capsys.readouterr().out
