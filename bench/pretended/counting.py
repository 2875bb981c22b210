"""What host code asks of the pretended device: kernels launched, and moments in which the host waits.

    with pretending(), counting() as counts:
        eap.attribute(model, data)
    print(counts.launches.total(), counts.waits.total(), counts.waits.most_common(5))
    print(counts.bytes, counts.seconds)         # predicted; see moved.py

A kernel is an operator on the device that is no view, allocates nothing alone, and has elements; some count more than
once (`_MORE`).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.pretended.graphs import indices, waits
from bench.pretended.library import attention_backward, attention_forward, rms_norm, rms_norm_backward
from bench.pretended.moved import LAUNCH, moved, seconds
from bench.pretended.tensors import Pretend, expanded, observers, replayed, tensors_of

Site = tuple[str, str]  # (operator or reason, file:line of the package)
_PACKAGES = ("eap_circuits", "eap_kernels")
_FREE = {"_unsafe_view", "_reshape_alias", "detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided",
         "new_empty", "new_empty_strided", "view_as", "resize_", "set_"}  # fmt: skip
_MORE = {"nonzero": 3, "_unique2": 8, "unique_dim": 10, "unique_consecutive": 6, "sort": 3, "topk": 2, "cumsum": 2,
         "attention_backward": 3, "masked_select": 4}  # fmt: skip
# Of what is done to many tensors at once: elements of a block, and blocks of a launch.
_BLOCK, _BLOCKS = 1 << 16, 320
_JOINED = 128  # tensors that `cat` joins in a launch
# Kernels that are no operators of torch's.
_WHOLE = (attention_forward, attention_backward, expanded, rms_norm, rms_norm_backward, replayed)


@dataclass
class Counts:
    """Kernels launched and waits, by operator or reason and by line of the package.

    What a model's own code does is of the line that called the model, with " (model)".
    """

    launches: Counter[Site] = field(default_factory=Counter)
    waits: Counter[Site] = field(default_factory=Counter)
    bytes: int = 0
    on_device: float = 0.0  # seconds

    @property
    def seconds(self) -> float:
        """Predicted: the host runs ahead of the device until it has to wait for it."""
        return max(self.on_device, self.launches.total() * LAUNCH)

    @property
    def own_waits(self) -> int:
        """Those that are not a model's own."""
        return sum(n for (_, site), n in self.waits.items() if not site.endswith("(model)"))


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """What runs inside, on the pretended device."""
    counts = Counts()

    def observe(event: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if event == "wait":
            counts.waits[func, _site()] += 1
        else:
            _count(counts, func, args, kwargs, out)

    observers.append(observe)
    try:
        yield counts
    finally:
        observers.remove(observe)


def _count(counts: Counts, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    whole = func in _WHOLE
    name = func.__name__ if whole else func._schema.name.split("::")[-1]
    given, made = tensors_of([*args, *kwargs.values()]), tensors_of([out])
    site = _site()
    for why in () if whole else waits(name, args, kwargs):
        counts.waits[why, site] += 1
    view = not whole and (func.is_view or name in _FREE)
    empty = func is not replayed and not any(x.numel() for x in made or given)
    if view or name in ("_local_scalar_dense", "is_nonzero") or empty:
        return
    masks = sum(isinstance(x, Pretend) and x.dtype == torch.bool for x in indices(name, args))
    launches = _MORE.get(name, 1)
    if name.startswith("_foreach"):
        launches = -(-sum(-(-x.numel() // _BLOCK) for x in tensors_of(args[:1])) // _BLOCKS)
    if name == "cat":
        launches = -(-sum(x.numel() > 0 for x in given) // _JOINED)
    counts.launches[name, site] += launches + 3 * masks
    size = moved(name, func, args, kwargs, out)
    counts.bytes += size
    counts.on_device += seconds(name, args, kwargs, out, size)


def _site() -> str:
    """file:line of the innermost frame of the packages; of a model's code, or "backward", if there is none."""
    frame: Any = sys._getframe(1)
    model = ""
    while frame is not None:
        package, file = _origin(frame.f_code.co_filename)
        if package in _PACKAGES:
            return f"{file}:{frame.f_lineno}" + (" (model)" if model else "")
        if package and not model:
            model = f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return f"{model} (model)" if model else "backward"


@functools.cache
def _origin(filename: str) -> tuple[str, str]:
    """The package that a file is of, if any that matters, and its path from there."""
    parts = Path(filename).parts
    for package in (*_PACKAGES, "transformers"):
        if package in parts[:-1]:
            return package, "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
    return "", ""
