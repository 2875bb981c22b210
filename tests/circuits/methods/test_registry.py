"""What holds for paths of activations, conductance, EAP-GP and information flow routes alike."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import eap_circuits as eap
from eap_circuits.errors import InputError
from eap_circuits.methods import METHODS, statistics
from tests.circuits.budget.test_memory import longer_pairs
from tests.circuits.untouched import snapshot

NEW = ["eap-ig-activations", "eap-conductance", "eap-gp", "information-flow-routes"]


@pytest.mark.parametrize(("method", "compat"), [*((method, None) for method in NEW), (NEW[0], "eap-ig")])
def test_scores_do_not_depend_on_batching(kind, method, compat, make_model, make_pairs, relative):
    model, data = make_model(kind), make_pairs(seed=3, n=5)
    given = {"method": method, "steps": 2, "compat": compat}
    right = eap.attribute(model, data, **given).values
    for settings in ({"batch_size": 1}, {"batch_size": 3, "reuse_prefix": False}):
        assert relative(eap.attribute(model, data, **given, **settings).values, right) < 1e-6


@pytest.mark.parametrize("method", NEW)
def test_scores_do_not_depend_on_padding(method, make_model, make_pairs, relative):
    model, data = make_model("llama"), make_pairs(seed=4)
    wide = (torch.nn.functional.pad(x, (0, 6), value=7) for x in (data.clean, data.corrupted))
    padded = eap.PairedDataset.from_tokens(*wide, data.lengths, data.answers)
    right = eap.attribute(model, data, method=method, steps=2).values
    assert relative(eap.attribute(model, padded, method=method, steps=2, batch_size=4).values, right) < 1e-6


@pytest.mark.parametrize("method", ["eap-ig-activations", "eap-conductance", "eap-gp"])
def test_key_value_scores_are_group_sums(method, make_model, make_pairs, relative):
    model, data = make_model("gemma2"), make_pairs(seed=5)
    query, kv = (eap.attribute(model, data, method=method, steps=2, heads=heads) for heads in ("query", "kv"))
    assert relative(query.to_kv().values, kv.values) < 1e-6


@pytest.mark.parametrize("method", NEW)
def test_the_model_is_untouched_also_after_an_error(method, kind, make_model, make_pairs, monkeypatch):
    model, data = make_model(kind).train(), make_pairs(n=3)
    before = snapshot(model)
    eap.attribute(model, data, method=method, steps=2)
    assert snapshot(model) == before
    last = [m for m in model.modules() if not list(m.children())][-2]
    handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("inside")))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inside"):
        eap.attribute(model, data, method=method, steps=2)
    assert snapshot(model) == before
    handle.remove()


# Where steps have a fixed length, rounding decides where the path of a random model leads.
@pytest.mark.parametrize("method", [method for method in NEW if method != "eap-gp"])
def test_half_precision_weights(method, make_model, make_pairs, relative):
    data = make_pairs(seed=9)
    right = eap.attribute(make_model("llama"), data, method=method).values
    found = eap.attribute(make_model("llama", dtype=torch.bfloat16), data, method=method).values
    # As for the other methods: the order of 2⁻⁸ times ten.
    assert found.dtype == torch.float32 and relative(found, right) < 0.1


@pytest.mark.parametrize("method", NEW)
def test_where_memory_runs_out_the_rest_goes_on(method, make_model, relative, monkeypatch):
    model, data = make_model("gpt2"), longer_pairs()
    right = eap.attribute(model, data, method=method, steps=2).values
    original, scored = statistics.dealt_in_memory, []

    def fails_above_60(score, batch, tokens):
        if batch.clean.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        scored.extend(batch.index.tolist())
        return score(batch, tokens)

    def in_memory(data, batches, tokens, score, whole):
        return original(data, batches, tokens, partial(fails_above_60, score), whole)

    monkeypatch.setattr(statistics, "dealt_in_memory", in_memory)
    found = eap.attribute(model, data, method=method, steps=2).values
    assert sorted(scored) == list(range(len(data))) and relative(found, right) < 1e-6


@pytest.mark.parametrize("method", [*NEW, "eap"])
def test_what_a_method_does_not_know_is_refused(method, make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs()
    with pytest.raises(InputError, match='edges: expected None, except for method "exact"'):
        eap.attribute(model, data, method=method, edges=torch.zeros(2, 2, dtype=torch.bool))
    if not METHODS[method].planned:
        with pytest.raises(InputError, match=f"method: expected one whose memory is planned .*found '{method}'"):
            eap.plan(model, data, method=method)


def test_specs_are_whole():
    for name, method in METHODS.items():
        assert name == method.name and method.description and method.passes
        assert method.tier in ("stable", "experimental")
