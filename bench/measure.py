"""What every bench measures with: times in alternation, peak memory, the machine's rates and name."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from eap_kernels.info import instruction_set, processor
from eap_kernels.testing import timing
from eap_kernels.testing.timing import PRETENDED, Run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Seconds for all rounds of a bench, and how often a ratio below its bar is measured again; nobody shares the GPU.
BUDGET, TRIES = (3.0, 3) if DEVICE == "cpu" else (0.0 if PRETENDED else 1.0, 1)

in_turns = partial(timing.in_turns, device=DEVICE, budget=BUDGET)


def matmul(dtype: torch.dtype) -> tuple[Run, float]:
    """A square matrix product in this dtype and its number of operations, for the machine's matrix rate.

    In fp32 on a CPU that has no products in low precision: the library emulates them at a hundredth of the rate.
    """
    if DEVICE == "cpu" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtype = torch.float32
    n = 128 if PRETENDED else 8192 if DEVICE == "cuda" else 2048
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * n**3


def copy(size: int) -> tuple[Run, float]:
    """A copy and the bytes that it reads and writes, `size` in all, for the bandwidth at a problem's own size."""
    source = torch.ones(max(1, size // 2), dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2.0 * source.numel()


def resident(field: str) -> int:
    """Resident bytes of this process: VmRSS is now, VmHWM the peak since the last reset."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_bytes(run: Run) -> int:
    """The peak memory of a run above what was there before it. On a CPU only a fresh process can tell."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before = resident("VmRSS")
    run()
    return max(0, resident("VmHWM") - before)


def in_fresh_process(job: Callable[..., Any], *arguments: object, **environment: str) -> Any:
    """Run a job in its own process, with these environment variables, and return its result."""
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(job, *arguments).result()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, object]:
    """The processor, and the GPU if there is one."""
    facts: dict[str, object] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "instruction_set": instruction_set(),
    }
    if DEVICE == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        facts |= {"gpu": torch.cuda.get_device_name(), "capability": capability, "driver": driver.splitlines()[0]}
    return facts


def versions() -> dict[str, str]:
    """The versions of everything that can change a ratio."""
    from importlib.metadata import version

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers")}
    if DEVICE == "cuda":
        nvcc = re.search(r"release ([\d.]+)", _output("nvcc", "--version"))
        found |= {"triton": version("triton"), "cuda": str(torch.version.cuda), "nvcc": nvcc[1] if nvcc else "unknown"}
    return found


def state() -> str:
    """The GPU's clocks, temperature and power, in one line."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw,pstate"
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()[0]


def slug(facts: Mapping[str, object]) -> str:
    """A machine's name as a folder: its GPU, else its processor, instruction set and cores."""
    name = str(facts.get("gpu") or "{processor} {instruction_set} {cores} cores".format(**facts))
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
