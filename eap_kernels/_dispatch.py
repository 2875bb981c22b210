"""Run an operator on the requested backend, after the checks that look at values or memory.

Registers the implementations: the reference as every device's default kernel, and the choice among backends.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import mul
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from eap_kernels import _auto, _native
from eap_kernels._registry import BACKENDS
from eap_kernels._schemas import lib, tf32
from eap_kernels.reference import Backend

P = ParamSpec("P")
T = TypeVar("T")
# Ours and PyTorch's; of an allocation inside our library the stable ABI names only the operator that failed.
_WANT_OF_MEMORY = ("bad_alloc", "can't allocate memory", "aten::new_empty", "Storage size calculation overflowed")


def in_memory(call: Callable[P, T]) -> Callable[P, T]:
    """An operator's function, which raises torch.OutOfMemoryError where memory runs out, whatever the backend."""
    op = call.__name__.lstrip("_")

    @functools.wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _WANT_OF_MEMORY):
                raise
            text = (str(error).splitlines() or [""])[0]
            raise torch.OutOfMemoryError(f"{op}: expected enough memory, got {text or 'none'}") from error

    return run


def check_impl(op: str, impl: str, device: torch.device) -> None:
    """Check a backend that was asked for by name: it runs or raises, and no other one takes its place."""
    if not isinstance(impl, str) or impl not in ("auto", *BACKENDS):
        raise ValueError(f"{op}: expected impl to be one of {', '.join(('auto', *BACKENDS))}, got {impl!r}")
    if impl == "auto":
        return
    backend = BACKENDS[impl]
    if backend.device is not None and device.type != backend.device:
        raise ValueError(f"{op}: expected {backend.device.upper()} tensors for impl={impl!r}, got {device}")
    if reason := backend.missing():
        raise RuntimeError(f"{op}: impl={impl!r} is not available: {reason}")


def _byte_range(x: Tensor) -> tuple[int, int]:
    """First and one-past-last byte that a tensor's elements occupy."""
    if x.numel() == 0:
        return 0, 0
    start, strides = x.data_ptr(), x.stride()
    last = sum(map(mul, x.shape, strides)) - sum(strides)  # no stride is negative
    return start, start + (last + 1) * x.element_size()


def _share_memory(x: Tensor) -> bool:
    """Do any two entries of a tensor lie at one place?"""
    if x.is_contiguous():
        return False
    reach, apart = 0, True
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        apart &= size < 2 or stride > reach  # beyond all that the smaller strides span
        reach += stride * (size - 1)
    if apart or not x.numel():
        return False
    if reach + 1 < x.numel():  # fewer places than entries, as where one was expanded to a large size
        return True
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in zip(x.stride(), x.shape, strict=True):
        places = places[..., None] + stride * torch.arange(size, device="cpu")
    return len(places.unique()) < x.numel()


def _begin_writing(op: str, operands: Iterable[tuple[str, Tensor]], *written: Tensor) -> None:
    """Check that results have memory of their own, and tell autograd that they change."""
    taken = [(name, x.device, *_byte_range(x)) for name, x in operands]
    for out in written:
        if _share_memory(out):
            found = f"an out with strides {list(out.stride())}"
            raise ValueError(f"{op}: expected every entry of out to have its own memory, got {found}")
        if out.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{op}: expected an out that may be written to, got one of inference mode outside of it")
        first, last = _byte_range(out)
        for name, device, low, high in taken:
            if first < high and low < last and device == out.device:
                raise ValueError(f"{op}: expected out in its own memory, got an out that overlaps {name}")
        taken.append(("out", out.device, first, last))
    torch.autograd.graph.increment_version(written)  # torch refuses gradients that need what was there


def _check_range(op: str, name: str, values: Tensor, high: int) -> None:
    if values.numel() == 0:
        return
    lowest, highest = (int(x) for x in torch.aminmax(values))
    if lowest < 0 or highest > high:
        got = lowest if lowest < 0 else highest
        raise ValueError(f"{op}: expected {name} within [0, {high}], got {got}")


def _check_rows(op: str, rows: Tensor | None, x: Tensor) -> None:
    # On a GPU the host would have to wait for the answer: kernels give NaN there.
    if rows is not None and rows.is_cpu:
        _check_range(op, "rows", rows, x.shape[1] - 1)


_switch = threading.Lock()
_before: list[bool] = []  # for each call inside `_without_onednn`, whether oneDNN is on without them


@contextmanager
def _without_onednn() -> Iterator[None]:
    """oneDNN is off until the last call has left: it has one switch for all threads."""
    with _switch:
        _before.append(_before[0] if _before else torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        with _switch:
            on = _before.pop()
            torch._C._set_mkldnn_enabled(on and not _before)


def _exact(call: Callable[P, T]) -> Callable[P, T]:
    """An operator's function where torch rounds nothing that the reference multiplies."""

    @functools.wraps(call)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        first: Any = args[0]
        kind = (first if isinstance(first, Tensor) else first[0]).device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return run(*args, **kwargs)
        # After torch.set_float32_matmul_precision("medium") oneDNN rounds fp32 to bf16.
        precision = torch.backends.mkldnn.matmul.fp32_precision if kind == "cpu" else None  # type: ignore[attr-defined]
        if precision == "bf16":
            with _without_onednn():
                return call(*args, **kwargs)
        return call(*args, **kwargs)

    return run


def _chosen(op: str, impl: str, device: torch.device, *args: Any) -> Backend:
    """The requested backend, or the one that `auto` takes for these arguments."""
    check_impl(op, impl, device)
    if impl != "auto":
        return BACKENDS[impl]
    if _native.failure:
        _native.say_missing()
    return BACKENDS[_auto.choose(op, *args).impl]


def _edge_scores(delta: Tensor, grad: Tensor, reach: Tensor, out: Tensor, segments: Tensor | None, impl: str) -> None:
    reach = reach.cpu()
    _check_range("edge_scores", "reach", reach, delta.shape[0])
    if segments is not None:
        segments = segments.cpu()
        _check_range("edge_scores", "segments", segments, out.shape[0] - 1)
    _begin_writing("edge_scores", (("delta", delta), ("grad", grad)), out)
    args = (delta, grad, reach, out, segments)
    _chosen("edge_scores", impl, out.device, *args).edge_scores(*args, tf32())


def _head_space_scores(*args: Any) -> None:
    *lists, groups, features, reach, out, workspace, impl = args
    reach = reach.cpu()
    _check_range("head_space_scores", "reach", reach, out.shape[0])
    named = zip(("values", "weight", "coefficients", "normalised"), lists, strict=True)
    _begin_writing("head_space_scores", ((name, x) for name, column in named for x in column), out)
    backend = _chosen("head_space_scores", impl, out.device, *lists)
    backend.head_space_scores(*lists, groups, features, reach, out, workspace)


def _masked_read(base: Tensor, delta: Tensor, mask: Tensor, impl: str) -> Tensor:
    if delta.dim() == 3:
        return _chosen("masked_read", impl, delta.device, base, delta, mask).masked_read(base, delta, mask)
    if not len(mask):
        return torch.empty_like(base)
    # Off the CPU all circuits are one product of the library's (`_auto`), in which every sender is read: one launch.
    if impl in ("auto", "reference") and not delta.is_cpu:
        return BACKENDS["reference"].masked_read(base, delta, mask)
    return torch.stack([_masked_read(*each, impl) for each in zip(base, delta, mask, strict=True)], 1).transpose(0, 1)


def _normalise_rows(x: Tensor, eps: float, centred: bool, rows: Tensor | None, out: Tensor | None, impl: str) -> Tensor:
    _check_rows("normalise_rows", rows, x)
    if out is not None:
        _begin_writing("normalise_rows", (("x", x),), out)
    backend = _chosen("normalise_rows", impl, x.device, x)
    return backend.normalise_rows(x, eps, centred, rows, out)


def _collapse(*args: Any) -> None:
    gradient, values, r, weights, out, coefficients, _features, _gathered, rows, constant, gain, impl = args
    _check_rows("collapse", rows, gradient)
    read = {"gradient": gradient, "values": values, "r": r, "weights": weights, "constant": constant, "gain": gain}
    _begin_writing("collapse", ((name, x) for name, x in read.items() if x is not None), out, coefficients)
    _chosen("collapse", impl, out.device, gradient).collapse(*args[:-1])


SELECT: dict[str, Callable[..., Any]] = {
    "edge_scores": _edge_scores,
    "head_space_scores": _head_space_scores,
    "masked_read": _masked_read,
    "normalise_rows": _normalise_rows,
    "collapse": _collapse,
}
for _op, _select in SELECT.items():
    lib.impl(_op, _exact(getattr(BACKENDS["reference"], _op)), "CompositeExplicitAutograd")
    lib.impl(f"{_op}.select", in_memory(_exact(_select)), "CompositeExplicitAutograd")
