"""What every bench measures with: times in turns, peak memory, the rates of the machine, and its name."""

from __future__ import annotations

import functools
import gc
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from eap_kernels.info import processor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On the pretended device of `make gpu-rehearsal` nothing is large, and what is timed means nothing.
PRETENDED = bool(os.environ.get("EAP_PRETEND"))
Run = Callable[[], object]
# Seconds for all rounds of a bench, and how often a ratio under its bar is measured again: a GPU is nobody else's.
BUDGET, TRIES = (3.0, 3) if DEVICE == "cpu" else (0.0 if PRETENDED else 1.0, 1)
# More than any GPU's L2 cache: written before each timed call, so that its operands come from memory.
FLUSHED_BYTES = (1 if PRETENDED else 256) * 2**20


@functools.cache
def _flushed() -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")


def seconds(run: Run, count: int, device: str = DEVICE) -> float:
    """Mean time of a call; on a GPU between events, with its L2 cache flushed before each call."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in events:
        _flushed().zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return sum(before.elapsed_time(after) for before, after in events) / 1e3 / count


def in_turns(
    runs: Mapping[str, Run],
    rounds: int | None = None,
    min_seconds: float = 0.02,
    budget: float = BUDGET,
    device: str = DEVICE,
) -> dict[str, float]:
    """Seconds a call of each run: A B C C B A in one process; noise only ever adds time, so minima count.

    Without `rounds`, as many as fit in `budget` seconds, at least 2 and at most 7.
    """
    once = {}
    for name, run in runs.items():
        once[name] = seconds(run, 1, device)
        # The first call also loads and allocates, and on a GPU it may compile: where it tells little, ask again.
        if once[name] < min_seconds or device != "cpu":
            once[name] = seconds(run, 1, device)
    most = 1 if PRETENDED else 100
    counts = {name: min(most, max(1, int(min_seconds / max(each, 1e-7)))) for name, each in once.items()}
    if PRETENDED:
        rounds = 1
    if rounds is None:
        rounds = min(7, max(2, int(budget / (2 * sum(counts[name] * once[name] for name in runs)))))
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name in (*runs, *reversed(runs)):
            best[name] = min(best[name], seconds(runs[name], counts[name], device))
    return best


def matmul(dtype: torch.dtype) -> tuple[Run, float]:
    """A square matrix product in this dtype, and its floating-point operations: the machine's matrix rate."""
    n = 128 if PRETENDED else 8192 if DEVICE == "cuda" else 2048
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * n**3


def copy(size: int) -> tuple[Run, float]:
    """A copy, and the bytes it reads and writes, `size` in all: the bandwidth at a problem's own size."""
    source = torch.ones(max(1, size // 2), dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), 2.0 * source.numel()


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at their highest since that was last reset."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def peak_bytes(run: Run) -> int:
    """The most memory that a run takes above what is there before it. On a CPU only a fresh process can say."""
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
    """What a job returns in a process of its own, with these environment variables."""
    with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(job, *arguments).result()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, object]:
    """The processor, and the GPU where there is one."""
    facts: dict[str, object] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }
    if DEVICE == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        capability = "{}.{}".format(*torch.cuda.get_device_capability())
        facts |= {"gpu": torch.cuda.get_device_name(), "capability": capability, "driver": driver.splitlines()[0]}
    return facts


def versions() -> dict[str, str]:
    """Of everything that can move a ratio."""
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
    """A machine's name as a folder: its GPU, else its processor and cores."""
    name = str(facts.get("gpu") or f"{facts['processor']} {facts['cores']} cores")
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
