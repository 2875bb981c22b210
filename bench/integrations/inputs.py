"""The model that both codebases run, with random weights, and its prompts of random tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import measure

TINY, SMALL = "tiny", "gpt2-small"
SHAPES = {
    TINY: {"n_layers": 2, "d_model": 24, "n_heads": 3, "d_head": 8, "d_mlp": 64, "d_vocab": 61},
    SMALL: {"n_layers": 12, "d_model": 768, "n_heads": 12, "d_head": 64, "d_mlp": 3072, "d_vocab": 50257},
}
# Prompts per batch, and in all.
PROMPTS = {TINY: (4, 8), SMALL: (4, 4)}
POSITIONS, STEPS = 16, 3
Runs = dict[str, Callable[[], Tensor]]


def random_model(shape: str):
    """A HookedTransformer with random weights, in the configuration that both packages ask for."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        **SHAPES[shape],
        n_ctx=64,
        act_fn="gelu_new",
        normalization_type="LN",
        seed=0,
        device=measure.DEVICE,
        use_attn_result=True,
        use_split_qkv_input=True,
        use_attn_in=True,
        use_hook_mlp_in=True,
    )
    return HookedTransformer(config).eval()


def prompts(shape: str) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and corrupted token ids, differing in two places, and the ids of a right and a wrong answer."""
    generator = torch.Generator().manual_seed(0)
    _, count = PROMPTS[shape]

    def ids(*size: int) -> Tensor:
        return torch.randint(1, SHAPES[shape]["d_vocab"], size, generator=generator)

    clean = ids(count, POSITIONS)
    corrupted = clean.clone()
    corrupted[:, 5:7] = ids(count, 2)
    return clean, corrupted, ids(count, 2)
