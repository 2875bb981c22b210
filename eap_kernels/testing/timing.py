"""Times in alternation, in one process: the only figures that hold on a shared machine."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping

import torch

# On the pretended device of `make gpu-rehearsal` everything is small, and times mean nothing.
PRETENDED = bool(os.environ.get("EAP_PRETEND"))
Run = Callable[[], object]
# Larger than any GPU's L2 cache; written before each timed call, so that its operands come from memory.
FLUSHED_BYTES = (1 if PRETENDED else 256) * 2**20


@functools.cache
def _flushed(device: torch.device | str) -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)


def seconds(run: Run, count: int, device: torch.device | str) -> float:
    """Mean seconds of a call; on a GPU between events, with the L2 cache flushed before each call."""
    if torch.device(device).type == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for before, after in events:
        _flushed(device).zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return float(sum(before.elapsed_time(after) for before, after in events)) / 1e3 / count


def in_turns(
    runs: Mapping[str, Run],
    device: torch.device | str,
    rounds: int | None = None,
    min_seconds: float = 0.02,
    budget: float = 1.0,
) -> dict[str, float]:
    """Seconds per call of each run, in the order A B C C B A in one process. Noise only adds time, so minima count.

    Without `rounds`, it takes as many as fit in `budget` seconds, from 1 to 7.
    """
    once = {}
    for name, run in runs.items():
        once[name] = seconds(run, 1, device)
        # The first call also loads and allocates, and on a GPU it may compile. If it tells little, time another.
        if once[name] < min_seconds or torch.device(device).type != "cpu":
            once[name] = seconds(run, 1, device)
    most = 1 if PRETENDED else 100
    counts = {name: min(most, max(1, int(min_seconds / max(each, 1e-7)))) for name, each in once.items()}
    if PRETENDED:
        rounds = 1
    if rounds is None:
        rounds = min(7, max(1, int(budget / (2 * sum(counts[name] * once[name] for name in runs)))))
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name in (*runs, *reversed(list(runs))):
            best[name] = min(best[name], seconds(runs[name], counts[name], device))
    return best
