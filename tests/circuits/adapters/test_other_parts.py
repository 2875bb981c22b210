"""Parts that compute something else than their classes or weights say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.selfcheck import check_model
from tests.circuits.conftest import random_model
from tests.circuits.models import CONFIGS, MIXERS


class Doubled(nn.Linear):
    """As libraries of adapters make their layers from the library's: the weight is not all that it computes with."""

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class Shifted(nn.Module):
    """Adds something, and has no bias."""

    def __init__(self, base, shift):
        super().__init__()
        self.base, self.shift = base, nn.Parameter(shift)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, None

    def forward(self, x):
        return self.base(x) + self.shift


def linear_like(base, weight, bias):
    new = nn.Linear(base.in_features, base.out_features, bias is not None, dtype=weight.dtype)
    new.weight = nn.Parameter(weight)
    if bias is not None:
        new.bias = nn.Parameter(bias)
    return new


@pytest.mark.parametrize("kind", [Doubled, Shifted])
def test_linear_layers_are_what_they_compute(kind, make_model, make_pairs, relative):
    torch.manual_seed(0)
    model, plain = make_model("llama"), make_model("llama")
    for layer, twin in zip(model.model.layers, plain.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            base = getattr(layer.self_attn, name)
            weight, shift = base.weight.detach(), torch.randn(base.out_features).double()
            if kind is Doubled:
                base.__class__ = Doubled
                setattr(twin.self_attn, name, linear_like(base, 2 * weight, None))
            else:
                setattr(layer.self_attn, name, Shifted(base, shift))
                setattr(twin.self_attn, name, linear_like(base, weight, shift))
    data = make_pairs(n=4)
    found, right = (eap.attribute(each, data, steps=2, heads="query") for each in (model, plain))
    assert relative(found.values, right.values) < 1e-6
    circuit = right.select(40)
    assert relative(*(eap.evaluate(each, circuit, data).values for each in (model, plain))) < 1e-6


class Kept(nn.Module):
    """A trained norm beside the one that it was, as adapters keep modules that they train whole."""

    def __init__(self, before, after):
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(x)


def test_norms_inside_of_wrappers(make_model, make_pairs, relative):
    model, plain, other = (make_model("llama") for _ in range(3))
    with torch.no_grad():
        for path, norm in plain.named_modules():
            if path.endswith("norm"):
                norm.weight.mul_(1.5)
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, Kept(other.get_submodule(path), norm))
    data = make_pairs(n=4)
    found, right = (eap.attribute(each, data, steps=2) for each in (model, plain))
    assert relative(found.values, right.values) < 1e-6


class OneMore(nn.Module):
    def __init__(self, norm, more):
        super().__init__()
        self.weight, self.eps, self.more = norm.weight, norm.variance_epsilon, more

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.weight + self.more)


def test_norms_of_one_class_may_differ_by_a_setting(make_model):
    model = make_model("llama")
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm = OneMore(layer.input_layernorm, float(index % 2))
    assert all(check.passed for check in check_model(model))


@pytest.mark.parametrize("kind", [nn.ParameterDict, nn.ParameterList])
def test_layers_may_share_what_only_holds_weights(kind, make_model):
    model, bank = make_model("llama"), torch.zeros(3)
    bank = kind({"bank": bank} if kind is nn.ParameterDict else [bank])
    for layer in model.model.layers:
        layer.mlp.bank = bank
    assert len(bind(model).layers) == 3


@pytest.mark.parametrize("name", ["apertus", "olmoe"])
def test_a_norm_of_the_only_key_head(name):
    """Of each key by itself, or of all together: its weights do not tell."""
    kind, fields = CONFIGS[name]
    model = random_model(kind, {**fields, "num_hidden_layers": 2, "num_key_value_heads": 1})
    checks = check_model(model, n_edges=3)
    assert all(check.passed for check in checks), checks
    assert any("heads='query'" in check.detail for check in checks)


def test_embeddings_that_only_tokens_are_scaled_for():
    fields = {**MIXERS["bart"][1], "scale_embedding": True}
    assert all(check.passed for check in check_model(random_model("mvp", fields), n_edges=3))
