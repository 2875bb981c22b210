"""Checks of models whose experts are divided, for `runs.py`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM

from tests.circuits.checkpoint.calls import long_calls
from tests.circuits.ranks.parts import DATA, MAKES_COPIES, calls_of, checks, every_call, saved, wrong_numbers

if MAKES_COPIES:
    from transformers.distributed import DistributedConfig

DIVIDED = "mlp.experts.down_proj"


def load(path: str, ranks: int = 1, **plan: Any) -> Any:
    sizes = {"tp_size": ranks, "ep_size": ranks, **plan}
    parts = {"distributed_config": DistributedConfig(**sizes)} if ranks > 1 else {}
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", experts_implementation="eager", **parts).eval()


def expert_parallel() -> list[str]:
    """One process's results where each rank has some experts, and its heads or, if these do not divide, all of them."""
    whole = {f"model.layers.*.self_attn.{name}_proj": "replicate" for name in "qkvo"}
    with tempfile.TemporaryDirectory() as folder:
        heads = saved("mixtral", folder, num_local_experts=4)
        uneven = saved("qwen3-moe", folder, num_experts=4, num_key_value_heads=3)

        def calls(model: Any) -> dict[str, Callable[..., Any]]:
            every = every_call(os.path.join(folder, "run.safetensors"), model)
            return {**calls_of(model), **{name: every[name] for name in ("eap", "exact", "learn_mask")}}

        return [
            *wrong_numbers(heads, 2, calls, load, DIVIDED),
            *wrong_numbers(uneven, 2, calls_of, partial(load, tp_plan=whole), DIVIDED),
        ]


def experts_exchanged() -> list[str]:
    """One process's results where ranks that run other batches send each other tokens, as they share experts: with two
    copies of the experts, and in teams that share heads."""

    def calls(model: Any) -> dict[str, Callable[..., Any]]:
        every = long_calls(model, DATA)
        return {**calls_of(model), **{name: every[name] for name in ("eap", "exact", "evaluate-mean")}}

    with tempfile.TemporaryDirectory() as folder:
        path = saved("mixtral", folder, num_local_experts=4)
        return [
            *wrong_numbers(path, 4, calls, partial(load, tp_size=1, fsdp_size=4, ep_size=2), DIVIDED),
            *wrong_numbers(path, 4, calls, partial(load, tp_size=2, fsdp_size=2), DIVIDED),
        ]


CHECKS = checks(expert_parallel, experts_exchanged, later=True)
