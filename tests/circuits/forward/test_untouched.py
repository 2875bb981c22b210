"""The model comes back exactly as it was: after success, after errors, after an interruption."""

from __future__ import annotations

import copy

import pytest
import torch

import eap_circuits as eap
from tests.circuits.conftest import fast_by_kind
from tests.circuits.untouched import snapshot


class Stop(BaseException):
    """As an interruption by the user: no Exception."""


def failing(after, error):
    """A metric that works `after` times and then raises."""
    calls = []

    def metric(logits, batch):
        calls.append(1)
        if len(calls) > after:
            raise error
        return logits[:, 0]

    return metric


@pytest.fixture
def model(kind, make_model):
    return trained(make_model(kind))


def trained(model):
    """In training mode, partly frozen, with a hook of the user's own: nothing of that may change."""
    model.train()
    list(model.parameters())[3].requires_grad_(False)
    model.get_input_embeddings().eval()
    model.get_input_embeddings().register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_after_success(family, heads, make_model, make_pairs):
    model, data = trained(make_model(family)), make_pairs()
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    scores = eap.attribute(model, data, heads=heads, steps=2)
    assert snapshot(model) == before
    eap.evaluate(model, scores.select(30, how="greedy"), data)
    assert snapshot(model) == before
    eap.evaluate(model, scores.select(30, how="greedy"), data[:2], ablation="mean")
    assert snapshot(model) == before
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@fast_by_kind
@pytest.mark.parametrize("rules", ["relp-ah", "gim"])
def test_after_backward_rules(family, rules, make_model, make_pairs):
    model, data = trained(make_model(family)), make_pairs(n=3)
    before = snapshot(model)
    eap.attribute(model, data, heads="query", method="eap", rules=rules)
    assert snapshot(model) == before
    for after, error in ((0, RuntimeError("no")), (2, Stop())):
        with pytest.raises(type(error)):
            eap.attribute(model, data, metric=failing(after, error), heads="query", rules=rules)
        assert snapshot(model) == before


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("error", [RuntimeError("no"), Stop()])
def test_after_an_error_anywhere(model, after, error, make_pairs):
    data = make_pairs()
    before = snapshot(model)
    with pytest.raises(type(error)):
        eap.attribute(model, data, metric=failing(after, error), heads="query", steps=4, batch_size=2)
    assert snapshot(model) == before
    scores = eap.attribute(model, data, heads="query", method="eap")
    with pytest.raises(type(error)):
        eap.evaluate(model, scores.select(20), data, metric=failing(after, error), batch_size=2)
    assert snapshot(model) == before


def test_after_an_error_inside_the_model(model, make_pairs):
    """A module that raises in the middle of a run, with our hooks around it."""
    data = make_pairs()
    last = [m for m in model.modules() if not list(m.children())][-2]
    handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("inside")))
    before = snapshot(model)
    for rules in (None, "relp", "gim"):
        with pytest.raises(RuntimeError, match="inside"):
            eap.attribute(model, data, heads="query", rules=rules)
    assert snapshot(model) == before
    handle.remove()


def test_dropout_is_off_while_borrowed(make_pairs):
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=59, n_embd=16, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0.5)
    model = AutoModelForCausalLM.from_config(config).double().train()
    data = make_pairs()
    first, second = (eap.attribute(model, data).values for _ in range(2))
    assert torch.equal(first, second) and model.training
    assert torch.equal(first, eap.attribute(model.eval(), data).values)


def test_the_users_gradients_stay(make_model, make_pairs):
    model = make_model("gpt2")
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    eap.attribute(model, make_pairs())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before))
