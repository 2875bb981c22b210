"""Do pairs of prompts with pictures work with a vision-language type? Tried on a tiny random model and random pictures.

`docs/verdicts.py` asks (`python -m docs.verdicts llava:pictures`). What a processor would return is made here.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from docs.tiny import fields_of

# Of so many tokens those in whose place pictures stand are hardly drawn where random prompts are texts.
VOCABULARY = 2000
PLACE = VOCABULARY - 1
_BY_PATCH = {
    **{"depth": 2, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "image_size": 8},
    **{"hidden_size": 16, "embed_dim": 16, "intermediate_size": 16, "out_hidden_size": 32},
}
_ON_AXES = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}}
_DELTA = {
    "rope_parameters": {**_ON_AXES["rope_parameters"], "partial_rotary_factor": 1.0},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_STACKED = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
_LLAVA = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
# What each configuration needs besides the fields that many share.
OWN: dict[str, dict[str, Any]] = {
    "aya_vision": {},
    "cohere2_vision": {"downsample_factor": 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {
        "text_config": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
        "vision_config": {"pooling_kernel_size": 2, "model_type": "gemma4_vision"},
    },
    "glm4v": {"vision_config": _BY_PATCH, "text_config": _ON_AXES},
    "got_ocr2": {},
    "idefics2": {},
    "idefics3": {},
    "internvl": {},
    "lfm2_vl": {},
    "llava": _LLAVA,
    "llava_next": {**_LLAVA, "image_grid_pinpoints": [[28, 28]]},
    "mistral3": {"vision_feature_layer": -1, "spatial_merge_size": 2, "vision_config": {"image_size": 56}},
    "mllama": {
        "vision_config": {"intermediate_layers_indices": [0], "attention_heads": 2, "vision_output_dim": 32},
        "text_config": {"cross_attention_layers": [1]},
    },
    "ovis2": {},
    "paligemma": {"projection_dim": 32},
    "qwen2_5_vl": {
        "vision_config": {**_BY_PATCH, "window_size": 8, "fullatt_block_indexes": [1]},
        "text_config": _ON_AXES,
    },
    "qwen2_vl": {"vision_config": {**_BY_PATCH, "hidden_size": 32}, "text_config": _ON_AXES},
    "qwen3_5": {"vision_config": {**_BY_PATCH, "num_position_embeddings": 16}, "text_config": _DELTA},
    "qwen3_5_moe": {"vision_config": {**_BY_PATCH, "num_position_embeddings": 16}, "text_config": _DELTA},
    "qwen3_vl": {"vision_config": {**_BY_PATCH, **_STACKED}, "text_config": _ON_AXES},
    "qwen3_vl_moe": {"vision_config": {**_BY_PATCH, **_STACKED}, "text_config": _ON_AXES},
    "smolvlm": {},
}


def model_of(kind: str) -> Any:
    """A random float64 model of a type, with `PLACE` for pictures."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind]
    known = {
        *inspect.signature(config.__init__).parameters,
        *(x for c in config.__mro__ for x in vars(c).get("__annotations__", {})),
    }
    fields = copy.deepcopy(fields_of(config, kind))
    for name, value in OWN[kind].items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    if "text_config" in fields:
        fields["text_config"]["vocab_size"] = VOCABULARY
    for name in known & {"image_token_id", "image_token_index"}:
        fields[name] = PLACE
    fields |= dict.fromkeys(known & {"video_token_id"}, PLACE - 1)
    experts = {"experts_implementation": "eager"} if "moe" in kind else {}  # grouped products know no float64
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **fields), **experts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


def prompt(model: Any, seed: int) -> dict[str, Tensor]:
    """What a processor returns for a prompt: two words, a random picture, four words."""
    drawn = torch.Generator().manual_seed(seed)
    kind, sees = model.config.model_type, getattr(model.config, "vision_config", None)

    def pixels(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float64)

    given = {"pixel_values": pixels(1, 3, 28, 28)}
    takes = inspect.signature(model.forward).parameters
    if "image_grid_thw" in takes:  # two by two tokens of two by two patches each
        given = {"pixel_values": pixels(16, 24), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    elif "image_position_ids" in takes:
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        given = {"pixel_values": pixels(1, 16, 3 * sees.patch_size**2), "image_position_ids": places}
    elif "aspect_ratio_ids" in takes:
        given = {"pixel_values": pixels(1, 1, 4, 3, 28, 28), "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64)}
        given["aspect_ratio_mask"] = torch.tensor([[[1, 0, 0, 0]]])
    elif "spatial_shapes" in takes:
        given = {"pixel_values": pixels(1, 4, 3 * sees.patch_size**2), "spatial_shapes": torch.tensor([[2, 2]])}
        given["pixel_attention_mask"] = torch.ones(1, 4, dtype=torch.int64)
    elif "pixel_attention_mask" in takes:
        given = {"pixel_values": pixels(1, 1, 3, 28, 28)}
    elif kind == "llava_next":  # the picture, and the one part of it
        given = {"pixel_values": pixels(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}
    elif kind == "mistral3":
        given = {"pixel_values": pixels(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}
    ids = torch.tensor([[1, 2, *[PLACE] * _tokens(model, given), 3, 4, 5, 6]])
    given |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given | {name: (ids == PLACE).long() for name in ("token_type_ids", "mm_token_type_ids") if name in takes}


def _tokens(model: Any, given: dict[str, Tensor]) -> int:
    """In place of how many tokens a picture stands."""
    features = getattr(model.model, "get_image_features", None)
    if features is None:
        return 1
    takes = inspect.signature(features).parameters
    fields = {name: getattr(model.config, name) for name in takes if name.startswith("vision_feature")}
    with torch.no_grad():
        found = features(**{name: x for name, x in given.items() if name in takes}, **fields)
    found = getattr(found, "pooler_output", found)
    return sum(x.flatten(0, -2).shape[0] for x in (found if isinstance(found, (list, tuple)) else [found]))


def check(model: Any) -> None:
    """Makes pairs that differ in the picture, and compares the clean and the corrupted run with the model's own.

    Raises:
        InputError: the model does not take them.
    """
    import eap_circuits as eap

    sides = [prompt(model, seed) for seed in (1, 2)]
    with torch.no_grad():
        own = [model(**side).logits[0, -1] for side in sides]
    pairs = eap.image_pairs(model, *sides, [[3, 4]])
    scores = eap.attribute(model, pairs, method="eap")
    full, none = (eap.Circuit.from_mask(scores.graph, scores.graph.edge_mask & kept) for kept in (True, False))
    found = eap.evaluate(model, [full, none], pairs)
    for result, logits in zip(found, own, strict=True):
        if abs(result.mean - float(logits[3] - logits[4])) > 1e-5:
            raise eap.InputError(f"{type(model).__name__}: expected the model's own logits, found others.")
