"""The models on whose shapes operators are measured, their operands, and how many tokens a machine gets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from bench.measure import DEVICE, PRETENDED
from eap_kernels import testing
from eap_kernels._schemas import tf32
from eap_kernels.testing import shapes
from eap_kernels.testing.shapes import LAYOUTS as LAYOUTS
from eap_kernels.testing.shapes import MODELS
from eap_kernels.testing.shapes import Model as Model

# fp16 is not measured: its range does not suit gradients, and processors compute it at a hundredth of the speed.
# On a GPU fp32 has a second arithmetic, in which a bench runs if its name says so (bench/conftest.py).
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
if DEVICE == "cuda":
    DTYPES["tf32"] = torch.float32
BACKENDS = tuple(impl for impl, device in testing.backends_on_devices() if device == DEVICE)
# What is run. On a GPU `auto` is one of the backends, by a table written from these very runs.
IMPLS = BACKENDS if DEVICE == "cuda" else ("auto", *BACKENDS)
normal = partial(shapes.normal, device=DEVICE)


def eps(dtype: torch.dtype) -> float | None:
    """For `testing.assert_close`."""
    return testing.TF32_EPS if dtype == torch.float32 and tf32() else None


def best(seconds: Mapping[str, float], suffix: str = "") -> float:
    """The fastest backend's time."""
    return min(seconds[impl + suffix] for impl in BACKENDS)


def auto(seconds: Mapping[str, float], suffix: str = "") -> float:
    """The time of the backend that `auto` takes; on a GPU, of the fastest one."""
    return seconds.get(f"auto{suffix}", best(seconds, suffix))


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
