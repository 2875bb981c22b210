"""Published against patched: scores, time and peak memory, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time

import torch
from torch import Tensor

from bench import measure, record
from bench.integrations.auto_circuit import AutoCircuit
from bench.integrations.eap_ig import EapIg
from bench.integrations.inputs import SMALL

PACKAGES = {"EAP-IG": EapIg, "auto-circuit": AutoCircuit}


def difference(published: Tensor, patched: Tensor) -> float:
    """The largest one, relative to the largest score."""
    return float((patched - published).abs().max() / published.abs().max())


def scores(package: EapIg | AutoCircuit) -> dict[str, float]:
    """How much the scores of each run differ."""
    found = {}
    for name, run in package.runs().items():
        published = run().cpu()
        with package.patch():
            found[name] = difference(published, run().cpu())
    return found


def times(package: EapIg | AutoCircuit, rounds: int) -> dict[str, dict]:
    """Per run: medians of the seconds of a call, whole and in what is replaced, and of the ratios of rounds."""
    rows = {}
    for name, run in package.runs().items():
        taken: dict[str, list[list[float]]] = {"published": [], "patched": []}
        for how in ("published", "patched", "patched", "published") * rounds:
            with package.patch() if how == "patched" else contextlib.nullcontext(), package.stopwatch() as inside:
                start = time.perf_counter()
                run().cpu()
                taken[how].append([time.perf_counter() - start, *inside])
        # [rounds, parts]
        published, patched = (torch.tensor(x).unflatten(0, (rounds, 2)).mean(1) for x in taken.values())
        parts = ("time", "replaced")[: published.shape[1]]
        row = rows.setdefault(name, {"ratios": _medians(parts, published / patched)})
        row["seconds"] = {"published": _medians(parts, published), "patched": _medians(parts, patched)}
    return rows


def _medians(parts: tuple[str, ...], rounds: Tensor) -> dict[str, float]:
    return dict(zip(parts, rounds.median(0).values.tolist(), strict=True))


def worker(job: str, kind: str, path: str, *arguments: str) -> object:
    if job == "scores":
        return scores(PACKAGES[kind](path, *arguments))
    package = PACKAGES[kind](path, SMALL)
    if job == "times":
        return times(package, int(arguments[0]))
    name, how = arguments
    with package.patch() if how == "patched" else contextlib.nullcontext():
        return measure.peak_bytes(package.runs()[name])


def in_fresh_process(*arguments: str) -> object:
    command = [sys.executable, "-m", "bench.integrations", "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
