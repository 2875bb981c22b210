"""Options of configurations that make something else of layers."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import FAMILIES, bind
from eap_circuits.selfcheck import check_model
from eap_circuits.selfcheck.model import exact_copy
from tests.circuits.conftest import need_transformers, random_model
from tests.circuits.models import CONFIGS, MIXERS

_WIDE = {
    "vocab_size": 59,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
_GROUPED = {**_WIDE, "num_key_value_heads": 2, "head_dim": 4}
_OPT = {**CONFIGS["opt"][1], "do_layer_norm_before": False, "word_embed_proj_dim": 12}
_FACTORS = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0, "attention_multiplier": 0.3}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """Whatever a test registers is forgotten after it."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        *(
            (kind, {**_GROUPED, **_FACTORS, "num_local_experts": 3, **more})
            for kind, more in [
                ("granite_swa", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}),
                ("granitemoe_swa", {"shared_intermediate_size": 16}),
                ("granitemoe_swa", {"shared_intermediate_size": 0}),
                ("hyperclovax", {"use_post_norm": True}),
                ("hyperclovax", {"use_post_norm": False}),
            ]
        ),
        ("marian", {**MIXERS["marian"][1], "scale_embedding": True}),
        # A query that is the first of a chunk sees no other token.
        ("llama4_text", {**CONFIGS["llama4"][1], "attention_chunk_size": 4}),
    ],
)
def test_options_of_types_with_a_table(kind, fields):
    need_transformers(kind)
    checks = check_model(random_model(kind, fields), n_edges=3)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        # OPT-350m: token embeddings of another width, and norms behind the sums.
        ("opt", _OPT, {"embedding_norm": "model.decoder.project_in", "rewrites": True}),
        # A factor that all kinds of layers share, found in each of them.
        (
            "granitemoehybrid",
            {
                **_GROUPED,
                **{"num_local_experts": 3, "num_experts_per_tok": 2, "shared_intermediate_size": 16},
                **{"layer_types": ["mamba", "attention"], "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 8},
                "residual_multiplier": 0.37,
            },
            {"q": "self_attn.q_proj", "residual_multiplier": 0.37},
        ),
        # What precedes attention in a hybrid is not taken for it.
        (
            "lfm3",
            {**_GROUPED, "layer_types": ["conv", "full_attention"]},
            {"q": "self_attn.q_proj", "k_norm": "self_attn.k_norm", "more": {"g_proj": "self_attn.g_proj"}},
        ),
        # Values of another width than queries and keys.
        (
            "mimo_v2_flash",
            {**_GROUPED, **_EXPERTS, "n_routed_experts": 3, "num_attention_heads": 4, "head_dim": 8, "v_head_dim": 6},
            {"q": "self_attn.q_proj", "v": "self_attn.v_proj"},
        ),
        # One key head, and attention that takes a view of what its function gives.
        (
            "afmoe",
            {**_GROUPED, **_EXPERTS, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 3, "sliding_window": 4},
            {"q": "self_attn.q_proj", "more": {"gate_proj": "self_attn.gate_proj"}},
        ),
    ],
)
def test_options_of_types_without_one(kind, fields, says):
    need_transformers(kind)
    model = random_model(kind, fields)
    family, checks = eap.discover(model)
    assert {name: getattr(family, name) for name in says} == says
    assert all(check.passed for check in checks)


def test_shared_experts_may_have_no_features(make_pairs, relative):
    need_transformers("afmoe")
    fields = {**_GROUPED, **_EXPERTS, "num_experts": 3, "num_shared_experts": 0, "num_dense_layers": 0}
    model = random_model("afmoe", fields)
    eap.register_family(eap.discover(model)[0])
    found, right = (eap.attribute(model, make_pairs(n=3), steps=2, reuse_prefix=reuse) for reuse in (False, True))
    assert relative(found.values, right.values) < 1e-6


def test_norms_after_blocks_may_be_left_out(make_pairs):
    """One table serves the models of a type with them and without."""
    need_transformers("lfm3")
    fields = {**_GROUPED, "layer_types": ["conv", "full_attention"]}
    family, _ = eap.discover(random_model("lfm3", fields))
    assert family.attention_post_norm and family.mlp_post_norm
    without = random_model("lfm3", {**fields, "use_sandwich_norm": False})
    checks = check_model(without, n_edges=3, family=family)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert all(layer.post_norm is None for layer in bind(without, family).layers)
    # Contributions are still compared with the residual stream.
    eap.register_family(family)
    for layer in without.model.layers:
        layer.__class__ = type("Scaled", (type(layer),), {"forward": _scaled(type(layer))})
    with pytest.raises(eap.InputError, match="residual stream"):
        eap.attribute(without, make_pairs(n=2), method="eap")


def _scaled(kind):
    return lambda self, *args, **given: 0.9 * kind.forward(self, *args, **given)


def test_a_bias_before_a_norm_is_named_by_its_path():
    need_transformers("lfm3")
    fields = {**_GROUPED, "layer_types": ["conv", "full_attention"]}
    family, _ = eap.discover(random_model("lfm3", fields))
    biased = random_model("lfm3", {**fields, "conv_bias": True})
    with pytest.raises(eap.InputError, match=r"Lfm3DecoderLayer\.conv\.out_proj: expected no bias"):
        bind(biased, family)


def test_a_table_that_does_not_fit_points_to_discovery():
    with pytest.raises(eap.InputError, match=r"do_layer_norm_before: expected True, or a table of its own \(eap_circ"):
        bind(random_model("opt", _OPT))


def test_latents_of_no_features_are_refused():
    with pytest.raises(eap.InputError, match=r"\.self_attn\.q_a_proj: expected output features for 1 heads, found 0"):
        bind(random_model("minicpm3", {**MIXERS["minicpm3"][1], "q_lora_rank": 0}))


def test_states_that_a_run_has_left_are_copied():
    model = random_model("recurrent_gemma", {**_WIDE, "block_types": ["recurrent", "attention"], "lru_width": 24})
    model(input_ids=torch.arange(3, 9)[None])  # with gradients: the state has a graph
    left, copied = (each.model.layers[0].temporal_block.rg_lru.recurrent_states for each in (model, exact_copy(model)))
    assert left.requires_grad and not copied.requires_grad and torch.equal(copied, left)
