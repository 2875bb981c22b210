"""Encoder-decoders: each family's encoder, and the two parts of its decoder's layers."""

from __future__ import annotations

from dataclasses import replace

from .family import Family

_T5_SELF = Family(
    name="t5",
    model_types=(),
    layers="decoder.block",
    final_norm="decoder.final_layer_norm",
    attention_norm="layer.0.layer_norm",
    mlp_norm=None,
    q="layer.0.SelfAttention.q",
    k="layer.0.SelfAttention.k",
    v="layer.0.SelfAttention.v",
    out="layer.0.SelfAttention.o",
    mlp=None,
)
T5 = replace(
    _T5_SELF,
    model_types=("t5", "mt5", "umt5"),
    layers="encoder.block",
    final_norm="encoder.final_layer_norm",
    mlp_norm="layer.1.layer_norm",
    mlp="layer.1.DenseReluDense",
    causal=False,
    decoder=(
        _T5_SELF,
        replace(
            _T5_SELF,
            attention_norm="layer.1.layer_norm",
            mlp_norm="layer.2.layer_norm",
            q="layer.1.EncDecAttention.q",
            k="layer.1.EncDecAttention.k",
            v="layer.1.EncDecAttention.v",
            out="layer.1.EncDecAttention.o",
            mlp="layer.2.DenseReluDense",
        ),
    ),
)
_BART_SELF = Family(
    name="bart",
    model_types=(),
    layers="model.decoder.layers",
    final_norm="lm_head",
    attention_norm=None,
    mlp_norm=None,
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    mlp="self_attn_layer_norm",
    rewrites=True,
)
_BART_CROSS = replace(
    _BART_SELF,
    q="encoder_attn.q_proj",
    k="encoder_attn.k_proj",
    v="encoder_attn.v_proj",
    out="encoder_attn.out_proj",
    mlp=("encoder_attn_layer_norm", "final_layer_norm"),
)
# A norm after each sum.
BART = replace(
    _BART_SELF,
    model_types=("bart", "marian", "plbart", "mvp", "blenderbot-small"),
    layers="model.encoder.layers",
    final_norm="",
    mlp=("self_attn_layer_norm", "final_layer_norm"),
    causal=False,
    decoder=(_BART_SELF, _BART_CROSS),
)
# A norm before each block.
_MBART_SELF = replace(
    _BART_SELF,
    name="mbart",
    final_norm="model.decoder.layer_norm",
    attention_norm="self_attn_layer_norm",
    mlp=None,
    rewrites=False,
)
MBART = replace(
    _MBART_SELF,
    model_types=("mbart", "pegasus", "m2m_100", "blenderbot"),
    layers="model.encoder.layers",
    final_norm="model.encoder.layer_norm",
    mlp_norm="final_layer_norm",
    mlp=("fc1", "fc2"),
    causal=False,
    decoder=(
        _MBART_SELF,
        replace(
            _BART_CROSS,
            name="mbart",
            final_norm="model.decoder.layer_norm",
            attention_norm="encoder_attn_layer_norm",
            mlp_norm="final_layer_norm",
            mlp=("fc1", "fc2"),
            rewrites=False,
        ),
    ),
)

ENCODER_DECODERS: dict[str, Family] = {
    model_type: family for family in (T5, BART, MBART) for model_type in family.model_types
}
