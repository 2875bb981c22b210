"""What a kernel of the pretended device would move and compute, and the time predicted from that.

A kernel reads each operand and writes each result once, expanded operands by what is in memory, gathers by what they
gather; no cache helps. It takes as long as memory or the units take, whichever is slower. Compare ratios, not seconds.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.pretended.tensors import Pretend, tensors_of, written

# Of one H100: bytes a second, operations a second by dtype (as tensor cores were measured; else by its data sheet), and
# the host's seconds for a launch.
BANDWIDTH, LAUNCH = 3.0e12, 4e-6
_RATE = {torch.bfloat16: 798e12, torch.float16: 798e12, torch.float32: 67e12, torch.float64: 67e12}
_WRITTEN_ONLY = ("copy_", "_foreach_copy_", "zero_", "fill_", "normal_", "uniform_")
_GATHERS = ("index", "index_select", "gather", "embedding")
_SCATTERS = ("index_put_", "_index_put_impl_", "index_copy_", "index_add_", "masked_fill_")
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")


def moved(name: str, func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes."""
    given, made = tensors_of([*args, *kwargs.values()]), tensors_of([out])
    if name in _GATHERS:
        return sum(2 * _size(x) for x in made) + sum(_size(x) for x in given[1:] if x.dtype == torch.int64)
    if name in _SCATTERS:
        values = [_size(x) for x in given[1:] if x.is_floating_point()]
        return 2 * max(values, default=_size(given[0])) + sum(map(_size, given[1:]))
    if name == "attention_backward":  # what the forward gave is read as well
        return sum(map(_size, (*given, given[-1], *made)))
    changed, unread = {id(x) for x in made} & {id(x) for x in given}, set[int]()
    if hasattr(func, "_schema"):
        changed |= {id(x) for x in written(func, args, kwargs)}
        if name in _WRITTEN_ONLY or func._overloadname.endswith("out"):
            unread = changed
    total = sum(_size(x) for x in made if id(x) not in changed)
    for key, x in {id(x): x for x in given}.items():
        total += _size(x) * ((key not in unread) + (key in changed))
    return total


def seconds(name: str, args: Any, kwargs: Any, out: Any, size: int) -> float:
    """What a kernel that moves this many bytes takes on the device."""
    given, made = tensors_of([*args, *kwargs.values()]), tensors_of([out])
    rate = _RATE.get(given[0].dtype, math.inf) if given else math.inf
    return max(size / BANDWIDTH, _operations(name, given, made) / rate)


def _operations(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    if name in _PRODUCTS:
        left = given[-2] if name.startswith(("addmm", "baddbmm")) or len(given) == 2 else given[0]
        return 2 * made[0].numel() * left.shape[-1]
    if name.startswith("attention"):
        (batch, heads, tokens, width), keys = given[0].shape, given[1].shape[2]
        return (4 if name == "attention_forward" else 10) * batch * heads * tokens * keys * width
    if name == "expanded":
        groups = zip(given[::4], given[1::4], strict=True)
        return sum(2 * x.numel() * weight.shape[-1] for x, weight in groups if weight.dim() == 3)
    if name == "edge_scores":
        reach = given[2]  # on the CPU
        return 2 * int(reach.sum()) * given[0].shape[1] * given[0].shape[2]
    if name == "masked_read":
        return 2 * given[2].numel() * given[1].shape[-2] * given[1].shape[-1]
    return 0


def _size(x: Tensor) -> int:
    """Bytes of what a tensor has in memory, expanded dimensions once."""
    if not isinstance(x, Pretend):
        return 0
    there = [n for n, step in zip(x.shape, x.stride(), strict=True) if step != 0 or n == 1]
    return math.prod(there) * x.element_size()
