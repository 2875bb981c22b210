"""Attention of grouped query heads: the same as transformers' own, which is back afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import eap_circuits as eap
from eap_circuits.forward.layers.grouped_attention import SHARED_KEYS
from eap_circuits.modules.loans import Changes
from eap_circuits.request import asked


class SharedKeys(Changes):
    """As `borrowed` has it, without a model."""

    def __enter__(self):
        super().__enter__()
        SHARED_KEYS.make(self)
        return self


def random_attention(groups, per_head, queries, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    mask = torch.rand(3, 2 * groups if per_head else 1, queries, keys, generator=generator) < 0.5
    mask[..., 0] = True
    return normal(3, 2 * groups, queries, 5), normal(3, 2, keys, 5), normal(3, 2, keys, 5), mask


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("groups", "queries", "keys"), [(3, 4, 9), (3, 1, 6), (2, 7, 7), (1, 4, 4), (4, 21, 30)])
def test_values_and_gradients_are_those_of_repeated_keys(groups, queries, keys, per_head, additive):
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    *inputs, mask = random_attention(groups, per_head, queries, keys)
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e9) + torch.rand(mask.shape)
    found = []
    for within in (False, True):
        if within:
            with SharedKeys():
                attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
                out, _ = attend(module, *inputs, mask, dropout=0.0, scaling=0.3, is_causal=None)
        else:
            repeated = (inputs[0], *(x.repeat_interleave(groups, 1) for x in inputs[1:]))
            scores = 0.3 * repeated[0] @ repeated[1].mT
            scores = scores + mask if additive else scores.masked_fill(~mask, -torch.inf)
            out = (scores.softmax(-1) @ repeated[2]).transpose(1, 2)
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        found.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for right, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, atol=1e-12, rtol=1e-12)


def test_keys_are_not_repeated_for_short_prompts_and_masks_not_for_long_ones(monkeypatch):
    seen = []

    def attend(module, query, key, value, mask, **_):
        seen.append((module.num_key_value_groups, tuple(query.shape), tuple(key.shape)))
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    module = SimpleNamespace(num_key_value_groups=3)
    with SharedKeys():
        for queries in (20, 21):  # 2 heads of 5 features, keys and values: as much as a mask of 20 queries
            query, key, value, mask = random_attention(3, False, queries, 30)
            out, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask)
            torch.testing.assert_close(out, query.transpose(1, 2), atol=0, rtol=0)
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None)
    assert seen == [(1, (3, 2, 60, 5), (3, 2, 30, 5)), *[(3, (3, 6, 21, 5), (3, 2, 30, 5))] * 2]


def test_the_function_that_was_there_is_back(monkeypatch):
    for theirs in (sdpa_attention_forward, lambda *_, **__: None):
        if theirs is not sdpa_attention_forward:
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", theirs)
        first, second = SharedKeys(), SharedKeys()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)  # as two threads may
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not theirs
        second.__exit__(None, None, None)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs


def test_a_models_runs_use_it(make_model, make_pairs, monkeypatch):
    groups = set()

    def attend(module, *args, **kwargs):
        groups.add(module.num_key_value_groups)
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    # Which also run the model as it is.
    monkeypatch.setattr(asked, "try_model", lambda arch, *_: (arch, None))
    model, data = make_model("llama"), make_pairs(n=3)
    eap.evaluate(model, eap.attribute(model, data, heads="query", method="eap").select(9), data, reuse_prefix=False)
    assert groups == {1}
    model(input_ids=data.clean)
    assert groups == {1, 3}


def test_it_is_back_after_an_error(make_model, make_pairs):
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def metric(logits, batch):
        raise KeyError

    with pytest.raises(KeyError):
        eap.attribute(make_model("llama"), make_pairs(n=3), metric)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
