"""Scores under backward rules: against models written out by hand, conservation, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.forward import borrowed
from eap_circuits.methods.quadrature import QUADRATURES
from eap_circuits.recording import ABLATIONS, RULES
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import fast_by_kind, groups_of
from tests.circuits.recording.rules_by_hand import scores_by_hand

ALL = sorted(RULES)


@pytest.mark.parametrize("rules", [None, *ALL])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_scores_are_those_of_a_model_written_out_by_hand(name, rules, make_model, make_pairs, relative):
    model, data = make_model(name), make_pairs(n=4)
    with StayDouble():
        for method, path in (("eap", [(1.0, 1.0)]), ("eap-ig-inputs", QUADRATURES["right"].points(3))):
            found = eap.attribute(model, data, method=method, steps=3, heads="query", rules=rules)
            right = scores_by_hand(model, data, rules, path, found.graph)
            assert relative(found.values, right) < 1e-6


@pytest.mark.parametrize("rules", ["relp", "gim"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_paths_of_activations_are_those_of_a_model_written_out_by_hand(name, rules, make_model, make_pairs, relative):
    model, data = make_model(name), make_pairs(n=2)
    with StayDouble():
        found = eap.attribute(model, data, method="eap-ig-activations", steps=2, heads="query", rules=rules)
        graph = found.graph
        right = scores_by_hand(model, data, rules, QUADRATURES["right"].points(2), graph, groups_of(graph))
        assert relative(found.values, right) < 1e-6


def test_conductance_of_one_segment_is_the_mean_of_its_ends(make_model, make_pairs, relative):
    """Then every sender's change is its whole difference: clean-corrupted scores, under the same rules."""
    model, data = make_model("llama"), make_pairs(n=4)
    for rules in ALL:
        found = eap.attribute(model, data, method="eap-conductance", steps=1, rules=rules).values
        assert relative(found, eap.attribute(model, data, method="clean-corrupted", rules=rules).values) < 1e-5


@pytest.mark.parametrize("name", ["cohere", "gemma2", "llama", "mistral-window", "olmo2", "qwen3", "smollm3"])
def test_relevance_is_conserved_at_every_cut(name, make_model, make_pairs):
    """Without biases, and with all that is not linear constant, the metric is linear in each cut through the graph.

    The corrupted prompts are of a token whose embedding is zero: every sender writes nothing, Δ = −contribution, and
    the scores of the edges across any cut add up to the clean prompts' metric.
    """
    model, data = make_model(name), make_pairs(n=5)
    if name == "gemma2":
        model.config.final_logit_softcapping = None
    for module in model.modules():
        assert getattr(module, "bias", None) is None or not module.bias.numel()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    clean = data.clean.clamp(min=1)
    pairs = eap.PairedDataset.from_tokens(clean, torch.zeros_like(clean), data.lengths, data.answers)
    with StayDouble(), torch.no_grad():
        scores = eap.attribute(model, pairs, method="eap", rules="relp-ah")
        logits = [model(input_ids=clean[None, e, : int(n)]).logits[0, -1] for e, n in enumerate(data.lengths)]
    metric = sum(float(x[a[0]] - x[a[1]]) for x, a in zip(logits, data.answers, strict=True)) / len(data)
    reach = scores.graph.reach
    for senders in reach.unique().tolist():
        crossing = scores.values[:senders, reach >= senders].double().sum()
        assert float(crossing) == pytest.approx(metric, rel=1e-5), senders


@pytest.mark.parametrize("name", ["cohere", "falcon", "gemma3", "gpt2", "mistral-window", "stablelm-parallel"])
def test_attention_implementations_agree(name, make_model, make_pairs, relative):
    models = [make_model(name, attn_implementation=attention) for attention in ("sdpa", "eager")]
    with StayDouble():
        # One by one attention has no mask, together it has one for prefixes of several lengths.
        for rules, heads, size in (
            ("relp", "query", None),
            ("relp-ah", "kv", 1),
            ("gim", "query", None),
            ("gim", "kv", 1),
        ):
            settings = {"method": "eap", "heads": heads, "batch_size": size, "rules": rules}
            first, second = (eap.attribute(model, make_pairs(n=4), **settings).values for model in models)
            assert relative(first, second) < 1e-6, settings


@fast_by_kind
def test_values_stay_as_they_are(family, make_model, make_pairs):
    """Bit for bit."""
    model, data = make_model(family), make_pairs(n=3)
    runs = []

    def metric(logits, batch):
        if logits.requires_grad:
            runs[-1].append(logits.detach())
        return logits[:, 0]

    for rules in (None, *ALL):
        runs.append([])
        eap.attribute(model, data, metric=metric, method="clean-corrupted", rules=rules)
    for ruled in runs[1:]:
        assert len(ruled) == len(runs[0]) > 0
        assert all(torch.equal(a, b) for a, b in zip(ruled, runs[0], strict=True))


@pytest.mark.parametrize("rules", ALL)
def test_scores_do_not_depend_on_batching(kind, rules, make_model, make_pairs, relative):
    model, data = make_model(kind), make_pairs(seed=3)
    right = eap.attribute(model, data, steps=3, rules=rules)
    assert right.info["rules"] == rules
    for settings in ({"batch_size": 1}, {"batch_size": 3, "reuse_prefix": False}, {"memory": "2MB"}):
        assert relative(eap.attribute(model, data, steps=3, rules=rules, **settings).values, right.values) < 1e-6
    query = eap.attribute(model, data, steps=3, heads="query", rules=rules)
    assert relative(query.to_kv().values, right.values) < 1e-6


@pytest.mark.parametrize("rules", ALL)
def test_rules_change_scores_and_keep_the_methods_relations(rules, make_model, make_pairs, relative):
    model, data = make_model("llama"), make_pairs(seed=7)
    one = eap.attribute(model, data, method="eap", rules=rules).values
    assert relative(one, eap.attribute(model, data, method="eap").values) > 0.1
    ends = (one + eap.attribute(model, data, steps=1, quadrature="left", rules=rules).values) / 2
    assert relative(eap.attribute(model, data, method="clean-corrupted", rules=rules).values, ends) < 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rules": "lrp"}, ["rules", "'gim'", "'relp'", "'lrp'"]),
        ({"rules": "relp", "method": "exact"}, ["rules", "None", "'exact'", "'relp'"]),
        ({"rules": "gim", "method": "information-flow-routes"}, ["rules", "None", "'information-flow-routes'"]),
    ],
)
def test_bad_settings_are_one_sentence(settings, words, make_model, make_pairs):
    # A plan refuses these methods by themselves.
    for call in (eap.attribute,) if "method" in settings else (eap.attribute, eap.plan):
        with pytest.raises(eap.InputError) as error:
            call(make_model("gpt2"), make_pairs(), **settings)
        text = str(error.value)
        assert all(word in text for word in words) and "\n" not in text and text.endswith(".")


def test_a_plan_counts_what_the_rules_take(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs()
    assert eap.plan(model, data, rules="gim").bytes != eap.plan(model, data).bytes


def hidden(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """Attention without any softmax that could be seen."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    weights = torch.where(allowed if attention_mask is None else attention_mask, scores, -torch.inf).exp()
    return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2), None


def test_attention_that_cannot_be_seen_is_refused_where_rules_change_it(make_model, make_pairs, relative, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "hidden", hidden)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "hidden", sdpa_mask)
    model, data = make_model("llama", attn_implementation="hidden"), make_pairs(n=3)
    right = eap.attribute(make_model("llama"), data, rules="relp").values
    assert relative(eap.attribute(model, data, rules="relp").values, right) < 1e-5
    for rules in ("gim", "relp-ah"):
        with pytest.raises(eap.InputError, match=r"rules: expected attn_implementation .*layer 0 \(LlamaAttention\)"):
            eap.attribute(model, data, rules=rules)


@pytest.mark.parametrize("rules", ALL)
def test_an_activation_that_cannot_be_seen_is_refused(rules, make_model, make_pairs):
    model = make_model("gpt2")
    del model.transformer.h[1].mlp.act
    model.transformer.h[1].mlp.act = functional.gelu
    with pytest.raises(eap.InputError, match=r"rules: expected activation .*layer 1 \(GPT2MLP\)"):
        eap.attribute(model, make_pairs(n=3), rules=rules)
    assert "forward" not in vars(model.transformer.h[0])


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs"])
@pytest.mark.parametrize("rules", [None, "relp", "gim"])
def test_scores_are_linear_in_what_takes_a_contributions_place(rules, method, kind, make_model, make_pairs, relative):
    """Gradients do not know the ablation, whatever takes their place: half the mean gives the mean of two scores."""
    model, data = make_model(kind), make_pairs(n=3)
    arch = bind(model)
    with borrowed(model):
        half = ABLATIONS["mean"].constants(arch, data).map(lambda x: x / 2)
    zero, mean, between = (
        eap.attribute(model, data, method=method, steps=2, rules=rules, ablation=ablation).values
        for ablation in ("zero", "mean", half)
    )
    assert relative(between, (zero + mean) / 2) < 1e-5
