"""Binding: what is found, and one clear sentence for what is not."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    BertConfig,
    LlamaConfig,
    LongT5Config,
    RwkvConfig,
    ViTConfig,
)

import eap_circuits as eap
from docs import verdicts
from eap_circuits.adapters import FAMILIES, Place, bind, joined, linear_shape
from eap_circuits.adapters.binding import binder
from eap_circuits.forward.prefixes import prefix
from eap_circuits.graph import Graph
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import CONFIGS

TINY = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def test_weights_in_canonical_layout(family, make_model):
    """Each head's projection, by its weights, is what the module computes for that head."""
    model = make_model(family)
    arch = bind(model)
    x = torch.randn(5, arch.d_model, dtype=torch.float64)
    for layer in arch.layers:
        for projection in layer.projections.values():
            if isinstance(projection.module, Place):
                continue
            y = torch.einsum("nd,hkd->nhk", x, projection.weight(x.dtype))
            bias = projection.bias(x.dtype)
            y = y if bias is None else y + bias
            torch.testing.assert_close(y.flatten(1), projection.module(x)[:, projection.rows])
        if isinstance(layer.out, Place):
            continue
        z = torch.randn(5, linear_shape(layer.out)[1], dtype=torch.float64)
        with StayDouble():
            written = layer.written(z).unflatten(1, (layer.n_heads, -1))
            right = layer.out(z) - layer.out(torch.zeros_like(z))
            right = right if layer.post_norm is None else layer.post_norm.module(right)
        found = torch.einsum("nhk,hkd->nd", written, layer.out_weight(x.dtype))
        torch.testing.assert_close(found, right * layer.scale)


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "falcon", "phi3", "llama"])
def test_projections_of_one_module_are_one(family, make_model):
    for layer in bind(make_model(family)).layers:
        for projections in map(list, map(dict.values, layer.projection_modules.values())):
            if len({each.head_dim for each in projections}) == 1:
                found, dtype = joined(projections), torch.float64
                assert torch.equal(found.weight(dtype), torch.cat([each.weight(dtype) for each in projections]))
                assert found.n_heads == sum(each.n_heads for each in projections)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "granite"])
def test_output_projections_are_rounded_once(family, make_model):
    for layer in bind(make_model(family, torch.bfloat16)).layers:
        for features in (slice(None), slice(5, 13)):
            found = layer.out_weight(torch.bfloat16, features)
            assert torch.equal(found, layer.out_weight(torch.float32, features).bfloat16())


def test_norms_compute_where_their_layers_do(family, make_model):
    """Those without parameters, too. "meta" stands for any device that is not the CPU."""
    arch = bind(make_model(family))
    arch.model.to("meta")
    norms = [arch.final_norm, *(norm for layer in arch.layers for norm in (layer.attention_norm, layer.mlp_norm))]
    assert {norm.device.type for norm in norms} == {"meta"}


def test_norm_statistics_are_the_norms(family, make_model):
    arch = bind(make_model(family, dtype=torch.float32))
    for norm in arch.norms:
        if norm.kind is None:
            continue
        x = torch.randn(4, arch.d_model) * 3 + 1
        centred = x - x.mean(-1, keepdim=True) if norm.kind.centred else x
        scale = norm.scale(x)
        y = centred * scale[:, None] * norm.gain(x) + (0 if norm.bias is None else norm.bias)
        torch.testing.assert_close(y, norm.module(x))
        torch.testing.assert_close(norm.scale(x.clone().requires_grad_()), scale)  # which a kernel may sum otherwise
        rows, gathered = torch.tensor([3, 1]), torch.empty(2, 2, arch.d_model)
        torch.testing.assert_close(norm.capture(torch.stack([x, x + 1]), rows, gathered)[0], scale[rows])
        torch.testing.assert_close(gathered[0], (centred * scale[:, None])[rows])


def test_every_table_has_a_tiny_model(model_types):
    """In the tests, or in docs/verdicts.py, whose committed results say that the self-check passed."""
    types = set(model_types)
    tried = verdicts.read()["5.24.0"].items()
    passed = {kind.removesuffix(verdicts.PICTURES) for kind, one in tried if one["verdict"] == "table"}
    assert types <= set(FAMILIES) <= types | passed


def refused(model):
    with pytest.raises(eap.InputError) as error:
        bind(model)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


def test_unsupported_architecture_names_what_is_and_what_was_found():
    config = RwkvConfig(vocab_size=20, hidden_size=8, num_hidden_layers=2, attention_hidden_size=8)
    text = refused(AutoModelForCausalLM.from_config(config))
    assert "gpt2" in text and "llama" in text and "'rwkv'" in text and "RwkvForCausalLM" in text


def test_an_encoder_is_bound_with_the_head_of_a_decoder_too():
    assert not bind(AutoModelForCausalLM.from_config(BertConfig(**TINY))).causal
    assert bind(AutoModelForCausalLM.from_config(BertConfig(**TINY, is_decoder=True))).causal


HEADS = "AutoModelForCausalLM, -MaskedLM, -Seq2SeqLM or -SequenceClassification"
SAID = f"expected a model with its head, as {HEADS} loads it, found"


def test_models_of_other_kinds():
    model = AutoModelForImageClassification.from_config(ViTConfig(**TINY, image_size=4, patch_size=2))
    assert refused(model) == f"model: {SAID} 'vit' (ViTForImageClassification)."


def test_an_encoder_decoder_without_a_table_is_told_which_there_are():
    config = LongT5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    text = refused(AutoModelForSeq2SeqLM.from_config(config))
    assert "expected an encoder-decoder among bart, " in text and "found 'longt5' (LongT5For" in text


@pytest.mark.parametrize(
    ("auto", "config"),
    [
        (AutoModel, LlamaConfig(**TINY)),
        (AutoModelForMultipleChoice, BertConfig(**TINY)),
        (AutoModelForTokenClassification, LlamaConfig(**TINY)),
        (AutoModelForQuestionAnswering, BertConfig(**TINY)),
    ],
)
def test_models_without_a_head_that_is_known(auto, config):
    model = auto.from_config(config)
    assert refused(model) == f"{type(model).__name__}: {SAID} a model without one."


def test_a_site_that_is_not_there_is_named(make_model):
    model = make_model("llama")
    del model.model.norm
    assert "expected a module at 'model.norm'" in refused(model)


@pytest.mark.parametrize("kept", [slice(0, 1), (slice(None), -1), (..., slice(5))])
def test_logits_that_are_no_language_models(kept, make_model, make_pairs):
    """Of a class of the user's own, whose head is not found by its name."""
    model, data = make_model("llama"), make_pairs(n=3)

    class Other(type(model)):
        def get_output_embeddings(self):
            return None

        def forward(self, **given):
            result = super().forward(**given)
            result.logits = result.logits[kept]
            return result

    model.__class__ = Other
    said = r"Other's logits: expected \[prompts, positions, vocabulary\], found shape"
    with pytest.raises(eap.InputError, match=said):
        eap.attribute(model, data, lambda logits, _: logits.flatten(1).sum(1))


def test_weights_made_in_inference_mode():
    config = LlamaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_config(config)
    assert refused(model) == "model: expected weights made outside of torch.inference_mode, found inference tensors."


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_default_dtype_changes_nothing(dtype, make_model, make_pairs):
    model, data = make_model("llama", torch.float32), make_pairs(n=4)

    def results():
        scores = [eap.attribute(model, data, steps=3, method=method, rules=rules).values for method, rules in cases]
        start = eap.attribute(model, data, method="eap", ablation="mean")
        circuit = start.select(30)
        return [
            *scores,
            eap.evaluate(model, circuit, data).values,
            eap.optimal_constants(model, circuit, data, steps=1).embedding,
            eap.learn_mask(model, data, start=start, steps=2).values,
            eap.prune_gradually(model, data, start=start, keep=0.4, n_edges=(3, 60)).values,
            eap.ibcircuit(model, data, steps=2).values,
            eap.ensemble([start, start]).values,
            eap.random_circuit(start.graph, 30).mask,
        ]

    cases = [("eap-ig-inputs", "gim"), ("information-flow-routes", None), ("eap-ig-activations", None), ("exact", None)]
    right = results()
    torch.set_default_dtype(dtype)
    try:
        found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, right, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_another_default_device_is_refused(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=3)
    tokens = [[1, 2]], [[1, 3]], [2], [[4, 5]]
    calls = (
        lambda: eap.attribute(model, data),
        lambda: eap.PairedDataset.from_tokens(*tokens),
        lambda: Graph((2,), (2,), 8),
    )
    with torch.device("meta"):
        for call in calls:
            with pytest.raises(eap.InputError, match="torch's default device: expected the CPU"):
                call()


def test_no_model_at_all():
    assert "Linear" in refused(torch.nn.Linear(2, 2))
    assert "str" in refused("gpt2")


def test_weights_that_are_not_there(make_model):
    model = make_model("llama")
    model.model.layers[1].to("meta")
    text = refused(model)
    assert "all weights" in text and "meta" in text


def test_site_of_another_kind_is_named(make_model):
    model = make_model("llama")
    model.model.layers[0].self_attn.q_proj = torch.nn.Sequential(model.model.layers[0].self_attn.q_proj)
    assert "self_attn.q_proj" in refused(model) and "Sequential" in refused(model)


def test_embeddings_of_another_width_are_named():
    kind, fields = CONFIGS["opt"]
    text = refused(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**fields, "word_embed_proj_dim": 12}))
    )
    assert "OPTForCausalLM's token embeddings" in text and "24" in text and "12" in text


def test_embeddings_without_a_weight_are_named(make_model):
    model = make_model("llama")
    model.model.embed_tokens = torch.nn.Sequential(model.model.embed_tokens)
    wanted = (
        "LlamaForCausalLM's token embeddings: expected a module with a weight [tokens, features], found Sequential."
    )
    assert refused(model) == wanted


def test_head_counts_that_do_not_fit_are_named(make_model):
    model = make_model("llama")
    model.model.layers[1].self_attn.k_proj = torch.nn.Linear(24, 4 * 4).double()
    text = refused(model)
    assert "k_proj" in text and "6 query heads of 4" in text and "16" in text


def test_graph_of_a_model(make_model):
    graph = bind(make_model("llama")).graph("kv")
    assert graph.senders[:8] == ["input", *(f"a0.h{h}" for h in range(6)), "m0"]
    assert graph.receivers[:11] == [
        *(f"a0.h{h}<q>" for h in range(6)),
        *(f"a0.h{g}<{s}>" for s in "kv" for g in range(2)),
        "m0",
    ]


@pytest.fixture
def broken_cache(monkeypatch):
    """As of StableLM in transformers 5.0.0, whose cache and mask differ in size."""

    def fails(*_, **__):
        raise RuntimeError("The size of tensor a (9) must match\nmore lines")

    monkeypatch.setattr(prefix._Before, "update", fails)


def test_self_check_says_where_prefixes_cannot_be_reused(make_model, broken_cache):
    checks = {check.name: check for check in eap.check_model(make_model("llama"))}
    assert all(check.passed for check in checks.values()) and "prefix reuse is exact" not in checks
    said = "left out, as the model's cache cannot serve: The size of tensor a (9) must match"
    assert checks["prefix reuse"].detail == said


@pytest.mark.parametrize("method", ["eap-ig-inputs", "exact"])
def test_where_prefixes_cannot_be_reused_they_are_not(method, make_model, make_pairs, broken_cache, relative):
    model, data = make_model("llama"), make_pairs(n=4)
    right = eap.attribute(model, data, method=method, reuse_prefix=False)
    said = r"LlamaForCausalLM: prefixes are not reused, as its cache cannot serve \(The size of tensor a \(9\) must"
    with pytest.warns(UserWarning, match=said):
        found = eap.attribute(model, data, method=method)
    assert relative(found.values, right.values) < 1e-6
    circuit = right.select(40)
    with pytest.warns(UserWarning, match=said):
        curve = eap.faithfulness_curve(model, right, data, (0.1, 1.0))
    assert curve.results[-1].faithfulness == pytest.approx(1)
    with pytest.warns(UserWarning, match=said):
        found = eap.evaluate(model, circuit, data)
    assert relative(found.values, eap.evaluate(model, circuit, data, reuse_prefix=False).values) < 1e-6
    with pytest.warns(UserWarning, match=said):
        eap.plan(model, data)


def test_other_errors_of_a_run_are_not_the_caches(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=4)

    def fails(*_):
        raise RuntimeError("no")

    model.model.layers[1].register_forward_hook(fails)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=r"^no$"):
            eap.attribute(model, data)


def test_every_family_loads_as_a_causal_model(family, make_model):
    assert isinstance(make_model(family), tuple(AutoModelForCausalLM._model_mapping.values()))


def test_layers_with_different_head_counts(make_model):
    """Counts come from each layer's weights: another number of heads, another head size, another grouping."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    from eap_circuits.selfcheck import check_model

    model = make_model("llama")
    config = LlamaConfig(hidden_size=24, num_attention_heads=4, num_key_value_heads=1, head_dim=4)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model.model.layers[1].self_attn = LlamaAttention(config, 1).double()
    graph = bind(model).graph("kv")
    assert graph.n_heads == (6, 4, 6) and graph.n_kv_heads == (2, 1, 2)
    assert all(check.passed for check in check_model(model))


def test_a_model_of_too_old_a_transformers_is_refused(make_model, monkeypatch):
    """Whose own forward does not heed the positions that it is given."""
    model = make_model("ministral3")
    monkeypatch.setattr(binder.transformers, "__version__", "5.3.0")
    with pytest.raises(eap.InputError, match=r"expected transformers 5.4 or later for Ministral3\w+, found 5.3.0"):
        bind(model)
