"""Runs behind a model's cache are compared with plain ones before prefixes are reused."""

from __future__ import annotations

import gc
import warnings
from weakref import ref

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations import sdpa_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import eap_circuits as eap
from eap_circuits.forward.prefixes import reuse
from eap_circuits.methods import METHODS
from tests.circuits.conftest import watch
from tests.circuits.models import VOCABULARY

NOT_REUSED = "prefixes are not reused, as its cache cannot serve"


@pytest.fixture
def attention(monkeypatch, make_model):
    """A tiny Llama whose attention function is the user's own, and the same model with the library's."""

    def make(function, dtype=torch.float64):
        monkeypatch.setitem(AttentionInterface._global_mapping, "their_own", function)
        model = make_model("llama", dtype)
        model.set_attn_implementation("their_own")
        return model, make_model("llama", dtype)

    return make


def passes_on(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


def without_masks(module, query, key, value, mask, scaling=None, **_):
    """Right behind a cache, too: the last query stands at the last key's place. But nothing is masked."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    return scaled_dot_product_attention(query, key, value, seen, scale=scaling).transpose(1, 2), None


def sees_everything(module, query, key, value, mask, scaling=None, **_):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2), None


def with_two_key_heads(module, query, key, value, mask, **given):
    assert key.shape[1] == 2, "two key/value heads"
    return sdpa_attention_forward(module, query, key, value, mask, **given)


def one_prefix(make_pairs):
    """Pairs with prefixes of one length."""
    data = make_pairs(n=4)
    corrupted = data.clean.clone()
    corrupted[:, 2] = (data.clean[:, 2] + 1) % 59
    return eap.PairedDataset.from_tokens(data.clean, corrupted, data.lengths, data.answers)


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("method", METHODS)
def test_attention_that_only_passes_on(method, heads, attention, make_pairs, relative):
    (model, right), data = attention(passes_on), make_pairs(n=4)
    given = {"method": method, "heads": heads, "steps": 2}
    wanted = eap.attribute(right, data, **given)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = eap.attribute(model, data, **given)
    assert relative(found.values, wanted.values) < 1e-6
    assert [NOT_REUSED in str(each.message) for each in said] == ([True] if METHODS[method].reuses else [])


@pytest.mark.parametrize("ablation", ["patching", "mean"])
def test_circuits_of_attention_that_only_passes_on(ablation, attention, make_pairs):
    (model, right), data = attention(passes_on), make_pairs(n=4)
    scores = eap.attribute(right, data, method="eap", heads="query")
    circuits = [scores.select(n_edges=40), scores.to_kv().select(n_edges=30)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = eap.evaluate(model, circuits, data, ablation=ablation)
    for one, other in zip(found, eap.evaluate(right, circuits, data, ablation=ablation), strict=True):
        torch.testing.assert_close(one.values, other.values)
        torch.testing.assert_close(one.clean_values, other.clean_values)


def test_a_mask_that_is_not_heeded_shows_only_beside_a_longer_prefix(attention, make_pairs, relative):
    (model, right), alike, mixed = attention(without_masks), one_prefix(make_pairs), make_pairs(n=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert relative(*(eap.attribute(m, alike, method="eap").values for m in (model, right))) < 1e-6
    wanted = eap.attribute(right, mixed, method="eap").values
    with pytest.warns(UserWarning, match=NOT_REUSED):
        assert relative(eap.attribute(model, mixed, method="eap").values, wanted) < 1e-6


def test_a_model_that_sees_later_tokens_is_refused(attention, make_pairs):
    model, _ = attention(sees_everything)
    with pytest.raises(eap.InputError, match="expected a causal language model, in which no token sees later ones"):
        eap.attribute(model, make_pairs(n=4))


def test_a_model_in_which_prompts_change_each_other_is_refused(make_model, make_pairs):
    """As quantised layers do that scale activations by the largest in the batch."""
    model = make_model("llama")
    theirs = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: theirs(x) / x.abs().max()
    with pytest.raises(eap.InputError, match=r"^model: expected .* no prompt's logits depend on those beside it, .*LM"):
        eap.attribute(model, make_pairs(n=4))


@pytest.mark.parametrize("reuse_prefix", [True, False])
def test_attention_that_takes_no_key_for_each_query_head(reuse_prefix, attention, make_pairs, relative):
    (model, right), data = attention(with_two_key_heads), make_pairs(n=4)
    with pytest.raises(eap.InputError, match="heads: expected 'kv', as LlamaAttention does not take"):
        eap.attribute(model, data, heads="query", reuse_prefix=reuse_prefix)
    found = eap.attribute(model, data, method="eap", reuse_prefix=False).values
    assert relative(found, eap.attribute(right, data, method="eap").values) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["eap", "exact"])
def test_a_forward_that_ignores_the_cache(method, dtype, make_model, make_pairs, relative):
    model, data = make_model("llama", dtype), make_pairs(n=4)
    wanted = eap.attribute(model, data, method=method, reuse_prefix=False)

    class Forgetful(type(model)):
        def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None, **_):
            return super().forward(input_ids=input_ids, inputs_embeds=inputs_embeds, use_cache=False)

    model.__class__ = Forgetful
    with pytest.warns(UserWarning, match=f"Forgetful: {NOT_REUSED}"):
        assert relative(eap.attribute(model, data, method=method).values, wanted.values) < 1e-6
    circuit = wanted.select(n_edges=40)
    with pytest.warns(UserWarning, match=NOT_REUSED):
        found = eap.evaluate(model, circuit, data)
    torch.testing.assert_close(found.values, eap.evaluate(model, circuit, data, reuse_prefix=False).values)


@pytest.mark.parametrize(("prefixes", "rows"), [("alike", [2, 1, 2]), ("mixed", [4, 1, 2, 2, 4])])
def test_one_or_two_pairs_are_tried(prefixes, rows, make_model, make_pairs):
    data = make_pairs(n=40) if prefixes == "mixed" else one_prefix(make_pairs)
    model, seen = make_model("llama"), []
    watch(model.model.layers[0], lambda _, x, **__: seen.append(len(x)))

    def metric(logits, batch):
        raise KeyError

    with pytest.raises(KeyError):
        eap.attribute(model, data, metric)
    assert seen[: len(rows)] == rows


@pytest.mark.parametrize("error", [MemoryError, lambda: RuntimeError("std::bad_alloc")])
def test_memory_that_runs_out_once_while_reuse_is_tried_changes_nothing(error, make_model, make_pairs, relative):
    model, data, left = make_model("llama"), make_pairs(n=4), []
    right = eap.attribute(model, data, method="eap").values

    def fails(module, args):
        if left and not left.pop():
            raise error()

    model.model.layers[1].mlp.register_forward_pre_hook(fails)
    for passes in range(7):
        left[:] = range(passes + 1)  # counted down from the end
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert relative(eap.attribute(model, data, method="eap").values, right) < 1e-6


# A trial that succeeded is not made again while the model is what it was.


@pytest.fixture
def trials(monkeypatch):
    """The numbers of pairs in each trial."""
    found, trial = [], reuse._trial
    monkeypatch.setattr(
        reuse, "_trial", lambda arch, heads, data, *more: (found.append(len(data)), trial(arch, heads, data, *more))[1]
    )
    return found


def test_a_success_is_remembered_by_all_calls(trials, make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=4)
    scores = eap.attribute(model, data, method="eap")
    eap.evaluate(model, scores.select(n_edges=40), data)
    eap.attribute(model, data, steps=2)
    eap.faithfulness_curve(model, scores, data, [0.1, 0.3])
    assert trials == [2]
    other = make_model("llama")
    for heads in ("query", "kv", "query"):
        eap.attribute(other, data, method="eap", heads=heads)
    assert trials == [2] * 3


def test_what_was_not_tried_is(trials, make_model, make_pairs):
    """Longer prompts, padded prefixes, and masks that a single token behind the cache does not need."""
    model, data = make_model("llama"), one_prefix(make_pairs)
    short = eap.PairedDataset.from_tokens(data.clean[:, :3], data.corrupted[:, :3], torch.full((4,), 3), data.answers)
    for each, tried in ((short, [1]), (data, [1]), (data, []), (make_pairs(n=4), [2]), (short, []), (data, [])):
        trials.clear()
        eap.attribute(model, each, method="eap")
        assert trials == tried


def changed_modules():
    def another(f):
        return lambda *args, **kwargs: f(*args, **kwargs)

    attention = "model.layers.1.self_attn"
    return {
        "a forward": lambda m, patch: patch.setattr(
            m.get_submodule(attention), "forward", another(m.get_submodule(attention).forward), raising=False
        ),
        "a class": lambda m, patch: patch.setattr(
            m.get_submodule(attention), "__class__", type("Other", (type(m.get_submodule(attention)),), {})
        ),
        "a class's forward": lambda m, patch: patch.setattr(
            type(m.get_submodule(attention)), "forward", another(type(m.get_submodule(attention)).forward)
        ),
        "a function of the library": lambda m, patch: patch.setattr(
            sdpa_attention, "repeat_kv", another(sdpa_attention.repeat_kv)
        ),
        "the attention function": lambda m, patch: patch.setitem(
            AttentionInterface._global_mapping, "sdpa", another(sdpa_attention_forward)
        ),
        "its name": lambda m, patch: m.set_attn_implementation("eager"),
        "a module": lambda m, patch: patch.setattr(m.model.layers[1].mlp, "act_fn", torch.nn.GELU()),
        "a setting": lambda m, patch: patch.setattr(m.get_submodule(attention), "layer_type", "other", raising=False),
        "the configuration": lambda m, patch: patch.setattr(m.config, "sliding_window", 3, raising=False),
        "a dtype": lambda m, patch: m.float(),
    }


@pytest.mark.parametrize("what", changed_modules())
def test_a_changed_model_is_tried_again(what, trials, monkeypatch, make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=4)
    eap.attribute(model, data, method="eap")
    eap.attribute(model, data, method="eap")
    assert trials == [2]
    changed_modules()[what](model, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eap.attribute(model, data, method="eap")
        assert trials == [2, 2]


def test_tokens_that_were_changed_in_place_are_read_anew(make_model, make_pairs):
    """The first difference of a pair, before which its prefix is, and what cannot be."""
    model, data = make_model("llama"), make_pairs(n=4)
    circuit = eap.attribute(model, data, method="eap").select(40)
    data.corrupted[:, 0] = (data.clean[:, 0] + 1) % VOCABULARY
    fresh = eap.PairedDataset.from_tokens(data.clean, data.corrupted, data.lengths, data.answers)
    assert torch.equal(eap.attribute(model, data).values, eap.attribute(model, fresh).values)
    assert eap.evaluate(model, circuit, data) == eap.evaluate(model, circuit, fresh)
    data.answers[2] = 7
    with pytest.raises(eap.InputError, match=r"^answers\[2\]: expected each id once"):
        eap.evaluate(model, circuit, data)


def test_a_failure_is_said_by_every_call(trials, attention, make_pairs):
    (model, _), data = attention(passes_on), make_pairs(n=4)
    for _ in range(2):
        with pytest.warns(UserWarning, match=NOT_REUSED):
            eap.attribute(model, data, method="eap")
    assert trials == [2, 2]


def test_no_model_is_kept_alive(make_model, make_pairs):
    model = make_model("llama")
    model.model.layers[0].mlp.register_forward_hook(lambda *_, whole=model: None)
    eap.attribute(model, make_pairs(n=4), method="eap")
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None
