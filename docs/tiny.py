"""A tiny random model of any causal type that transformers knows, from its configuration class; everything offline.

Fields that many configurations share are set by name; what a type needs besides is in `OWN`.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, MOST_WEIGHTS = 61, 15_000_000


def _each(value: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, value)


_SMALL = {
    **_each(32, "hidden_size", "n_embd", "d_model", "dim", "dim_model", "embedding_size", "word_embed_proj_dim"),
    **_each(32, "embed_dim", "lru_width", "emb_dim", "hidden_size_global"),
    **_each(48, "intermediate_size", "n_inner", "d_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff"),
    **_each(48, "d_ff", "ffn_hidden_size", "dff", "intermediate_size_mlp", "feed_forward_size"),
    **_each(16, "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    **_each(16, "shared_intermediate_size", "expert_intermediate_size"),
    **_each(3, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    **_each(3, "num_decoder_layers", "num_encoder_layers"),
    **_each(4, "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    **_each(4, "encoder_attention_heads", "linear_num_heads", "linear_num_value_heads", "mamba_n_heads"),
    **_each(2, "num_key_value_heads", "num_kv_heads", "linear_num_key_heads"),
    **_each(8, "head_dim", "dim_head", "attention_head_size", "kv_channels", "linear_head_dim", "v_head_dim"),
    **_each(8, "linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim", "qk_head_dim"),
    **_each(8, "mamba_d_state", "state_size", "ssm_state_size", "mamba_d_ssm", "mamba_chunk_size", "chunk_size"),
    **_each(VOCABULARY, "vocab_size", "src_vocab_size", "tgt_vocab_size", "vocab_size_per_layer_input"),
    **_each(64, "max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"),
    **_each(4, "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "mamba_num_heads"),
    **_each(2, "num_experts_per_tok", "moe_k", "top_k_experts", "moe_topk", "num_experts_per_token"),
    **_each(1, "n_group", "topk_group", "first_k_dense_replace"),
    **_each(12, "q_lora_rank", "kv_lora_rank"),
    **_each(4, "qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "sliding_window"),
    **_each(0.3, "initializer_range", "init_std"),
    "original_max_position_embeddings": 64,
    "hidden_size_per_layer_input": 8,
}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_PICTURES = {
    "image_size": 28,
    "patch_size": 14,
    "hidden_size": 16,
    "head_dim": 8,
    **_each(2, "num_heads", "num_attention_heads", "num_key_value_heads"),
}
_STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1}
_KINDS = ["sliding_attention", "full_attention"]
_DELTA = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_SHARED_KEYS = {"layer_types": 2 * _KINDS, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
# Padding takes the place of these tokens where there is no picture; here they are padding.
_PICTURED = _each(0, "image_token_id", "video_token_id", "audio_token_id")
_NO_LAYER_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_AS_DECODER = (
    *("bert", "bert-generation", "big_bird", "electra", "ernie", "megatron-bert", "reformer", "rembert", "roc_bert"),
    *("roformer", "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
    "xmod",
)
_PADDED = ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod")
_DECODERS = {kind: f"{kind}_decoder" for kind in ("musicgen", "musicgen_melody")}
_DOTS3 = {
    **_each(4, "num_key_value_heads", "swa_num_attention_heads", "swa_num_key_value_heads", "swa_qk_nope_head_dim"),
    **_each(8, "swa_head_dim", "swa_v_head_dim", "index_head_dim", "index_n_heads"),
    **_each(12, "swa_q_lora_rank", "swa_kv_lora_rank"),
    "shared_experts_intermediate_size": 16,
}
OWN: dict[str, dict[str, Any]] = {
    **{
        kind: {"num_key_value_heads": 4}
        for kind in (
            *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "youtu", "sarvam_mla", "axk1", "axk2"),
            *("minicpm3", "kimi_linear", "bailing_hybrid", "glm_moe_dsa"),
        )
    },
    **{kind: {"is_decoder": True} for kind in _AS_DECODER},
    **{kind: {"is_decoder": True, "pad_token_id": 1} for kind in _PADDED},
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _DELTA),
    **dict.fromkeys(("gemma3n_text", "gemma4_text"), _SHARED_KEYS),
    "bamba": {**_STATES, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in _KINDS},
    },
    "cwm": {"bos_token_id": 1},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"mlp_layer_types": 3 * ["dense"], "adapter_in_dim": 16, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 16, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {**_STATES, "mamba_d_ssm": 64},
    "gemma4": {"text_config": {"pad_token_id": 0}, **_PICTURED},
    "gemma4_assistant": {
        "text_config": {**_NO_LAYER_INPUTS, "num_kv_shared_layers": 4, "model_type": "gemma4_text"},
    },
    "gemma4_unified": {"text_config": {"pad_token_id": 0}, **_PICTURED},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {**_STATES, "layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4, "num_layers": 2},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 1},
    "modernbert-decoder": {"pad_token_id": 0},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["linear_attention", "mlp", "full_attention"]},
    "prophetnet": {"pad_token_id": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": 3 * ["local"]},
    "roc_bert": {"is_decoder": True, "enable_pronunciation": False, "enable_shape": False},
    "xmod": {"is_decoder": True, "pad_token_id": 1, "languages": ["en"], "default_language": "en"},
    "xlm": {"pad_token_id": 2},
    "zamba": {"layers_block_type": 2 * ["linear_attention", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": 2 * ["linear_attention", "hybrid"], "num_hidden_layers": 4, "num_mem_blocks": 2},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny(kind: str) -> Any:
    """A random float32 model of a type, as `docs.verdicts.types` names it.

    Raises:
        ValueError: it cannot be made small.
    """
    torch.manual_seed(0)
    kind, _, head = kind.partition(":")
    autos: dict[str, Any] = {"masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
    make: Any = autos.get(head, AutoModelForCausalLM).from_config
    if kind in _DECODERS:  # of a larger model: its configuration is only a part of the type's
        make = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])._from_config
        kind = _DECODERS[kind]
    fields = copy.deepcopy(fields_of(CONFIG_MAPPING[kind], kind))
    if head:
        fields = {**fields, "pad_token_id": 1, "is_decoder": False}
    config = AutoConfig.for_model(kind, **fields)
    if kind == "gemma3n":  # its own vision model needs timm; here nobody looks at pictures
        eyes, own = AutoConfig.for_model("siglip_vision_model", **_PICTURES, num_hidden_layers=1), config.vision_config
        eyes.vocab_size, eyes.vocab_offset, eyes.rms_norm_eps = own.vocab_size, own.vocab_offset, own.rms_norm_eps
        vars(config)["vision_config"] = eyes  # past the check of its type
    weights = 0
    # Older ones have tensors with values, which cannot be made there.
    with suppress(NotImplementedError, RuntimeError), torch.device("meta"):
        weights = sum(x.numel() for x in make(copy.deepcopy(config)).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"{weights:,} weights")
    model = make(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.dim() == 1 or not parameter.any()):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.float().eval()


def fields_of(config: type, kind: str = "") -> dict[str, Any]:
    names, annotations = set(inspect.signature(config.__init__).parameters), {}
    for base in config.__mro__:
        annotations = {**getattr(base, "__annotations__", {}), **annotations}
        if base.__name__.endswith("Config") and base.__name__ not in ("PreTrainedConfig", "PretrainedConfig"):
            names |= set(getattr(base, "__annotations__", {}))
    found: dict[str, Any] = {name: _SMALL[name] for name in sorted(names & set(_SMALL))}
    if any(word in config.__name__ for word in ("Vision", "Audio")) or "image_size" in names:
        found |= {name: value for name, value in _PICTURES.items() if name in names}
    else:
        needed = {name: i for i, name in enumerate(_SPECIAL) if "None" not in str(annotations.get(name, "None"))}
        found |= dict.fromkeys(_SPECIAL) | needed
    own = OWN.get(kind, {})
    parts = [name for name in getattr(config, "sub_configs", {}) if name not in found]
    whole = config() if any("model_type" not in own.get(name, {}) for name in parts) else None
    for name in parts:
        model_type = own.get(name, {}).get("model_type")
        part = getattr(whole, name, None) if model_type is None else CONFIG_MAPPING[model_type]
        if part is not None and not isinstance(part, dict):
            model_type = model_type or getattr(part, "model_type", "")
            kind_of_part = part if isinstance(part, type) else type(part)
            found[name] = {**fields_of(kind_of_part, model_type), "model_type": model_type, **own.get(name, {})}
    found |= {name: value for name, value in own.items() if name not in found or name not in parts}
    return found
