"""The child that `choices` starts: it checks and times backends, and dies if one of them is wrong.

Test code and benches use the same checks, shapes and timing (`eap_kernels.testing`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TextIO

import torch

import eap_kernels as ek
from eap_kernels import _auto
from eap_kernels._registry import BACKENDS
from eap_kernels.testing import odd_shapes, shapes, timing

# Elements that a call reads or writes: each size that is timed stands for all up to it, the last for larger ones, too.
SIZES = {"cpu": (2**20, 2**24), "cuda": (2**18,) if timing.PRETENDED else (2**22, 2**25, 2**28)}
MODELS = {"cpu": ("gpt2",), "cuda": ("gpt2", "llama-3.1-8b")}
# On CPUs `auto` has a measured rule for the other operators.
OPERATORS = {"cpu": ("edge_scores", "head_space_scores"), "cuda": tuple(odd_shapes.CHECKS)}
# Operators whose sums are long enough to be cut into runs.
LONG = ("edge_scores", "head_space_scores")
# Where the reference takes less, there is nothing to gain.
LEAST_SECONDS = 1e-3
# Seconds in which a case is timed.
BUDGET = 0.2
Runs = Callable[[str], object]
Say = Callable[..., None]


def run(request: Mapping[str, Any], pipe: TextIO) -> None:
    """Check and time what is asked for; `choices` reads what this writes, a JSON list a line.

    ["trying", op, impl] comes before each step, with nulls for all operators or no backend. A step at which the process
    is lost, or that is ["wrong", reason], is that backend's failure; ["unable", reason] is nobody's. Results are
    ["verified", op, impl], ["seconds", op, case, size, times] and ["done"].
    """

    def say(*words: object) -> None:
        pipe.write(json.dumps(words) + "\n")
        pipe.flush()

    os.environ["EAP_TUNE"] = "0"
    torch.manual_seed(0)
    try:
        device = torch.device(request["device"])
        say("trying", None, None)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.ones(1, device=device).sum().item()
        able = _able(request, device, say)
        _verify(request, able, device, say)
        _time(request, able, device, say)
    except torch.OutOfMemoryError as error:
        say("unable", f"too little memory is free: {_line(error)}")
    except Exception as error:
        say("wrong", f"{type(error).__name__}: {_line(error)}")
    else:
        say("done")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:300]


def _able(request: Mapping[str, Any], device: torch.device, say: Say) -> dict[str, list[str]]:
    """The backends that can run each operator and have not failed at it, the reference first."""
    failed, able = request["failed"], dict[str, list[str]]()
    for impl, backend in BACKENDS.items():
        ops = [op for op in OPERATORS[device.type] if impl not in failed.get(op, {})]
        say("trying", None, impl)
        if ops and backend.device in (None, device.type) and backend.missing() is None:
            for op in ops:
                able.setdefault(op, []).append(impl)
    say("trying", None, None)
    return able


def _verify(request: Mapping[str, Any], able: Mapping[str, Sequence[str]], device: torch.device, say: Say) -> None:
    for op, impls in able.items():
        for impl in impls:
            if impl in request["verified"].get(op, ()):
                continue
            generator = torch.Generator().manual_seed(0)
            for layout in shapes.LAYOUTS:
                for shape in (*odd_shapes.SHAPES, *((odd_shapes.LONG,) if op in LONG else ())):
                    say("trying", op, impl)
                    odd_shapes.CHECKS[op](impl, str(device), shape, request["arithmetic"], layout, generator)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
            say("verified", op, impl)


def _time(request: Mapping[str, Any], able: Mapping[str, Sequence[str]], device: torch.device, say: Say) -> None:
    with odd_shapes.arithmetic(request["arithmetic"]) as dtype:
        for op, cases in CASES.items():
            for size in SIZES[device.type] if op in able else ():
                done = [case for case, sizes in request["seconds"].get(op, {}).items() if str(size) in sizes]
                times: dict[str, list[dict[str, float]]] = {}
                try:
                    for model in MODELS[device.type]:
                        for case, run in cases(shapes.MODELS[model], size, request["arithmetic"], dtype, device):
                            if case not in done:
                                times.setdefault(case, []).append(_in_turns(op, run, able[op], device, say))
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                for case, each in times.items():
                    say("seconds", op, case, size, _mean(each))


def _in_turns(op: str, run: Runs, impls: Sequence[str], device: torch.device, say: Say) -> dict[str, float]:
    last = None

    def one(impl: str) -> None:
        nonlocal last
        if impl != last:
            say("trying", op, impl)
            last = impl
        run(impl)

    runs = {impl: partial(one, impl) for impl in impls}
    first = {"reference": runs["reference"]}
    alone = timing.in_turns(first, device, rounds=1, min_seconds=0.0)
    worth = alone["reference"] >= LEAST_SECONDS and len(impls) > 1
    times = timing.in_turns(runs, device, budget=BUDGET) if worth else alone
    say("trying", None, None)
    return times


def _mean(times: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Geometric means over the models on which it was worth timing more than the reference, if any."""
    times = [each for each in times if len(each) > 1] or times
    everywhere = [impl for impl in times[0] if all(impl in each for each in times)]
    return {impl: math.prod(each[impl] for each in times) ** (1 / len(times)) for impl in everywhere}


Cases = Iterator[tuple[str, Runs]]


def _edge_scores(model: shapes.Model, size: int, arithmetic: str, dtype: torch.dtype, device: torch.device) -> Cases:
    for receivers in (*_auto.FEW_RECEIVERS, model.receivers):
        reach = model.reach if receivers == model.receivers else torch.full((receivers,), model.senders)
        tokens = size // ((model.senders + receivers) * model.width)
        for layout in shapes.LAYOUTS if tokens else ():
            rows = model.senders, receivers
            delta, grad = (shapes.normal(n, tokens, model.width, dtype, layout, device=device) for n in rows)
            case = _auto.edge_scores_case(arithmetic, layout == "contiguous", receivers)
            yield case, lambda impl, d=delta, g=grad, r=reach: ek.edge_scores(d, g, r, impl=impl)  # type: ignore[misc]


def _masked_read(model: shapes.Model, size: int, arithmetic: str, dtype: torch.dtype, device: torch.device) -> Cases:
    receivers = model.layer_receivers
    tokens = size // ((model.senders + receivers) * model.width)
    if not tokens:
        return
    delta = shapes.normal(model.senders, tokens, model.width, dtype, device=device)
    draw = torch.rand(model.senders, receivers, device=device)
    for share in _auto.SHARES:
        mask = draw < share / 2
        case = _auto.masked_read_case(arithmetic, share)
        yield case, lambda impl, m=mask: ek.masked_read(delta[0], delta, m, impl=impl)  # type: ignore[misc]


def _head_space_scores(
    model: shapes.Model, size: int, arithmetic: str, dtype: torch.dtype, device: torch.device
) -> Cases:
    """A few layers in one size, as calls have a model's layers at once and all tokens of a batch."""
    if size == SIZES[device.type][-1]:
        few = model._replace(layers=4)
        tokens = max(1, size // ((few.senders + few.receivers) * few.width))
        given = shapes.head_space(few, tokens, dtype, device)
        yield _auto.head_space_scores_case(arithmetic), lambda impl: ek.head_space_scores(*given, impl=impl)


CASES: dict[str, Callable[[shapes.Model, int, str, torch.dtype, torch.device], Cases]] = {
    "edge_scores": _edge_scores,
    "masked_read": _masked_read,
    "head_space_scores": _head_space_scores,
}
