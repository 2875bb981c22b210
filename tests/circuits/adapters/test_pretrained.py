"""Loading a model by name: a folder, one sentence for what is wrong, and code that comes with a model."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, dynamic_module_utils

import eap_circuits as eap
from eap_circuits.adapters import load_model


def test_load_model_says_what_is_wrong(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(eap.InputError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_load_model_from_a_folder(tmp_path, make_model):
    model = make_model("gpt2", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path), device="cpu")
    assert isinstance(loaded, type(model)) and not loaded.training and tokenizer("b").input_ids == [1]
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "of_their_own"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize("weights", [True, False])
def test_code_that_comes_with_a_model_runs_only_if_trusted(weights, tmp_path, make_model, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "theirs"
    model = make_model("llama", torch.float32)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    theirs = {"AutoConfig": "code_of_theirs.Config", "AutoModelForCausalLM": "code_of_theirs.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "of_their_own", "auto_map": theirs}))
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(folder)
    (folder / "code_of_theirs.py").write_text(CODE)
    with pytest.raises(eap.InputError) as refusal:
        load_model(str(folder), device="cpu", weights=weights)
    said = "expected trust_remote_code=True (--trust-remote-code), as it brings code of its own, found False."
    assert str(refusal.value) == f"model {str(folder)!r}: {said}"
    loaded, _ = load_model(str(folder), device="cpu", weights=weights, trust_remote_code=True)
    assert type(loaded).__name__ == "Model" and loaded.config.model_type == "of_their_own"
