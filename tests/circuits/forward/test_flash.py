"""Flash attention, which runs on GPUs alone: what transformers does around it, with its two functions written out here.

Masks, position ids and places in the cache that stand for nothing take another way there than under other attention.
"""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash

import eap_circuits as eap
from eap_circuits.selfcheck import check_model


def attention(q, k, v, causal=False, softmax_scale=None, window_size=(-1, -1), softcap=0.0):
    """[B, Q, H, K] of q and [B, L, G, K] of k and v; the last query stands at the last key's place."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhk,blhk->bhql", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    back = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    unseen = back < 0 if causal else torch.zeros_like(back, dtype=torch.bool)
    if window_size[0] >= 0:
        unseen = unseen | (back > window_size[0])
    scores = scores.masked_fill(unseen, -torch.inf)
    # No softmax: as in the real ones there is none to catch.
    return torch.einsum("bhql,blhk->bqhk", (scores - scores.logsumexp(-1, keepdim=True)).exp(), v)


def of_unequal_lengths(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    causal=False,
    softmax_scale=None,
    window_size=(-1, -1),
    softcap=0.0,
):
    """The same of sequences behind one another, [tokens, H, K]."""
    options = causal, softmax_scale, window_size, softcap
    ends = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    return torch.cat([attention(q[None, a:b], k[None, c:d], v[None, c:d], *options)[0] for (a, b), (c, d) in ends])


@pytest.fixture
def with_flash(monkeypatch):
    # Before transformers 5.17 there is no function that writes to the cache among them.
    beside = [None] if hasattr(flash, "_flash_with_kvcache_fn") else []
    functions = (attention, of_unequal_lengths, *beside, flash._pad_input, flash._unpad_input)
    load, calls = flash.lazy_import_flash_attention, []

    def imported(implementation, *args, **kwargs):
        calls.append(implementation)
        return load(implementation, *args, **kwargs)

    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    monkeypatch.setattr(flash, "lazy_import_flash_attention", imported)

    def make(model):
        model = copy.deepcopy(model)
        model.config._attn_implementation = "flash_attention_2"
        return model, calls

    return make


@pytest.mark.parametrize("name", ["gemma2", "gpt-neox", "llama", "mistral-window"])
def test_flash_attention(name, with_flash, make_model, make_pairs, relative):
    right, data = make_model(name), make_pairs()
    model, calls = with_flash(right)
    for settings in ({"steps": 2}, {"method": "eap", "reuse_prefix": False}, {"method": "eap", "batch_size": 1}):
        found, scores = (eap.attribute(m, data, heads="query", **settings) for m in (model, right))
        assert relative(found.values, scores.values) < 1e-6
    circuits = [scores.select(n) for n in (10, 60)]
    for found, wanted in zip(eap.evaluate(model, circuits, data), eap.evaluate(right, circuits, data), strict=True):
        assert relative(found.values, wanted.values) < 1e-6
    assert set(calls) == {"flash_attention_2"}


def test_self_check_runs_in_float64_without_it(with_flash, make_model):
    model, calls = with_flash(make_model("llama", torch.float32))
    checks = check_model(model)
    assert all(check.passed for check in checks), checks
    assert calls and model.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("rules", ["relp-ah", "gim"])
def test_rules_of_attention_are_refused(rules, with_flash, make_model, make_pairs):
    with pytest.raises(eap.InputError, match='rules: expected attn_implementation "sdpa" or "eager"'):
        eap.attribute(with_flash(make_model("llama"))[0], make_pairs(), method="eap", rules=rules)
