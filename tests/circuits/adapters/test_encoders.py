"""Masked language models and classifiers: what is scored is what the plain model gives, with padding and without."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

import eap_circuits as eap
from eap_circuits.adapters import FAMILIES, bind, pretrained
from eap_circuits.tasks import PairedDataset
from tests.circuits.cli.conftest import run
from tests.circuits.conftest import ENCODERS, pairs_for, prompts, random_circuit, tiny_model
from tests.circuits.texts.test_masks import FRANCE, ITALY, tokenizer_of

pytestmark = pytest.mark.filterwarnings("ignore:.*Faithfulness is undefined")


@pytest.fixture(params=ENCODERS)
def encoder(request):
    return request.param


def unequal(name):
    """Pairs of unequal lengths, scored at a token that both prompts have before they differ."""
    data = pairs_for(name)
    shorter = data.lengths - torch.tensor([1, 0, 2])
    data = PairedDataset.from_tokens(data.clean, data.corrupted, data.lengths, data.answers, corrupted_lengths=shorter)
    scored = None if name.endswith("-classes") else torch.ones(3, 1, dtype=torch.int64)
    return replace(data, scored=scored, targets=None)


def by_hand(model, data, e, side):
    """The plain model's logit difference on one prompt by itself."""
    ids = prompts(data, e)[side]
    if model.config.model_type == "roberta":  # which skips the padding's token when it counts positions
        ids = ids.where(ids != 1, 2)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    if data.scored is not None:
        place = int(data.scored[e, 0])
        logits = logits[place if side == 0 or data.alignment is None else int(data.alignment[e, place])]
    good, bad = data.answers[e]
    return float(logits[good] - logits[bad])


@pytest.mark.parametrize("pairs", [pairs_for, unequal])
def test_runs_are_the_plain_models(encoder, pairs):
    model, data = tiny_model(encoder), pairs(encoder)
    if model.config.model_type == "roberta":
        data = replace(
            data, clean=data.clean.where(data.clean != 1, 2), corrupted=data.corrupted.where(data.corrupted != 1, 2)
        )
    scores = eap.attribute(model, data, method="eap")
    full = eap.Circuit.from_mask(scores.graph, scores.graph.edge_mask)
    some = random_circuit(scores.graph, 0, 0.6)
    found = eap.evaluate(model, [full, some], data)
    for side, values in enumerate((found[0].clean_values, found[0].corrupted_values)):
        right = [by_hand(model, data, e, side) for e in range(len(data))]
        torch.testing.assert_close(values.double(), torch.tensor(right, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    # Each pair by itself, without padding.
    together = eap.attribute(model, data, steps=2)
    alone = [eap.attribute(model, data[[e]], steps=2).values for e in range(len(data))]
    torch.testing.assert_close(together.values, torch.stack(alone).mean(0), rtol=1e-5, atol=1e-6)
    apart = [float(eap.evaluate(model, some, data[[e]]).mean) for e in range(len(data))]
    torch.testing.assert_close(found[1].mean, sum(apart) / len(apart), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(ENCODERS) - {"llama-classes"}))
def test_tokens_before_the_first_difference_count(name):
    """They see it: a pair that differs only at its end moves them, too."""
    model, data = tiny_model(name), pairs_for(name)
    corrupted = data.clean.clone()
    last = data.lengths[:, None] - 1
    corrupted.scatter_(1, last, (data.clean.gather(1, last) + 3) % 59)
    scores = eap.attribute(model, replace(data, corrupted=corrupted), method="eap", keep="positions")
    assert scores.per_position[0].any()


@pytest.mark.parametrize("name", ["bert-masked", "modernbert", "roberta", "bert-classes"])
def test_plans_without_weights(name):
    model, data = tiny_model(name, torch.float32), pairs_for(name)
    plan = eap.plan(model.to("meta"), data, method="eap")
    assert plan.tokens > 0


@pytest.mark.parametrize("name", ["bert-masked", "modernbert-classes"])
def test_circuits_are_learned(name):
    model, data = tiny_model(name), pairs_for(name)
    scores = eap.attribute(model, data, method="eap")
    learned = eap.learn_mask(model, data, start=scores, steps=2)
    assert learned.values.isfinite().all()


def refused(model, data, **asked):
    with pytest.raises(eap.InputError) as error:
        eap.attribute(model, data, **asked)
    return str(error.value)


def test_from_a_file_of_texts_to_scores_and_curves(tmp_path):
    """By the commands: the model's own head, the mask of its own tokenizer."""
    tiny_model("bert-masked", torch.float32).save_pretrained(tmp_path / "model")
    tokenizer_of("bert").save_pretrained(tmp_path / "model")
    rows = [
        {"clean": FRANCE, "corrupted": ITALY, "answers": ["Paris", "Rome"]},
        {"clean": ITALY, "corrupted": FRANCE, "answers": ["Rome", "Paris"]},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out, given = tmp_path / "scores.safetensors", ("--data", tmp_path / "pairs.jsonl")
    run("attribute", tmp_path / "model", *given, "-o", out, "--method", "eap")
    run("curve", tmp_path / "model", out, *given, "-o", tmp_path / "curve.json")
    scores = eap.EdgeScores.load(out)
    assert scores.values.any() and scores.graph.n_layers == 2


def test_a_subclass_of_a_classifier_is_one():
    model = tiny_model("bert-classes")
    model.__class__ = type("Own", (type(model),), {})
    assert eap.attribute(model, pairs_for("bert-classes"), method="eap").values.any()


def test_data_that_do_not_suit_the_model():
    masked, classifier = tiny_model("bert-masked"), tiny_model("bert-classes")
    for method in ("eap", "information-flow-routes"):
        said = refused(masked, pairs_for("llama"), method=method)
        assert "expected a mask token in the prompts, or scored positions" in said
    assert "expected classes below the model's 3" in refused(classifier, pairs_for("llama"))
    scored = replace(pairs_for("bert-classes"), scored=pairs_for("bert-masked").scored)
    assert "expected classes (ids) as answers" in refused(classifier, scored)
    long = PairedDataset.from_tokens(*[torch.zeros(1, 48, dtype=torch.int64)] * 2, [48], [[0, 1]], scored=[[3]])
    assert "at most the model's 46 tokens" in refused(tiny_model("roberta"), long)  # its positions begin at 2


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("bert-masked", AutoModelForMaskedLM),
        ("bert-classes", AutoModelForSequenceClassification),
        ("llama-classes", AutoModelForSequenceClassification),
    ],
)
def test_a_saved_model_is_loaded_with_its_head(name, auto, tmp_path, monkeypatch):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda *_, **__: None)
    for weights in (True, False):
        loaded, _ = pretrained.load_model(str(tmp_path), weights=weights)
        assert type(loaded) is type(model)


@pytest.mark.parametrize("name", ["bert-masked", "albert", "distilbert"])
def test_rules_of_attention_find_the_pattern(name):
    """A constant one gives queries and keys no gradient; both ways to compute one have GIM's."""
    model, data = tiny_model(name), pairs_for(name)
    found = eap.attribute(model, data, method="eap", rules="relp-ah")
    of_pattern = torch.tensor([v.endswith(("<q>", "<k>")) for v in found.graph.receivers])
    values = torch.tensor([v.endswith("<v>") for v in found.graph.receivers])
    assert not found.values[:, of_pattern].any() and found.values[:, values].any()
    eager = tiny_model(name, attn_implementation="eager")
    one, other = (eap.attribute(each, data, method="eap", rules="gim").values for each in (model, eager))
    plain = eap.attribute(model, data, method="eap").values
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(one, plain, rtol=1e-2)


def test_layers_as_nodes_need_something_behind_them():
    table = replace(FAMILIES["bert"], q="", k="", v="", out="", mlp=("", ""))
    with pytest.raises(eap.InputError, match=r"bert's table: expected a `final_norm`, as each layer is one node"):
        bind(tiny_model("bert"), table)
