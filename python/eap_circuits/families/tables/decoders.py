"""Decoders of attention and MLPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..family import Family, Sums

LLAMA = Family(
    name="llama",
    model_types=(
        *("llama", "mistral", "ministral", "mixtral", "smollm3", "starcoder2", "olmo", "gpt_oss"),
        *("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "arcee", "cwm", "seed_oss", "helium"),
        *("ernie4_5", "ernie4_5_moe", "glm", "glm4_moe", "hunyuan_v1_dense", "exaone", "internlm3", "iquestcoder"),
    ),
    layers="model.layers",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.o_proj",
)
# Earlier versions scale queries by their place in the batch, whatever positions a run gives.
MINISTRAL3 = replace(LLAMA, name="ministral3", model_types=("ministral3",), since="5.4")
PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    q="self_attn.qkv_proj",
    k="self_attn.qkv_proj",
    v="self_attn.qkv_proj",
)
GRANITE = replace(
    LLAMA,
    name="granite",
    model_types=("granite", "granite_swa"),
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
)
HYPERCLOVAX = replace(
    GRANITE,
    name="hyperclovax",
    model_types=("hyperclovax",),
    attention_post_norm="post_norm1",
    mlp_post_norm="post_norm2",
)
GRANITE_MOE = replace(GRANITE, name="granite_moe", model_types=("granitemoe",), mlp="block_sparse_moe")
LLAMA4 = replace(LLAMA, name="llama4", model_types=("llama4_text",), mlp="feed_forward")
OLMOE = replace(LLAMA, name="olmoe", model_types=("olmoe", "minimax_m2"), k_norm="self_attn.k_norm")
APERTUS = replace(
    OLMOE,
    name="apertus",
    model_types=("apertus",),
    attention_norm="attention_layernorm",
    mlp_norm="feedforward_layernorm",
)
GLM4 = replace(
    LLAMA,
    name="glm4",
    model_types=("glm4",),
    attention_post_norm="post_self_attn_layernorm",
    mlp_post_norm="post_mlp_layernorm",
)
STABLELM = replace(
    LLAMA,
    name="stablelm",
    model_types=("stablelm",),
    mlp_norm=("post_attention_layernorm", "input_layernorm"),
    k_norm="self_attn.k_layernorm",
    parallel=("use_parallel_residual",),
)
COHERE = replace(
    LLAMA,
    name="cohere",
    model_types=("cohere", "cohere2"),
    mlp_norm="input_layernorm",
    k_norm="self_attn.k_norm",
    parallel=True,
)
PHI = replace(
    LLAMA,
    name="phi",
    model_types=("phi",),
    final_norm="model.final_layernorm",
    mlp_norm="input_layernorm",
    out="self_attn.dense",
    parallel=True,
)


def _gemma_embedding_factor(model: Any) -> float:
    """Older transformers, whose embeddings have no `embed_scale`, multiply in the model's forward."""
    scaled = hasattr(model.get_input_embeddings(), "embed_scale")
    return 1.0 if scaled else float(model.config.get_text_config().hidden_size) ** 0.5


GEMMA = replace(LLAMA, name="gemma", model_types=("gemma",), embedding_multiplier=_gemma_embedding_factor)
GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    model_types=("gemma2", "gemma3_text"),
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)


def _by_depth(layer: Any) -> Sums:
    """Of n summands, the embeddings first, the last gets √(1/n), and the sum of the others √(1 - 1/n)."""
    attention, mlp = layer.attn_residual_add_idx, layer.mlp_residual_add_idx
    return ((1 - 1 / attention) ** 0.5, attention**-0.5), ((1 - 1 / mlp) ** 0.5, mlp**-0.5)


BEAM = replace(
    GEMMA2,
    name="beam",
    model_types=("beam",),
    embedding_multiplier=None,
    more={"gate": "self_attn.gate_proj"},
    residual_factors=_by_depth,
)
# The variant that also takes images: the language model is a part of it.
GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3",),
    layers="model.language_model.layers",
    final_norm="model.language_model.norm",
)
LLAVA = replace(
    LLAMA,
    name="llava",
    model_types=("llava", "qwen2_vl", "qwen2_5_vl"),
    layers="model.language_model.layers",
    final_norm="model.language_model.norm",
)
QWEN3_VL = replace(
    LLAVA,
    name="qwen3_vl",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    stacked=("vision_config.deepstack_visual_indexes", "deepstack_visual_embeds"),
)
OLMO2 = replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2", "olmo3", "flex_olmo", "exaone4"),
    attention_norm=None,
    mlp_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    k_norm="self_attn.k_norm",
)
GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    layers="transformer.h",
    final_norm="transformer.ln_f",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    q="attn.c_attn",
    k="attn.c_attn",
    v="attn.c_attn",
    out="attn.c_proj",
    requires={"add_cross_attention": False},
)
GPT_NEO = replace(
    GPT2,
    name="gpt_neo",
    model_types=("gpt_neo",),
    q="attn.attention.q_proj",
    k="attn.attention.k_proj",
    v="attn.attention.v_proj",
    out="attn.attention.out_proj",
    requires={},
)
GPTJ = replace(
    GPT2,
    name="gptj",
    model_types=("gptj",),
    mlp_norm="ln_1",
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    out="attn.out_proj",
    parallel=True,
    requires={},
)
GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q="attention.query_key_value",
    k="attention.query_key_value",
    v="attention.query_key_value",
    out="attention.dense",
    fused="grouped",
    parallel=("use_parallel_residual",),
)
BLOOM = replace(
    GPT_NEOX,
    name="bloom",
    model_types=("bloom",),
    layers="transformer.h",
    final_norm="transformer.ln_f",
    q="self_attention.query_key_value",
    k="self_attention.query_key_value",
    v="self_attention.query_key_value",
    out="self_attention.dense",
    # BLOOM's attention and mlp modules return the residual stream with their contribution added.
    mlp=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    parallel=False,
    embedding_norm="transformer.word_embeddings_layernorm",
    requires={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},
)
FALCON = replace(
    BLOOM,
    name="falcon",
    model_types=("falcon",),
    attention_norm=("ln_attn", "input_layernorm"),
    mlp_norm=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
    mlp="mlp",
    parallel=("new_decoder_architecture", "parallel_attn"),
    embedding_norm=None,
    ungrouped={"new_decoder_architecture": True},
    requires={},
)
MPT = Family(
    name="mpt",
    model_types=("mpt",),
    layers="transformer.blocks",
    final_norm="transformer.norm_f",
    attention_norm="norm_1",
    mlp_norm="norm_2",
    q="attn.Wqkv",
    k="attn.Wqkv",
    v="attn.Wqkv",
    out="attn.out_proj",
    # MPT's ffn module returns the residual stream with its contribution added.
    mlp=("ffn.up_proj", "ffn.down_proj"),
)
OPT = Family(
    name="opt",
    model_types=("opt",),
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.out_proj",
    mlp=("fc1", "fc2"),
    requires={"do_layer_norm_before": True},
)

GPT_BIGCODE = replace(
    GPT2,
    name="gpt_bigcode",
    model_types=("gpt_bigcode",),
    fused_by_query="grouped",
    ungrouped={"multi_query": False},
    requires={"add_cross_attention": False, "multi_query": True},
)
CODEGEN = replace(
    GPTJ,
    name="codegen",
    model_types=("codegen",),
    q="attn.qkv_proj",
    k="attn.qkv_proj",
    v="attn.qkv_proj",
    fused="sharded",
)
XGLM = replace(
    OPT, name="xglm", model_types=("xglm",), layers="model.layers", final_norm="model.layer_norm", requires={}
)
BITNET = replace(LLAMA, name="bitnet", model_types=("bitnet",), inner_norm="self_attn.attn_sub_norm")
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    name="granite_moe_shared",
    model_types=("granitemoeshared", "granitemoe_swa"),
    beside="shared_mlp",
)
# Its one final norm is applied to the embeddings, too.
NANOCHAT = replace(LLAMA, name="nanochat", model_types=("nanochat",), embedding_norm="model.norm")
