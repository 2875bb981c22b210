"""Any allocation of a run fails, once or from then on: the result is right, or one sentence says so."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eap_circuits as eap

from .common import Tally, circuit, circuits, difference, model, pairs, scores

ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError,
    lambda: RuntimeError("std::bad_alloc"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: x"),
)


class Failing(TorchDispatchMode):
    """Counts the operators that make tensors; the n-th one raises, and with `lasting` all after it."""

    def __init__(self, at: int | None = None, error: Callable[[], Exception] = MemoryError, lasting: bool = False):
        super().__init__()
        self.made, self._at, self._error, self._lasting = 0, at, error, lasting

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and not func._schema.is_mutable:
            self.made += 1
            if self._at is not None and (self.made == self._at or (self._lasting and self.made > self._at)):
                raise self._error()
        return func(*args, **(kwargs or {}))


CALLS: dict[str, Callable[[], Any]] = {
    "attribute": lambda: eap.attribute(model(), pairs(), steps=2),
    "attribute, keep": lambda: eap.attribute(model(), pairs(), method="eap", keep=("examples", "neurons")),
    "attribute, activations": lambda: eap.attribute(model(), pairs(), method="eap-ig-activations", steps=1),
    "attribute, exact": lambda: eap.attribute(model(), pairs(), method="exact", edges=circuit()),
    "attribute, query heads": lambda: eap.attribute(model(), pairs(), method="eap", heads="query"),
    "evaluate": lambda: eap.evaluate(model(), circuits(), pairs()),
    "evaluate, mean": lambda: eap.evaluate(model(), circuit(), pairs(), ablation="mean"),
    "faithfulness_curve": lambda: eap.faithfulness_curve(model(), scores(), pairs(), (0.1, 0.5)),
}


def ours(error: BaseException) -> bool:
    """A sentence of ours, or torch's own error of this kind, which callers know."""
    return isinstance(error, (eap.InputError, torch.OutOfMemoryError))


def fuzz(tally: Tally, rng: random.Random, count: int) -> None:
    right = {label: call() for label, call in CALLS.items()}
    made = {}
    for label, call in CALLS.items():
        with Failing() as counter:
            call()
        made[label] = counter.made
    for number in range(count):
        label, error = rng.choice(list(CALLS)), rng.choice(ERRORS)
        at, lasting = rng.randint(1, made[label]), rng.random() < 0.25

        def failing(label: str = label, at: int = at, error: Any = error, lasting: bool = lasting) -> Any:
            with Failing(at, error, lasting):
                return CALLS[label]()

        kind = f"{'all from' if lasting else 'only'} {at} of {made[label]}, {error()!r:.40}"
        tally.run(
            f"{number} {label}, {kind}", failing, lambda found, label=label: difference(found, right[label]), ours
        )
