"""Which backend runs an operator, and the checks that need to look at values or memory.

Registers the implementations: the reference as every device's default kernel, and the choice among backends.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from eap_kernels import _measured, _native
from eap_kernels._schemas import accumulation_dtype, lib
from eap_kernels.reference import edge_scores as reference_edge_scores
from eap_kernels.reference import head_space_scores as reference_head_space_scores
from eap_kernels.reference import masked_read as reference_masked_read
from eap_kernels.reference.edge_scores import flattens

IMPLS = ("auto", "reference", "cpu", "triton", "cuda")
# Up to so many kept edges a receiver, or for so few receivers, the sparse walk wins: see
# bench/kernels/bench_masked_read.py.
SPARSE = 150
FEW_READERS = 8


class Choice(NamedTuple):
    """What `auto` picks for some tensors, and the measured rule behind it."""

    impl: str
    reason: str


def missing(impl: str) -> str | None:
    """Why a backend cannot run on this machine, or None where it can."""
    if impl == "cpu":
        return _native.failure
    if impl == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        return None if interpreted() else _no_device()
    if impl == "cuda":
        return _native.cuda_failure() or _no_device() or trial_of_cuda()
    return None


@functools.cache
def trial_of_cuda() -> str | None:
    """Why the CUDA kernels do not run on this machine's card, found by one small call; None where they do.

    A library may be built for other cards, or by an nvcc that is newer than the driver.
    """
    one = torch.ones(1, 1, 1, device="cuda")
    out = torch.zeros(1, 1, device="cuda")
    try:
        torch.ops.eap_kernels.edge_scores.default(one, one, torch.ones(1, dtype=torch.int64, device="cpu"), out, None)
        found = float(out)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"a trial call failed ({str(error).splitlines()[0]})"
    return None if found == 1 else f"a trial call gave {found:g} where 1 is right"


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors: for tests on machines without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_of(impl: str) -> str | None:
    """The device type whose tensors a backend takes; None for any."""
    if impl == "triton":
        return "cpu" if interpreted() else "cuda"
    return impl if impl in ("cpu", "cuda") else None


def tf32() -> bool:
    """Whether a GPU may round fp32 operands to tf32: torch's own switch for matrix products."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def check_impl(op: str, impl: str, device: torch.device) -> None:
    """An explicit backend either runs or raises: it is never replaced by another one."""
    if impl not in IMPLS:
        raise ValueError(f"{op}: expected impl to be one of {', '.join(IMPLS)}, got {impl!r}")
    wanted = device_of(impl)
    if wanted is not None and device.type != wanted:
        raise ValueError(f"{op}: expected {wanted.upper()} tensors for impl={impl!r}, got {device}")
    reason = missing(impl)
    if reason is not None:
        raise RuntimeError(f"{op}: impl={impl!r} is not available: {reason}")


def _no_device() -> str | None:
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def choose_edge_scores(delta: Tensor, grad: Tensor, segments: Tensor | None) -> Choice:
    flat = flattens(delta) and flattens(grad)
    if delta.is_cuda:
        case = _measured.edge_scores_case(_arithmetic(delta), flat and segments is None, grad.shape[0])
        return _fastest(delta.device, "edge_scores", case)
    unavailable = _without_native(delta)
    if unavailable:
        return unavailable
    if segments is not None:
        return Choice("cpu", "segments cut the library's matrix product into short ones")
    if delta.dtype != accumulation_dtype(delta.dtype):
        return Choice("cpu", "low precision is widened on the way, not in a copy")
    if not flat:
        return Choice("cpu", "these strides are read in place, the library would copy")
    # See bench/kernels/bench_edge_scores.py.
    if grad.shape[0] != 1:
        return Choice("cpu", "only products inside the staircase are computed")
    return Choice("reference", "one receiver on flat memory is a matrix-vector product, fastest in the library")


def choose_masked_read(delta: Tensor, mask: Tensor) -> Choice:
    if delta.is_cuda:
        share = int(torch.count_nonzero(mask)) / max(1, mask.numel())
        return _fastest(delta.device, "masked_read", _measured.masked_read_case(_arithmetic(delta), share))
    unavailable = _without_native(delta)
    if unavailable:
        return unavailable
    receivers = mask.shape[1]
    if receivers <= FEW_READERS:
        return Choice("cpu", f"{receivers} receivers are too narrow for the library's matrix product")
    kept = int(torch.count_nonzero(mask)) / receivers
    if kept <= SPARSE:
        return Choice("cpu", f"{kept:.0f} edges are kept a receiver, and cost follows them")
    return Choice("reference", f"{kept:.0f} edges are kept a receiver, enough for the library's matrix product")


def choose_head_space_scores(values: Tensor) -> Choice:
    if values.is_cuda:
        return _fastest(values.device, "head_space_scores", _measured.head_space_scores_case(_arithmetic(values)))
    return _without_native(values) or Choice("cpu", "tiles of expanded rows stay in cache")


def _arithmetic(x: Tensor) -> str:
    """What products are computed in on a GPU."""
    return "tf32" if x.dtype == torch.float32 and tf32() else str(x.dtype).removeprefix("torch.")


def _fastest(device: torch.device, op: str, case: str) -> Choice:
    """On a GPU: the first of those measured that runs here; the reference where nothing was measured."""
    name = "{}.{}".format(*torch.cuda.get_device_capability(device))
    for impl in _measured.ranking(name, op, case):
        if _runs(impl):
            return Choice(impl, f"the fastest measured on compute capability {name} for {case}")
    return Choice("reference", f"nothing was measured on compute capability {name} for {case}")


@functools.cache
def _runs(impl: str) -> bool:
    return missing(impl) is None


def _without_native(x: Tensor) -> Choice | None:
    if x.device.type != "cpu":
        return Choice("reference", f"nothing faster has been measured on {x.device.type}")
    if _native.failure is not None:
        return Choice("reference", _native.failure)
    return None


def _byte_range(x: Tensor) -> tuple[int, int]:
    """First and one-past-last byte that a tensor's elements occupy."""
    if x.numel() == 0:
        return 0, 0
    steps = [(size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    start, end = sum(min(s, 0) for s in steps), sum(max(s, 0) for s in steps)
    return x.data_ptr() + start * x.element_size(), x.data_ptr() + (end + 1) * x.element_size()


def _check_memory(op: str, out: Tensor, operands: Iterable[tuple[str, Tensor]]) -> None:
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(f"{op}: expected every entry of out to have its own memory, got an expanded out")
    first, last = _byte_range(out)
    for name, x in operands:
        low, high = _byte_range(x)
        if x.device == out.device and first < high and low < last:
            raise ValueError(f"{op}: expected out in its own memory, got an out that overlaps {name}")


def _check_range(op: str, name: str, values: Tensor, high: int) -> None:
    if values.numel() == 0:
        return
    lowest, highest = (int(x) for x in torch.aminmax(values))
    if lowest < 0 or highest > high:
        got = lowest if lowest < 0 else highest
        raise ValueError(f"{op}: expected {name} within [0, {high}], got {got}")


def _reference_edge_scores(
    delta: Tensor, grad: Tensor, reach: Tensor, out: Tensor, segments: Tensor | None, tf32: bool = False
) -> None:
    reference_edge_scores.edge_scores(delta, grad, reach, out, segments)


def _edge_scores(delta: Tensor, grad: Tensor, reach: Tensor, out: Tensor, segments: Tensor | None, impl: str) -> None:
    check_impl("edge_scores", impl, delta.device)
    reach = reach.cpu()
    _check_range("edge_scores", "reach", reach, delta.shape[0])
    if segments is not None:
        segments = segments.cpu()
        _check_range("edge_scores", "segments", segments, out.shape[0] - 1)
    _check_memory("edge_scores", out, (("delta", delta), ("grad", grad)))
    if impl == "auto":
        impl = choose_edge_scores(delta, grad, segments).impl
    if impl == "reference":
        reference_edge_scores.edge_scores(delta, grad, reach, out, segments)
    elif impl == "triton":
        from eap_kernels.triton.edge_scores import edge_scores

        edge_scores(delta, grad, reach, out, segments, tf32())
    else:
        torch.ops.eap_kernels.edge_scores.default(delta, grad, reach, out, segments, tf32())


def _head_space_scores(
    values: list[Tensor],
    weights: list[Tensor],
    coefficients: list[Tensor],
    normalised: list[Tensor],
    sender_groups: int,
    features: int,
    reach: Tensor,
    out: Tensor,
    workspace: int,
    impl: str,
) -> None:
    check_impl("head_space_scores", impl, out.device)
    reach = reach.cpu()
    _check_range("head_space_scores", "reach", reach, out.shape[0])
    operands = chain(values, weights, coefficients, normalised)
    _check_memory("head_space_scores", out, (("an operand", x) for x in operands))
    if impl == "auto":
        impl = choose_head_space_scores(values[0]).impl
    args = (values, weights, coefficients, normalised, sender_groups, features, reach, out, workspace)
    if impl == "cpu":
        torch.ops.eap_kernels.head_space_scores.default(*args)
    else:
        # Tiles are expanded by the library's batched product and contracted by the backend's own kernel; on a GPU in
        # the operands' own dtype, which is what its tensor cores multiply.
        contract = partial(_edge_scores, impl=impl)
        reference_head_space_scores.head_space_scores(*args, contract=contract, rounded=out.is_cuda)


def _masked_read(base: Tensor, delta: Tensor, mask: Tensor, impl: str) -> Tensor:
    check_impl("masked_read", impl, delta.device)
    if impl == "auto":
        impl = choose_masked_read(delta, mask).impl
    if impl == "reference":
        return reference_masked_read.masked_read(base, delta, mask)
    if impl == "triton":
        from eap_kernels.triton.masked_read import masked_read

        return masked_read(base, delta, mask, tf32())
    result: Tensor = torch.ops.eap_kernels.masked_read.default(base, delta, mask)
    return result


lib.impl("edge_scores", _reference_edge_scores, "CompositeExplicitAutograd")
lib.impl("head_space_scores", reference_head_space_scores.head_space_scores, "CompositeExplicitAutograd")
lib.impl("masked_read", reference_masked_read.masked_read, "CompositeExplicitAutograd")
lib.impl("edge_scores.select", _edge_scores, "CompositeExplicitAutograd")
lib.impl("head_space_scores.select", _head_space_scores, "CompositeExplicitAutograd")
lib.impl("masked_read.select", _masked_read, "CompositeExplicitAutograd")
