"""Configurations of tiny models: every supported family, and what else a layer may be."""

from __future__ import annotations

from typing import Any

VOCABULARY = 59
_RANDOM = {"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_WIDE = {
    **_RANDOM,
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 48,
}
_NARROW = {**_RANDOM, "vocab_size": VOCABULARY, "hidden_size": 24}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GPT2 = {**_RANDOM, "vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 48}
_FALCON = {**_NARROW, "num_hidden_layers": 2, "num_attention_heads": 6}
_SMALL_IMAGES = {"intermediate_size": 8, "image_size": 14, "patch_size": 14}
_ROTARY = {"rope_type": "default", "rope_theta": 100.0}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2}
_DECODER = {
    "decoder_layers": 2,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 48,
    "init_std": 0.3,
}
_HYBRID = {**_GROUPED, "num_hidden_layers": 2}
_GEMMA4 = {
    **_GROUPED,
    "head_dim": 6,
    "global_head_dim": 8,
    "sliding_window": 4,
    "rms_norm_eps": 1e-2,
    "final_logit_softcapping": 6.0,
}
_LATENT = {
    **_WIDE,
    "num_hidden_layers": 2,
    "num_key_value_heads": 6,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 6,
}
# name: (model type, configuration). New ones come last: a model's weights are random by its place.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {**_NARROW, "n_layer": 2, "n_head": 3}),
    "cohere": ("cohere", {**_GROUPED, "use_qk_norm": True, "logit_scale": 0.5}),
    "cohere2": ("cohere2", {**_GROUPED, **_WINDOWS}),
    "falcon": ("falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-7b": ("falcon", {**_FALCON, "multi_query": True, "parallel_attn": True}),
    "falcon-one-norm": (
        "falcon",
        {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-sequential": ("falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "alibi": True}),
    "gemma": ("gemma", {**_GROUPED, "head_dim": 6}),
    "gemma2": (
        "gemma2",
        {
            **_GROUPED,
            **_WINDOWS,
            "head_dim": 6,
            "query_pre_attn_scalar": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3": ("gemma3_text", {**_GROUPED, **_WINDOWS, "head_dim": 6, "query_pre_attn_scalar": 6}),
    "gpt-neo": (
        "gpt_neo",
        {
            **_NARROW,
            "num_layers": 2,
            "num_heads": 3,
            "max_position_embeddings": 48,
            "intermediate_size": 40,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
        },
    ),
    "gpt-neox": ("gpt_neox", _WIDE),
    "gpt-neox-sequential": ("gpt_neox", {**_WIDE, "use_parallel_residual": False}),
    "gpt-oss": ("gpt_oss", {**_EXPERTS, **_WINDOWS, "num_local_experts": 3, "head_dim": 6}),
    "gpt2": ("gpt2", _GPT2),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4, "n_inner": 40}),
    "granite": (
        "granite",
        {
            **_GROUPED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.3,
        },
    ),
    "llama": ("llama", _GROUPED),
    "llama-mqa-bias": ("llama", {**_WIDE, "num_key_value_heads": 1, "attention_bias": True, "head_dim": 6}),
    "ministral": ("ministral", {**_GROUPED, **_WINDOWS, "head_dim": 6}),
    "mistral-window": ("mistral", {**_WIDE, "num_key_value_heads": 3, "sliding_window": 4}),
    "mixtral": ("mixtral", {**_EXPERTS, "num_local_experts": 3}),
    "olmo": ("olmo", {**_GROUPED, "clip_qkv": 8.0}),
    "olmo2": ("olmo2", _GROUPED),
    "olmo3": ("olmo3", {**_GROUPED, **_WINDOWS}),
    "opt": (
        "opt",
        {
            **_NARROW,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "ffn_dim": 40,
            "max_position_embeddings": 48,
            "word_embed_proj_dim": 24,
            "init_std": 0.3,
            "pad_token_id": 1,
        },
    ),
    "phi": ("phi", {**_GROUPED, "qk_layernorm": True}),
    "phi3": ("phi3", _GROUPED),
    "qwen2": ("qwen2", {**_WIDE, "num_key_value_heads": 6}),
    "qwen2-moe": (
        "qwen2_moe",
        {
            **_EXPERTS,
            "num_experts": 3,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 6}),
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, "num_experts": 3, "moe_intermediate_size": 16, "head_dim": 6}),
    "smollm3": ("smollm3", {**_GROUPED, "no_rope_layers": [1, 0, 1]}),
    "stablelm": ("stablelm", {**_GROUPED, "use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {**_GROUPED, "use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {**_GROUPED, "sliding_window": 4}),
    # Beyond those that were asked for.
    "apertus": ("apertus", {**_GROUPED, "rope_parameters": _ROTARY}),
    "arcee": ("arcee", {**_GROUPED, "head_dim": 6}),
    "cwm": ("cwm", {**_GROUPED, **_WINDOWS, "bos_token_id": 1, "head_dim": 6, "rope_parameters": _ROTARY}),
    "ernie4-5": ("ernie4_5", {**_GROUPED, "head_dim": 6, "use_bias": True}),
    "ernie4-5-moe": (
        "ernie4_5_moe",
        {**_GROUPED, "moe_num_experts": 3, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    ),
    "exaone4": ("exaone4", {**_GROUPED, **_WINDOWS}),
    "flex-olmo": ("flex_olmo", {**_EXPERTS, "num_experts": 3}),
    "gemma3-images": (
        "gemma3",
        {
            "text_config": {**_GROUPED, **_WINDOWS, "head_dim": 6, "query_pre_attn_scalar": 6},
            "vision_config": {**_SMALL_IMAGES, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
            "mm_tokens_per_image": 1,
        },
    ),
    "glm": ("glm", {**_GROUPED, "head_dim": 8, "attention_bias": True}),
    "glm4": ("glm4", {**_GROUPED, "head_dim": 8, "attention_bias": True}),
    "glm4-moe": (
        "glm4_moe",
        {
            **_EXPERTS,
            "n_routed_experts": 3,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            **_EXPERTS,
            "num_local_experts": 3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.3,
        },
    ),
    "helium": ("helium", {**_GROUPED, "head_dim": _GROUPED["hidden_size"] // 6}),
    "hunyuan": ("hunyuan_v1_dense", {**_GROUPED, "head_dim": 6}),
    "llama4": (
        "llama4_text",
        {
            **_GROUPED,
            "num_experts_per_tok": 1,
            "num_local_experts": 3,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 20,
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": 6,
            "head_dim": 6,
        },
    ),
    "minimax-m2": ("minimax_m2", {**_EXPERTS, "num_local_experts": 3, "head_dim": 6, "rotary_dim": 4}),
    "ministral3": (
        "ministral3",
        {
            **_GROUPED,
            "head_dim": 6,
            "rope_parameters": {**_ROTARY, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4},
        },
    ),
    "mpt": (
        "mpt",
        {**_RANDOM, "vocab_size": VOCABULARY, "d_model": 24, "n_layers": 2, "n_heads": 3, "max_seq_len": 48},
    ),
    "olmoe": ("olmoe", {**_EXPERTS, "num_experts": 3}),
    "seed-oss": ("seed_oss", {**_GROUPED, "head_dim": 6}),
}
FAMILIES = list(CONFIGS)
# What else a layer may be; tests/circuits/adapters/test_mixers.py runs them.
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba": (
        "bamba",
        {
            **_HYBRID,
            "attn_layer_indices": [1],
            "mamba_n_heads": 6,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
        },
    ),
    "bart": ("bart", {**_RANDOM, "vocab_size": VOCABULARY, "pad_token_id": 0, "d_model": 24, **_DECODER}),
    "bert": ("bert", {**_WIDE, "num_hidden_layers": 2, "is_decoder": True}),
    "bitnet": ("bitnet", {**_GROUPED, "num_hidden_layers": 2}),
    "codegen": ("codegen", {**_GPT2, "n_head": 4, "rotary_dim": 4, "n_inner": 40}),
    "deepseek-v2": ("deepseek_v2", {**_LATENT, "q_lora_rank": None, "topk_method": "greedy", "norm_topk_prob": False}),
    "deepseek-v3": ("deepseek_v3", {**_LATENT, "q_lora_rank": 10}),
    "gpt-bigcode": ("gpt_bigcode", {**_GPT2, "n_inner": 40}),
    "granitemoeshared": (
        "granitemoeshared",
        {**_EXPERTS, "num_local_experts": 3, "shared_intermediate_size": 16, "residual_multiplier": 0.4},
    ),
    "jamba": (
        "jamba",
        {
            **_HYBRID,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "jetmoe": (
        "jetmoe",
        {**_WIDE, "num_hidden_layers": 2, "num_key_value_heads": 3, "kv_channels": 4, "num_local_experts": 3},
    ),
    "lfm2": ("lfm2", {**_HYBRID, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "mamba": ("mamba", {**_NARROW, "num_hidden_layers": 3, "state_size": 4, "time_step_rank": 3}),
    "mamba2": (
        "mamba2",
        {
            **_NARROW,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 6,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
        },
    ),
    "marian": ("marian", {**_RANDOM, "vocab_size": VOCABULARY, "pad_token_id": 0, "d_model": 24, **_DECODER}),
    "minicpm3": ("minicpm3", {**_LATENT, "q_lora_rank": 10, "scale_emb": 3, "scale_depth": 0.7, "dim_model_base": 12}),
    "nanochat": ("nanochat", {**_GROUPED, "num_hidden_layers": 2}),
    "qwen3-next": (
        "qwen3_next",
        {
            **_HYBRID,
            **_DELTA,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3-5": ("qwen3_5_text", {**_HYBRID, **_DELTA}),
}
_ENCODER = {**_WIDE, "num_hidden_layers": 2}
# Masked language models, in which tokens see those that follow; "-classes" in a name: classifiers of prompts.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("albert", {**_ENCODER, "embedding_size": 12, "num_hidden_groups": 1}),
    "bert-masked": ("bert", _ENCODER),
    "distilbert": (
        "distilbert",
        {
            **_RANDOM,
            "vocab_size": VOCABULARY,
            "dim": 24,
            "hidden_dim": 40,
            "n_layers": 2,
            "n_heads": 6,
            "max_position_embeddings": 48,
        },
    ),
    "electra": ("electra", {**_ENCODER, "embedding_size": 12}),
    "modernbert": (
        "modernbert",
        {**_ENCODER, "cls_token_id": None, "sep_token_id": None, "local_attention": 4, "global_attn_every_n_layers": 2},
    ),
    "roberta": ("roberta", {**_ENCODER, "pad_token_id": 1}),
    "bert-classes": ("bert", {**_ENCODER, "num_labels": 3}),
    "llama-classes": ("llama", {**_GROUPED, "num_hidden_layers": 2, "num_labels": 3}),
    "modernbert-classes": (
        "modernbert",
        {**_ENCODER, "cls_token_id": None, "sep_token_id": None, "classifier_pooling": "mean", "num_labels": 3},
    ),
}
# More of what else a layer may be. Their names come last, as a model's weights are random by its place among all.
NEWER: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": (
        "gemma4_text",
        {
            **_GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": 2 * ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 5,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4-large": (
        "gemma4_text",
        {
            **_GEMMA4,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "hidden_size_per_layer_input": 0,
        },
    ),
}
_BOTH = {**_RANDOM, "vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 0, "d_model": 24}
_T5 = {
    **_BOTH,
    "d_kv": 5,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
_TWO_SIDES = {
    **_BOTH,
    **_DECODER,
    "decoder_start_token_id": 2,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
}
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "mt5": ("mt5", {**_T5, "num_layers": 1, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart-two-sides": ("bart", {**_TWO_SIDES, "scale_embedding": True}),
    "marian-two-sides": ("marian", {**_TWO_SIDES, "scale_embedding": True}),
    "mbart": ("mbart", {**_TWO_SIDES, "encoder_layers": 1}),
    "pegasus": ("pegasus", {**_TWO_SIDES, "scale_embedding": True}),
}
# Of older transformers: what the model itself cannot do that tests need.
SINCE = {
    **dict.fromkeys(("axk2", "beam", "granite_swa", "granitemoe_swa"), ("5.24", "it is there")),
    **dict.fromkeys(("hyperclovax", "olmo-hybrid"), ("5.24", "it is there")),
    **dict.fromkeys(("afmoe", "lfm3", "mimo_v2_flash"), ("5.24", "it is there, and right")),
    **dict.fromkeys(("gemma4", "gemma4-experts", "gemma4-large"), ("5.24", "it has a table")),
    "ministral3": ("5.4", "its attention heeds the positions that it is given"),
    "mpt": ("5.2", "its mask fits float64"),
    **dict.fromkeys(("stablelm", "stablelm-parallel"), ("5.2", "its cache and its mask are of one size")),
}
# One of each way in which families differ, for what does not depend on the modules' names.
KINDS = ["falcon", "gemma2", "gpt2", "gpt-neox", "llama", "mistral-window", "olmo2", "qwen3-moe"]
