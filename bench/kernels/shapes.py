"""The models on whose shapes operators are measured, their operands, and how many tokens a machine gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measure import DEVICE, PRETENDED
from eap_kernels import testing

# fp16 is not measured: its range does not suit gradients, and processors compute it at a hundredth of the speed.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BACKENDS = tuple(impl for impl, device in testing.backends_on_devices() if device == DEVICE)
# What is run. On a GPU `auto` is one of the backends, by a table written from these very runs.
IMPLS = BACKENDS if DEVICE == "cuda" else ("auto", *BACKENDS)
LAYOUTS = ("contiguous", "tokens_first")


def best(seconds: Mapping[str, float], suffix: str = "") -> float:
    """The fastest backend's time."""
    return min(seconds[impl + suffix] for impl in BACKENDS)


def auto(seconds: Mapping[str, float], suffix: str = "") -> float:
    """The time of the backend that `auto` takes; on a GPU, of the fastest one."""
    return seconds.get(f"auto{suffix}", best(seconds, suffix))


class Model(NamedTuple):
    """Layers, heads, key/value heads, d_model, head dimension, and whether attention and MLP read the same residual."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    head_dim: int
    parallel: bool = False

    def groups(self) -> Iterator[tuple[int, int]]:
        """(reach, receivers) of every q, k, v and m and of the logits, in the order of the receivers."""
        for layer in range(self.layers):
            seen = 1 + layer * (self.heads + 1)
            for count in (self.heads, self.kv_heads, self.kv_heads):
                yield seen, count
            yield (seen if self.parallel else seen + self.heads), 1
        yield self.senders, 1

    @property
    def senders(self) -> int:
        return 1 + self.layers * (self.heads + 1)

    @property
    def reach(self) -> Tensor:
        """int64 [R]."""
        return torch.tensor([reach for reach, count in self.groups() for _ in range(count)])

    @property
    def receivers(self) -> int:
        return sum(count for _, count in self.groups())

    @property
    def layer_receivers(self) -> int:
        return self.heads + 2 * self.kv_heads + 1

    def flops(self, tokens: int) -> float:
        """The useful operations: those of the staircase."""
        return 2.0 * sum(reach * count for reach, count in self.groups()) * tokens * self.width


MODELS = {
    "gpt2": Model(12, 12, 12, 768, 64),
    "qwen2.5-0.5b": Model(24, 14, 2, 896, 64),
    "pythia-2.8b": Model(32, 32, 32, 2560, 80, parallel=True),
    "gemma-2-2b": Model(26, 8, 4, 2304, 256),
    "llama-3.1-8b": Model(32, 32, 8, 4096, 128),
}
if PRETENDED:
    MODELS = {name: model._replace(layers=2) for name, model in MODELS.items()}


# bf16 matters on GPUs; on a CPU one model stands for all. On a GPU two shapes come first, in bf16: time is short.
CASES = [
    (model, dtype) for model in MODELS for dtype in DTYPES if DEVICE == "cuda" or dtype == "float32" or model == "gpt2"
]
if DEVICE == "cuda":
    CASES.sort(key=lambda case: (case[0] not in ("llama-3.1-8b", "gpt2"), -MODELS[case[0]].width, case[1]))


def tokens_for(rows: int, width: int, dtype: torch.dtype, cpu_bytes: int = 2**26) -> int:
    """The tokens whose operands, with this many rows, fill 64 MiB on a CPU or 8 GiB on a GPU: even, 2 to 2048."""
    if PRETENDED:
        return 2
    room = cpu_bytes if DEVICE == "cpu" else min(2**33, torch.cuda.get_device_properties(0).total_memory // 5)
    return min(2048, max(2, room // (rows * width * dtype.itemsize) // 2 * 2))


def normal(rows: int, tokens: int, width: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Normal values [rows, tokens, width], made on the device in one of LAYOUTS."""
    if layout == "tokens_first":
        return torch.randn(tokens, rows, width, device=DEVICE, dtype=dtype).transpose(0, 1)
    return torch.randn(rows, tokens, width, device=DEVICE, dtype=dtype)
