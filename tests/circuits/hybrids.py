"""Configurations of tiny models with mixers side by side, with layers of several kinds, and with pictures."""

from __future__ import annotations

from typing import Any

from tests.circuits.models import CONFIGS, NEWER, VOCABULARY

_PLAIN = CONFIGS["llama"][1]
# State spaces beside attention, layers of one block each, norms at two places, and norms with a gate.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-h1": (
        "falcon_h1",
        {
            **_PLAIN,
            "num_hidden_layers": 2,
            "embedding_multiplier": 1.7,
            "lm_head_multiplier": 0.6,
            "mlp_multipliers": [0.8, 1.2],
            "attention_in_multiplier": 1.3,
            "attention_out_multiplier": 0.7,
            "ssm_in_multiplier": 0.6,
            "ssm_out_multiplier": 1.4,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 4,
            "mamba_chunk_size": 4,
        },
    ),
    "nemotron-h": (
        "nemotron_h",
        {
            **_PLAIN,
            "layers_block_type": ["linear_attention", "mlp", "full_attention"],
            "head_dim": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "ssm_state_size": 4,
            "chunk_size": 4,
        },
    ),
    "olmo-hybrid": (
        "olmo_hybrid",
        {
            **_PLAIN,
            "layer_types": ["linear_attention", "full_attention"],
            "num_hidden_layers": 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 6,
            "linear_value_head_dim": 6,
        },
    ),
    # Experts beside the MLP, which read the residual stream through a norm of their own, and a router.
    "gemma4-experts": (
        "gemma4_text",
        {
            **NEWER["gemma4-large"][1],
            "enable_moe_block": True,
            "num_experts": 3,
            "top_k_experts": 2,
            "moe_intermediate_size": 8,
        },
    ),
    "axk2": (
        "axk2",
        {
            **_PLAIN,
            "num_hidden_layers": 2,
            "num_key_value_heads": 6,
            "q_lora_rank": 10,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "n_routed_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "index_topk": 64,
            "index_head_dim": 8,
            "index_n_heads": 2,
            "gated_norm_rank": 4,
        },
    ),
    # The residual stream and a block's output have factors in their sum; heads have gates.
    "beam": (
        "beam",
        {
            **_PLAIN,
            "num_hidden_layers": 2,
            "head_dim": 6,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "rms_norm_eps": 1e-2,
        },
    ),
    # Norms that take the residual stream's place, behind sums with factors and before them.
    "minimax": (
        "minimax",
        {
            **_PLAIN,
            "head_dim": 6,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "block_size": 4,
            "linear_attn_alpha_factor": 1.3,
            "linear_attn_beta_factor": 0.7,
            "full_attn_alpha_factor": 0.8,
            "full_attn_beta_factor": 1.2,
            "mlp_alpha_factor": 1.1,
            "mlp_beta_factor": 0.9,
        },
    ),
}
# Vision-language models that take pictures of 28 by 28 pixels, in place of four tokens `PICTURED`.
PICTURED = VOCABULARY - 1
_SEES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
_SEES_PATCHES = {
    **{"depth": 2, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2},
    **{"hidden_size": 8, "intermediate_size": 8, "out_hidden_size": 24},
}
_TURNED = {**CONFIGS["llama"][1], "num_attention_heads": 3, "num_key_value_heads": 1}


def _on_axes(**sees: Any) -> dict[str, Any]:
    """Of a model in which positions of pictures' tokens have three axes."""
    return {
        "text_config": {**_TURNED, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        "vision_config": {**_SEES_PATCHES, **sees},
        "image_token_id": PICTURED,
        "video_token_id": PICTURED - 1,
    }


PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": (
        "gemma3",
        {
            "text_config": CONFIGS["gemma3-images"][1]["text_config"],
            "vision_config": {**_SEES, "image_size": 28},
            "mm_tokens_per_image": 4,
            "image_token_id": PICTURED,
        },
    ),
    "llava": (
        "llava",
        {
            "text_config": {**CONFIGS["llama"][1], "model_type": "llama"},
            "vision_config": {**_SEES, "image_size": 28, "projection_dim": 8, "model_type": "clip_vision_model"},
            "image_token_index": PICTURED,
        },
    ),
    "qwen2-vl": ("qwen2_vl", _on_axes(embed_dim=8, hidden_size=24, mlp_ratio=1)),
    "qwen2-5-vl": ("qwen2_5_vl", _on_axes(window_size=8, fullatt_block_indexes=[1])),
}
# Its first layers read pictures again.
STACKED = {"qwen3-vl": ("qwen3_vl", _on_axes(num_position_embeddings=16, deepstack_visual_indexes=[0]))}
