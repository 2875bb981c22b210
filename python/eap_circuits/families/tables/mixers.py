"""Decoders with other mixers than attention with queries, keys and values, in all layers or in some."""

from __future__ import annotations

from dataclasses import replace

from ..family import Family, Mixer
from .decoders import GEMMA2, GRANITE_MOE_SHARED, LLAMA, OLMO2

# Where the keys are also the values, or where both are another layer's, a layer has no three projections.
GEMMA4 = replace(
    GEMMA2,
    name="gemma4",
    model_types=("gemma4_text", "gemma4_unified_text"),
    mixers=(
        Mixer(
            out="self_attn.o_proj",
            reads={"kv": "self_attn.k_proj"},
            by_head={"q": "self_attn.q_proj"},
            heads=("num_attention_heads",),
        ),
    ),
    v_norm="self_attn.v_norm",
    key_sharing="layer_type",
    layer_scale="layer_scalar",
    per_layer=("per_layer_input_gate", "post_per_layer_input_norm"),
    per_layer_inputs="model.per_layer_model_projection",
    mlp_reads=("router", "pre_feedforward_layernorm_2"),
    since="5.24",
)
GEMMA4_IMAGES = replace(
    GEMMA4,
    name="gemma4_images",
    model_types=("gemma4", "gemma4_unified"),
    layers="model.language_model.layers",
    final_norm="model.language_model.norm",
    per_layer_inputs="model.language_model.per_layer_model_projection",
)
# The mixture of experts is no single linear map: its heads are not told apart.
JETMOE = replace(
    LLAMA,
    name="jetmoe",
    model_types=("jetmoe",),
    mixers=(Mixer(module="self_attention"),),
)
# Multi-head latent attention: the residual stream is read by what makes the latents of queries (or the queries
# themselves) and of keys and values.
_LATENT = Mixer(
    out="self_attn.o_proj",
    reads={"q": "self_attn.q_a_proj", "kv": "self_attn.kv_a_proj_with_mqa"},
    by_head={"q": "self_attn.q_proj"},
    heads=("num_heads", "num_attention_heads"),
)
DEEPSEEK = replace(
    LLAMA,
    name="deepseek",
    model_types=("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "sarvam_mla", "axk1"),
    mixers=(_LATENT,),
)
MINICPM3 = replace(
    DEEPSEEK,
    name="minicpm3",
    model_types=("minicpm3",),
    residual_multiplier=lambda model: model.config.scale_depth / model.config.num_hidden_layers**0.5,
)
# Both norms have a gate, so all heads read the residual stream through one receiver.
AXK2 = replace(
    LLAMA,
    name="axk2",
    model_types=("axk2",),
    attention_norm=None,
    mlp_norm=None,
    mlp=("post_attention_layernorm", "mlp"),
    mixers=(Mixer(out="self_attn.o_proj", module="input_layernorm", heads=("num_heads",)),),
)
# A gated delta rule instead of attention in most layers.
_DELTA = Mixer(
    out="linear_attn.out_proj",
    reads={
        name.removeprefix("in_proj_"): f"linear_attn.{name}"
        for name in ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    },
    heads=("num_v_heads",),
)
QWEN3_NEXT = replace(
    LLAMA, name="qwen3_next", model_types=("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), mixers=(_DELTA,)
)
# Norms are before the blocks of layers with a delta rule, and after those of layers with attention.
OLMO_HYBRID = replace(
    OLMO2,
    name="olmo_hybrid",
    model_types=("olmo_hybrid",),
    others=(
        replace(
            LLAMA,
            out="",
            mixers=(
                Mixer(
                    out="linear_attn.o_proj",
                    reads={f"{name}_proj": f"linear_attn.{name}_proj" for name in "qkvgab"},
                    heads=("num_v_heads",),
                ),
            ),
        ),
    ),
)
# Lightning attention in most layers. Norms take the residual stream's place, before attention and before the MLP.
MINIMAX = replace(
    LLAMA,
    name="minimax",
    model_types=("minimax",),
    attention_norm=None,
    mlp_norm=None,
    mlp=("post_attention_layernorm", ""),
    rewrites=True,
    first_norm="input_layernorm",
    embedding_norm="model.layers.0.input_layernorm",
    residual_factors=lambda layer: ((layer.attn_alpha_factor, layer.attn_beta_factor), (1.0, 1.0)),
    mixers=(
        Mixer(
            out="self_attn.out_proj",
            by_head={"qkv": "self_attn.qkv_proj", "gate": "self_attn.output_gate"},
            heads=("num_attention_heads",),
        ),
    ),
)
LFM2 = replace(
    LLAMA,
    name="lfm2",
    model_types=("lfm2", "lfm2_moe"),
    final_norm="model.embedding_norm",
    attention_norm="operator_norm",
    mlp_norm="ffn_norm",
    out="self_attn.out_proj",
    mlp="feed_forward",
    mixers=(Mixer(out="conv.out_proj", reads={"in": "conv.in_proj"}),),
)
# A state space. The heads of Mamba-2 are what the output projection reads of each, behind the gate and the norm.
_STATES = Mixer(out="mamba.out_proj", reads={"in": "mamba.in_proj"}, heads=("num_heads",))
JAMBA = replace(
    LLAMA,
    name="jamba",
    model_types=("jamba",),
    final_norm="model.final_layernorm",
    mlp_norm="pre_ff_layernorm",
    mlp="feed_forward",
    mixers=(_STATES,),
)
BAMBA = replace(JAMBA, name="bamba", model_types=("bamba",))
GRANITE_HYBRID = replace(
    GRANITE_MOE_SHARED, name="granite_hybrid", model_types=("granitemoehybrid",), mixers=JAMBA.mixers
)
# State spaces beside attention, with factors where blocks read and write.
FALCON_H1 = replace(
    JAMBA,
    name="falcon_h1",
    model_types=("falcon_h1",),
    mixers=(),
    beside_attention=(replace(_STATES, read_factor="ssm_in_multiplier", write_factor="ssm_out_multiplier"),),
    read_factor="attention_in_multiplier",
    write_factor="attention_out_multiplier",
    embedding_multiplier="embedding_multiplier",
    scales_given=False,
)
# Layers of one block: a state space without heads is one node.
MAMBA = Family(
    name="mamba",
    model_types=("mamba", "falcon_mamba"),
    layers="backbone.layers",
    final_norm="backbone.norm_f",
    attention_norm="norm",
    mlp_norm="norm",
    mlp="mixer",
)
MAMBA2 = replace(
    MAMBA,
    name="mamba2",
    model_types=("mamba2",),
    one_block=True,
    mixers=(replace(_STATES, out="mixer.out_proj", reads={"in": "mixer.in_proj"}),),
)
NEMOTRON_H = replace(
    MAMBA2,
    name="nemotron_h",
    model_types=("nemotron_h",),
    layers="model.layers",
    final_norm="model.norm_f",
    q="mixer.q_proj",
    k="mixer.k_proj",
    v="mixer.v_proj",
    out="mixer.o_proj",
)
