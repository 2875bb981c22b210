"""Slices of the residual stream's features: scores are those of all features at once, and weights are held in part."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import eap_circuits as eap
from bench.pretended import pretending
from eap_circuits.adapters import Norm, bind
from eap_circuits.budget import PeakBytes
from eap_circuits.recording import contraction


@pytest.fixture
def narrow(monkeypatch):
    """From the call on, slices are as narrow as 8 features."""

    def change():
        monkeypatch.setattr(contraction, "COPIED_BYTES", 1)
        monkeypatch.setattr(contraction, "NARROWEST", 8)

    return change


def assert_alike(found, right, relative):
    for name, tensor in right.statistics().items():
        assert relative(found.statistics()[name], tensor) < 1e-6, name
    assert relative(found.values, right.values) < 1e-6


def test_families(kind, make_model, make_pairs, narrow, relative):
    model, data = make_model(kind), make_pairs()
    right = eap.attribute(model, data)
    narrow()
    assert_alike(eap.attribute(model, data), right, relative)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(
    "settings",
    [
        {"keep": ["examples", "positions", "neurons"], "heads": "query"},
        {"method": "eap-ig-activations", "keep": "neurons"},
        {"method": "eap-ig-activations", "compat": "eap-ig"},
        {"method": "eap-conductance", "steps": 3},
        {"rules": "relp", "ablation": "mean"},
    ],
)
def test_settings(kind, settings, make_model, make_pairs, narrow, relative):
    model, data = make_model(kind), make_pairs()
    right = eap.attribute(model, data, **settings)
    narrow()
    assert_alike(eap.attribute(model, data, **settings), right, relative)


def test_a_centred_norms_means_are_taken_once(make_model, make_pairs, narrow, monkeypatch):
    """A mean over all features needs the whole weights, of q, k and v together, which a slice must not make again."""
    model, data, taken = make_model("gpt2"), make_pairs(), Counter()
    original = Norm.mean_backwards

    def mean_backwards(norm, rows):
        taken[norm.module] += 1
        return original(norm, rows)

    monkeypatch.setattr(Norm, "mean_backwards", mean_backwards)
    narrow()
    eap.attribute(model, data, batch_size=len(data))
    assert [taken[block.ln_1] for block in model.transformer.h] == [1] * len(model.transformer.h)


def wide_model(**settings):
    """Attention's weights are most of what a pass of few tokens takes."""
    fields = {"hidden_size": 512, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 16}
    config = AutoConfig.for_model("llama", vocab_size=59, num_key_value_heads=4, **fields, **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def test_copies_of_all_attention_weights_are_never_held(make_pairs, monkeypatch):
    with torch.device("meta"):
        model = wide_model()
    data = make_pairs(n=2)
    whole = eap.plan(model, data, steps=1)
    copies = 4 * sum(p.numel() for name, p in model.named_parameters() if "self_attn" in name)
    monkeypatch.setattr(contraction, "COPIED_BYTES", copies // 8)
    sliced = eap.plan(model, data, steps=1)
    assert whole.bytes > copies
    assert sliced.bytes < whole.bytes - 0.8 * copies


def test_what_slices_take_is_predicted(make_pairs, monkeypatch):
    torch.manual_seed(0)
    model, data = wide_model(), make_pairs(n=4)
    monkeypatch.setattr(contraction, "COPIED_BYTES", 2**22)
    plan = eap.plan(model, data, steps=2)
    eap.attribute(model, data, method="eap")  # a first call looks at one prompt besides
    with PeakBytes() as count:
        eap.attribute(model, data, steps=2)
    assert abs(plan.bytes - count.peak) <= 0.1 * count.peak


def test_slices_of_an_8b_model_on_a_gpu_are_few():
    """Each is launches for every layer."""
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
    config = AutoConfig.for_model("llama", vocab_size=59, intermediate_size=64, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with pretending(shapes=True):
        assert len(contraction.feature_slices(bind(model.to("cuda")))) == 2
