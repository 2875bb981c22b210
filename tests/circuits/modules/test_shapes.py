"""Plans of models that have no weights: what the same model with weights is found to take."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import eap_circuits as eap
from eap_circuits.cli import app
from eap_circuits.methods.gradient import method as gradient
from eap_circuits.modules import shapes

SETTINGS = [
    {},
    {"heads": "query", "method": "eap"},
    {"reuse_prefix": False},
    {"ablation": "mean", "keep": "examples"},
    {"method": "eap-ig-activations", "rules": "gim", "steps": 2},
]


def agree(model, data, **settings):
    """The plan without weights is the plan with them, whose measured passes ran."""
    right, found = (eap.plan(m, data, **settings) for m in (model, copy.deepcopy(model).to("meta")))
    assert found.batches == right.batches and found.tokens == right.tokens
    assert abs(found.bytes - right.bytes) <= 0.02 * right.bytes


def test_families(kind, make_model, make_pairs, monkeypatch):
    monkeypatch.setattr(gradient, "most_tokens", lambda device: 40)
    if kind == "qwen3-moe":
        with pytest.raises(eap.InputError, match=r"expected weights, without which aten.nonzero"):
            agree(make_model(kind), make_pairs(n=4))
    else:
        agree(make_model(kind), make_pairs(n=4))


@pytest.mark.parametrize("settings", SETTINGS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_settings(settings, dtype, make_model, make_pairs):
    agree(make_model("llama", dtype), make_pairs(n=4), **settings)


def test_experts_in_one_product_are_planned(make_model, make_pairs):
    agree(make_model("qwen3-moe", torch.bfloat16, experts_implementation="grouped_mm"), make_pairs(n=4))


def test_a_model_that_fits_nowhere(make_pairs):
    fields = {"hidden_size": 2**14, "intermediate_size": 2**24, "num_hidden_layers": 2, "num_attention_heads": 128}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=59, **fields))
    before = [id(parameter) for parameter in model.parameters()]
    plan = eap.plan(model, make_pairs(), memory="1TiB")
    # An MLP keeps what its two products and its activation function gave.
    assert plan.bytes > 3 * 4 * 2**24 * sum(examples for examples, _, _ in plan.batches)
    assert [id(parameter) for parameter in model.parameters()] == before
    with pytest.raises(eap.InputError, match="model: expected all weights, found some on the device meta"):
        eap.attribute(model, make_pairs())


class Forgets(dict):
    """Empty after each look at it, as where another thread's plan ends right then."""

    def __contains__(self, key):
        found = super().__contains__(key)
        self.clear()
        return found

    def get(self, key, default=None):
        found = super().get(key, default)
        self.clear()
        return found


def test_a_plan_of_another_thread_may_end_at_any_moment(make_model, make_pairs, monkeypatch):
    model, data = make_model("gpt2", torch.float32).to("meta"), make_pairs(n=2)
    right = eap.plan(model, data, method="eap", memory="1GiB")
    monkeypatch.setattr(shapes, "_MADE", Forgets())
    assert eap.plan(model, data, method="eap", memory="1GiB") == right


def test_command(tmp_path, make_model, make_pairs):
    model, data = make_model("llama", torch.float32), make_pairs()
    model.config.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path)
    data.save(tmp_path / "pairs.safetensors")
    command = ["attribute", str(tmp_path), "--data", str(tmp_path / "pairs.safetensors"), "--no-weights", "--json"]
    result = CliRunner().invoke(app, [*command, "--dry-run", "--memory", "80GiB"])
    assert result.exit_code == 0, result.stderr
    plan = eap.plan(model, data, memory="80GiB")
    assert json.loads(result.stdout)["bytes"] == plan.bytes and json.loads(result.stdout)["budget"] == 80 * 2**30
    assert "--no-weights: expected --dry-run with it" in CliRunner().invoke(app, command).stderr
