"""What a model makes of the answers, against its own plain run."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.errors import InputWarning
from eap_circuits.methods import METHODS


def scored_logits(model: Any, tokens: Tensor, lengths: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits[torch.arange(len(tokens)), lengths - 1].double()


@pytest.mark.parametrize("sets", [False, True])
def test_probabilities_of_answers(kind: str, sets: bool, make_model: Any, make_pairs: Any) -> None:
    model, data = make_model(kind), make_pairs()
    if sets:
        more = torch.tensor([[1, -1]]).repeat(len(data), 1).masked_fill(data.answers == 1, -1)
        more[(data.answers == 1).any(1)] = -1
        data = replace(data, answers=torch.stack([data.answers, more], 2))
    ids = data.answers.reshape(len(data), 2, -1)
    found = []
    for tokens in (data.clean, data.corrupted):
        probabilities = scored_logits(model, tokens, data.lengths).softmax(1)
        picked = probabilities.gather(1, ids.clamp(min=0).flatten(1)).view(ids.shape).masked_fill(ids < 0, 0)
        found.append(picked.sum(2))
    clean, corrupted = found
    summary = eap.summarise(model, data)
    wanted = [*clean.mean(0).tolist(), *corrupted.mean(0).tolist()]
    numbers = [summary.good, summary.bad, summary.corrupted_good, summary.corrupted_bad]
    assert numbers == pytest.approx(wanted, rel=1e-5)
    assert summary.prefers_bad == int((clean[:, 0] < clean[:, 1]).sum())
    change = ((clean[:, 0] / clean[:, 1]).log() - (corrupted[:, 0] / corrupted[:, 1]).log()).abs()
    assert summary.alike == int((change < torch.tensor(1.1).log()).sum())
    assert summary.equal == 1
    assert f"prefers the bad answer on {summary.prefers_bad}." in str(summary)


def test_corrupted_prompts_that_change_nothing_are_told(make_model: Any, make_pairs: Any) -> None:
    data = make_pairs()
    data = replace(data, corrupted=data.clean)
    with (
        pytest.warns(InputWarning, match="on 7 of 7 pairs the corrupted prompt changes the odds"),
        pytest.warns(InputWarning, match="on 7 of 7 pairs the corrupted prompt is the clean one"),
    ):
        assert eap.summarise(make_model("llama"), data).alike == 7


def spelled(model: Any, data: Any, wrong: bool) -> Any:
    """Answers among the likeliest tokens, variants among the least likely; where `wrong`, the other way round."""
    order = scored_logits(model, data.clean, data.lengths).argsort(1)
    likely, unlikely = order[:, -2:], order[:, :2]
    return replace(data, answers=unlikely if wrong else likely, variants=likely if wrong else unlikely)


def told(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if "leading space" in str(each.message)]


@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff"])
@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if each.measures])
def test_attribute_tells_once_of_answers_that_the_model_spells_otherwise(
    method: str, metric: str, make_model: Any, make_pairs: Any
) -> None:
    model, data = make_model("gpt2", torch.float32), make_pairs()
    few = torch.zeros_like(bind(model).graph("kv").edge_mask)
    few[0, -1] = True
    options = {"edges": few} if method == "exact" else {}

    def score(wrong: bool, **more: Any) -> None:
        eap.attribute(model, spelled(model, data, wrong), metric, method=method, **options, **more)

    assert len(told(lambda: score(True, batch_size=2))) == 1
    assert len(told(lambda: score(True, memory="9MB"))) == 1  # near which memory is measured first
    assert told(lambda: score(False)) == []


@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff", "top1_accuracy"])
def test_evaluate_and_summarise_tell_too(metric: str, make_model: Any, make_pairs: Any) -> None:
    model, data = make_model("llama", torch.float32), make_pairs()
    right, wrong = (spelled(model, data, each) for each in (False, True))
    circuit = eap.attribute(model, right, "prob_diff", method="eap").select(n_edges=20)
    assert len(told(lambda: eap.evaluate(model, circuit, wrong, metric))) == 1
    assert told(lambda: eap.evaluate(model, circuit, right, metric)) == []
    assert len(told(lambda: eap.summarise(model, wrong))) == 1
    assert told(lambda: eap.summarise(model, right)) == []


def test_the_values_are_what_they_are_without_variants(make_model: Any, make_pairs: Any) -> None:
    model, data = make_model("llama"), make_pairs()
    wrong = spelled(model, data, wrong=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = [eap.attribute(model, each).values for each in (wrong, replace(wrong, variants=None))]
    torch.testing.assert_close(*scores, rtol=1e-6, atol=1e-7)


def test_variants_outside_the_vocabulary_are_no_matter(make_model: Any, make_pairs: Any) -> None:
    model, data = make_model("llama"), make_pairs()
    beyond = replace(data, variants=torch.full_like(data.answers, 10**6))
    assert told(lambda: eap.attribute(model, beyond)) == []
