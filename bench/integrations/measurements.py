"""Published against patched: scores, time and peak memory, each in its own process."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from bench import measure
from bench.integrations.auto_circuit import AutoCircuit
from bench.integrations.eap_ig import EapIg
from bench.integrations.inputs import SMALL

PUBLISHED, PATCHED = "published", "patched"


# A codebase at the shape of this name.
Make = Callable[[str], EapIg | AutoCircuit]


def _running(package: EapIg | AutoCircuit, how: str) -> AbstractContextManager[None]:
    return package.patch() if how == PATCHED else nullcontext()


def scores(make: Make, shape: str) -> dict[str, float]:
    """The largest difference of each run's scores, relative to the largest score."""
    package, found = make(shape), {}
    for name, run in package.runs().items():
        published = run().cpu()
        with package.patch():
            patched = run().cpu()
        found[name] = float((patched - published).abs().max() / published.abs().max())
    return found


def times(make: Make, rounds: int) -> dict[str, dict]:
    """For each run, medians of a call's seconds, in all and in replaced functions, and of the rounds' ratios."""
    package, rows = make(SMALL), {}
    for name, run in package.runs().items():
        taken: dict[str, list[list[float]]] = {PUBLISHED: [], PATCHED: []}
        for how in (PUBLISHED, PATCHED, PATCHED, PUBLISHED) * rounds:
            with _running(package, how), package.stopwatch() as inside:
                start = time.perf_counter()
                run().cpu()
                taken[how].append([time.perf_counter() - start, *inside])
        # [rounds, parts]
        seconds = {how: torch.tensor(x).unflatten(0, (rounds, 2)).mean(1) for how, x in taken.items()}
        rows[name] = {
            "ratios": _medians(seconds[PUBLISHED] / seconds[PATCHED]),
            "seconds": {how: _medians(found) for how, found in seconds.items()},
        }
    return rows


def _medians(rounds: Tensor) -> dict[str, float]:
    return dict(zip(("time", "replaced"), rounds.median(0).values.tolist(), strict=False))


def memory(make: Make, name: str, how: str) -> int:
    """The peak bytes of a run above what was there before it."""
    package = make(SMALL)
    with _running(package, how):
        return measure.peak_bytes(package.runs()[name])
