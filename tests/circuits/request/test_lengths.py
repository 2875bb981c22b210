"""Positions that depend on what else is in a pass: on the longest prompt (longrope), on padding (RoBERTa)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import FAMILIES
from tests.circuits.conftest import random_model
from tests.circuits.models import CONFIGS, ENCODERS, VOCABULARY

_MOST = 6
_ANGLES = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "factor": 8.0,
    "original_max_position_embeddings": _MOST,
    "short_factor": [1.0, 1.2],
    "long_factor": [4.0, 9.0],
}
_SITES = {
    "layers": "roberta.encoder.layer",
    "final_norm": "roberta.encoder.LayerNorm",
    "attention_norm": "attention.self_attn_layer_norm",
    "mlp_norm": "LayerNorm",
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "mlp": ("intermediate", "output.dense"),
}
_WHAT = r"data: expected prompts of at most 6 tokens each, or only longer ones, as \w+ForCausalLM turns longer ones"


@pytest.fixture(params=["llama", "phi3"])
def model(request):
    fields = {**CONFIGS["llama"][1], "num_hidden_layers": 2, "rope_parameters": dict(_ANGLES)}
    made = random_model(request.param, {**fields, "original_max_position_embeddings": _MOST})
    made(input_ids=torch.arange(12)[None])  # which leaves the other angles in the model
    return made


def _pairs(*sizes):
    """Pairs of so many tokens that first differ at so many."""
    drawn = torch.randint(VOCABULARY, (len(sizes), 12), generator=torch.Generator().manual_seed(0))
    corrupted = drawn.clone()
    for row, (_, first) in enumerate(sizes):
        corrupted[row, first] = (drawn[row, first] + 1) % VOCABULARY
    answers = torch.stack([drawn[:, 0], (drawn[:, 0] + 3) % VOCABULARY], 1)
    return eap.PairedDataset.from_tokens(drawn, corrupted, [length for length, _ in sizes], answers)


@torch.no_grad()
def _own(model, data, e):
    logits = model(input_ids=data.clean[e : e + 1, : data.lengths[e]], use_cache=False).logits[0, -1]
    return float(logits[data.answers[e, 0]] - logits[data.answers[e, 1]])


@pytest.mark.parametrize("sizes", [((4, 2), (12, 0)), ((6, 1), (7, 1))])
def test_prompts_on_either_side_of_the_change_are_refused(sizes, model):
    """The longest would decide for all of a batch: the result would depend on its size."""
    with pytest.raises(eap.InputError, match=_WHAT):
        eap.attribute(model, _pairs(*sizes))


@pytest.mark.parametrize("sizes", [((4, 2), (6, 5), (5, 0)), ((12, 8), (9, 2), (7, 5))])
@pytest.mark.parametrize("batch_size", [1, None])
def test_prompts_on_one_side_are_what_each_is_by_itself(sizes, batch_size, model, relative):
    """Also behind a prefix that is shorter than the change, where prompts are longer."""
    data = _pairs(*sizes)
    found = eap.attribute(model, data, batch_size=batch_size, steps=2)
    each = [eap.attribute(model, data[[e]], steps=2, reuse_prefix=False).values for e in range(len(data))]
    assert relative(found.values, torch.stack(each).mean(0)) < 1e-5
    result = eap.evaluate(model, found.select(30), data, batch_size=batch_size)
    right = torch.tensor([_own(model, data, e) for e in range(len(data))], dtype=torch.float64)
    torch.testing.assert_close(result.clean_values, right, rtol=1e-5, atol=1e-5)


def test_answers_of_several_tokens_count(model):
    data = _pairs((6, 2))
    answers = torch.tensor([[[[3, 4, 5]], [[6, -1, -1]]]])
    longer = eap.PairedDataset.from_tokens(data.clean, data.corrupted, data.lengths, answers)
    with pytest.raises(eap.InputError, match="some of 6 and some of 8"):
        eap.attribute(model, longer, "sequence_logprob_diff")


@pytest.mark.parametrize("side", ["clean", "corrupted"])
def test_padding_that_counts_no_position_is_refused(side, monkeypatch):
    """Where runs begin with embeddings, which do not tell it from other tokens: after a table without `placed`."""
    fields = {**ENCODERS["roberta"][1], "is_decoder": True}
    model = random_model("xlm-roberta-xl", fields)
    # Of a large vocabulary discovery draws no padding, and finds embeddings and positions side by side.
    table = replace(FAMILIES["gpt2"], name="xlm-roberta-xl", requires={}, **_SITES)
    monkeypatch.setitem(FAMILIES, "xlm-roberta-xl", table)
    data = _pairs((5, 2), (7, 3))
    data.clean[:], data.corrupted[:] = data.clean.clamp(min=2), data.corrupted.clamp(min=2)
    circuit = eap.attribute(model, data, method="eap", reuse_prefix=False).select(9)
    result = eap.evaluate(model, circuit, data, reuse_prefix=False)
    assert float(result.clean_values[1]) == pytest.approx(_own(model, data, 1), rel=1e-5)
    getattr(data, side)[0, 1] = fields["pad_token_id"]
    with pytest.raises(eap.InputError, match=rf"{side} of example 0: expected no padding token \(1\), for which XLM"):
        eap.attribute(model, data)
