"""Tiny random models of the supported families, and random prompt pairs; everything offline."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from eap_circuits.tasks import PairedDataset

VOCABULARY = 59
_WIDE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_positions=48,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "llama": LlamaConfig(**_WIDE, num_key_value_heads=2),
    "llama-mqa-bias": LlamaConfig(**_WIDE, num_key_value_heads=1, attention_bias=True, head_dim=6),
    "mistral-window": MistralConfig(**_WIDE, num_key_value_heads=3, sliding_window=4),
    "qwen2": Qwen2Config(**_WIDE, num_key_value_heads=6),
}
FAMILIES = sorted(CONFIGS)


def tiny_model(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A random model whose every weight matters: gains and biases too are away from 1 and 0."""
    torch.manual_seed(FAMILIES.index(name))
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
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


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_model() -> Any:
    return tiny_model


@pytest.fixture
def make_pairs() -> Any:
    return random_pairs


@pytest.fixture
def relative() -> Any:
    """Relative error of a tensor in the Frobenius norm."""

    def error(found: torch.Tensor, right: torch.Tensor) -> float:
        return float((found.double() - right.double()).norm() / right.double().norm())

    return error
