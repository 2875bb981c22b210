"""The families that are supported. One entry each; nothing else in the project knows these names."""

from __future__ import annotations

from .family import Family

LLAMA = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
    layers="model.layers",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    out="self_attn.o_proj",
    mlp="mlp",
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
    mlp="mlp",
)

FAMILIES: dict[str, Family] = {model_type: family for family in (LLAMA, GPT2) for model_type in family.model_types}
