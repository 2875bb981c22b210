"""The self-check: it passes on what is right, and sees what is wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, LongT5Config

from eap_circuits.adapters import FAMILIES
from eap_circuits.adapters.binding import binder
from eap_circuits.selfcheck import check_model
from tests.circuits.conftest import fast_by_kind


def test_self_check_passes_on_every_family(family, make_model):
    checks = check_model(make_model(family, dtype=torch.float32), n_edges=3)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


@fast_by_kind
def test_self_check_fails_on_a_broken_site(family, make_model, monkeypatch):
    """Keys taken for values, and contributions half as large again as they are."""
    right = binder._Binder._layer

    def wrong(*args):
        layer = right(*args)
        q = layer.projections
        exchanged = {**q, "k": q["v"], "v": q["k"]} if "k" in q else q
        return dataclasses.replace(layer, projections=exchanged, scale=1.5 * layer.scale)

    monkeypatch.setattr(binder._Binder, "_layer", wrong)
    failed = {check.name for check in check_model(make_model(family, dtype=torch.float32)) if not check.passed}
    assert {"contributions sum to the residual", "all edges kept is the model on clean prompts"} <= failed


def test_hooks_that_transformers_leaves_are_no_change(make_model):
    """A model that is to return hidden states gets them in its first run."""
    model = make_model("gpt2")
    model.config.output_hidden_states = True
    assert all(check.passed for check in check_model(model, n_edges=1))


def test_self_check_sees_the_wrong_norm(make_model, monkeypatch):
    right = binder._Binder._layer

    def wrong(*args):
        layer = right(*args)
        return dataclasses.replace(layer, mlp_norm=layer.attention_norm)

    monkeypatch.setattr(binder._Binder, "_layer", wrong)
    failed = {check.name for check in check_model(make_model("llama")) if not check.passed}
    assert "contributions sum to the residual" in failed


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("llama", {"k": "self_attn.v_proj", "v": "self_attn.k_proj"}),
        ("qwen2", {"q": "self_attn.k_proj", "k": "self_attn.q_proj"}),
        ("gpt-neox", {"fused": "concatenated"}),
        ("gpt2", {"fused": "grouped"}),
        ("falcon", {"fused": "concatenated"}),
    ],
)
def test_self_check_sees_labels_that_only_the_function_contradicts(name, table, make_model, monkeypatch):
    """Every sum is right with these tables; the heads are not."""
    model = make_model(name)
    kind = model.config.model_type
    monkeypatch.setitem(FAMILIES, kind, dataclasses.replace(FAMILIES[kind], **table))
    checks = {check.name: check for check in check_model(model)}
    check = checks["projections are the heads' queries, keys and values"]
    assert not check.passed and "layer 1" in check.detail
    assert checks["contributions sum to the residual"].passed


@pytest.mark.parametrize("name", ["mpt", "olmo"])
def test_self_check_of_heads_whose_inputs_are_clipped(name, make_model):
    """Nearly all of them: in the whole range a value's effect is not linear, and many have none."""
    model = make_model(name)
    model.config.clip_qkv = 0.05
    for module in model.modules():
        if hasattr(module, "clip_qkv"):
            module.clip_qkv = 0.05
    checks = check_model(model)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


def test_self_check_of_an_unsupported_model_says_so():
    (check,) = check_model(
        AutoModelForSeq2SeqLM.from_config(
            LongT5Config(num_layers=1, d_model=8, num_heads=2, d_ff=8, d_kv=4, vocab_size=20)
        )
    )
    assert not check.passed and "'longt5' (LongT5ForConditionalGeneration)" in check.detail
