"""Tiny random models of the supported families, and random prompt pairs; everything offline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM

from eap_circuits.forward import borrowed
from eap_circuits.graph import Circuit, Graph
from eap_circuits.tasks import PairedDataset
from eap_kernels.testing import relative_error
from tests.circuits.untouched import differences, process_state, snapshot

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
_HYBRID = {**_GROUPED, "num_hidden_layers": 2}
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
# Of older transformers: what the model itself cannot do that tests need.
SINCE = {
    "ministral3": ("5.4", "its attention heeds the positions that it is given"),
    "mpt": ("5.2", "its mask fits float64"),
    "stablelm": ("5.2", "its cache and its mask are of one size"),
    "stablelm-parallel": ("5.2", "its cache and its mask are of one size"),
}
# One of each way in which families differ, for what does not depend on the modules' names.
KINDS = ["falcon", "gemma2", "gpt2", "gpt-neox", "llama", "mistral-window", "olmo2", "qwen3-moe"]


def need_transformers(name: str) -> None:
    """Skip where the transformers that is there cannot do what a test needs of a family."""
    since, reason = SINCE.get(name, ("0", ""))
    if Version(transformers.__version__) < Version(since):
        pytest.skip(f"{name}: only since transformers {since} {reason}")


def tiny_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A random model whose every weight matters: gains and biases too are away from 1 and 0."""
    need_transformers(name)
    every = {**CONFIGS, **MIXERS}
    torch.manual_seed(list(every).index(name))
    kind, fields = every[name]
    if any("experts" in name for name in fields):  # grouped products of experts know no float64
        settings = {"experts_implementation": "eager", **settings}
    if "attn_logit_softcapping" in fields:  # which transformers 5.17 forgets in the attention that it takes by itself
        settings = {"attn_implementation": "eager", **settings}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **copy.deepcopy(fields)), **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def random_pairs(seed: int = 0, n: int = 7, longest: int = 11) -> PairedDataset:
    """Pairs of several lengths whose first difference lies anywhere, one pair without any."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    clean = integers(0, VOCABULARY, n, longest)
    lengths = integers(4, longest + 1, n)
    corrupted = clean.clone()
    for row in range(n - 1):
        first = int(integers(0, int(lengths[row]), 1))
        corrupted[row, first] = (clean[row, first] + 1) % VOCABULARY
        if row % 2:
            corrupted[row, -1] = (clean[row, -1] + 5) % VOCABULARY
    good = integers(0, VOCABULARY, n)
    return PairedDataset.from_tokens(clean, corrupted, lengths, torch.stack([good, (good + 3) % VOCABULARY], 1))


def prompts(data: PairedDataset, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair's clean and corrupted prompt without padding, [T] each."""
    lengths = data.lengths if data.corrupted_lengths is None else data.corrupted_lengths
    return data.clean[e, : int(data.lengths[e])], data.corrupted[e, : int(lengths[e])]


def logit_difference(logits: torch.Tensor, data: PairedDataset, e: int) -> torch.Tensor:
    """Of logits [V]."""
    return logits[data.answers[e, 0]] - logits[data.answers[e, 1]]


def loss_of(data: PairedDataset, e: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits [V] -> minus the logit difference."""
    return lambda logits: -logit_difference(logits, data, e)


def random_circuit(graph: Graph, seed: int, share: float) -> Circuit:
    """About this share of the edges, except for those on no path from `input` to `logits`."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(graph.n_senders, graph.n_receivers, generator=generator) < share
    return Circuit(graph, mask & graph.edge_mask).pruned()


def random_edges(graph: Graph, n: int, seed: int = 1) -> list[tuple[int, int]]:
    """Some (u, v), each once."""
    edges = graph.edge_mask.nonzero()
    chosen = torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed))[:n]
    return [(u, v) for u, v in edges[chosen].tolist()]


def groups_of(graph: Graph) -> list[list[int]]:
    """The senders that move together: the input, and each layer's heads and MLP, found by their names."""
    groups: dict[str, list[int]] = {}
    for u, name in enumerate(graph.senders):
        groups.setdefault(name.split(".")[0], []).append(u)
    return list(groups.values())


def circuit_of(graph: Graph, edges: list[tuple[int, int]]) -> Circuit:
    mask = torch.zeros_like(graph.edge_mask)
    mask[tuple(zip(*edges))] = True
    return Circuit(graph, mask)


@pytest.fixture(autouse=True)
def all_comes_back() -> Iterator[None]:
    """Whatever a test does: what it has borrowed is afterwards as it was, and so is the process."""
    enter, leave, before = borrowed.__enter__, borrowed.__exit__, {}

    def entered(loan: Any) -> Any:
        before[loan] = snapshot(loan._model), process_state()
        return enter(loan)

    def left(loan: Any, *error: object) -> None:
        leave(loan, *error)
        model, process = before.pop(loan)
        if isinstance(error[1], KeyboardInterrupt):  # which `gives_back` clears up after
            return
        assert not differences(model, snapshot(loan._model))
        assert not differences(process, process_state())

    process = process_state()
    # Its own, which is undone after the test's.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(borrowed, "__enter__", entered)
        patch.setattr(borrowed, "__exit__", left)
        yield
    assert not differences(process, process_state())


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model_types() -> list[str]:
    return [model_type for model_type, _ in (*CONFIGS.values(), *MIXERS.values())]


@pytest.fixture
def make_model() -> Any:
    return tiny_model


@pytest.fixture
def make_pairs() -> Any:
    return random_pairs


@pytest.fixture
def relative() -> Any:
    return relative_error
