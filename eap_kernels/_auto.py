"""What `impl="auto"` runs, and why: for each operator a rule on CPUs and one on GPUs, both measured by bench/kernels.

On GPUs, measured.json ranks the backends by compute capability, operator and case; bench/record.py writes it. A case
names what decides within an operator: dtype, memory layout, sizes. The same functions name it when a bench is recorded
and when `auto` looks it up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eap_kernels._registry import BACKENDS
from eap_kernels._schemas import accumulation_dtype, tf32
from eap_kernels.reference.edge_scores import flattens

TABLE = Path(__file__).with_name("measured.json")
MEASURED: dict[str, dict[str, dict[str, list[str]]]] = json.loads(TABLE.read_text())
# edge_scores on a GPU: the most receivers of each measured case; any larger number is one more case.
FEW_RECEIVERS = (1, 12, 37)
# masked_read on a GPU: the largest share of kept edges of each measured case.
SHARES = (0.03, 0.3, 1.0)
# masked_read on a CPU: the sparse walk wins up to this many kept edges per receiver, or up to this many receivers.
SPARSE = 150
FEW_READERS = 8


# Each is one kernel of Triton's on a GPU, where the reference launches up to a dozen. The launches are the time, so
# nothing need be measured.
ONE_LAUNCH = ("normalise_rows", "collapse")


class Choice(NamedTuple):
    """A backend's name, and the measured rule behind it."""

    impl: str
    reason: str


def choose(op: str, *args: Any) -> Choice:
    """What `auto` runs for an operator's arguments; trailing ones that its rule does not look at may be left out."""
    x = args[0][0] if isinstance(args[0], Sequence) else args[0]
    if op in ONE_LAUNCH:
        return _one_launch(x)
    on_gpu, on_cpu = RULES[op]
    if x.is_cuda:
        card = "{}.{}".format(*torch.cuda.get_device_capability(x.device))
        if op not in MEASURED.get(card, {}):
            # Without a look at the arguments, for which the host may have to wait.
            return Choice("reference", f"nothing was measured on compute capability {card}")
        case = on_gpu(*args)
        fastest = next((impl for impl in ranking(card, op, case) if BACKENDS[impl].missing() is None), None)
        measured = "the fastest" if fastest else "nothing was"
        return Choice(fastest or "reference", f"{measured} measured on compute capability {card} for {case}")
    if x.device.type != "cpu":
        return Choice("reference", f"nothing faster has been measured on {x.device.type}")
    reason = BACKENDS["cpu"].missing()
    return Choice("reference", reason) if reason else on_cpu(*args)


def _one_launch(x: Tensor) -> Choice:
    if not x.is_cuda:
        return Choice("reference", f"no kernel is built for {x.device.type}")
    reason = BACKENDS["triton"].missing()
    return Choice("reference", reason) if reason else Choice("triton", "it is one kernel where others launch a dozen")


def ranking(capability: str, op: str, case: str) -> list[str]:
    """Backends, the fastest first; empty if this case was not measured on such a card."""
    return MEASURED.get(capability, {}).get(op, {}).get(case, [])


def edge_scores_case(dtype: str, flat: bool, receivers: int) -> str:
    """`flat`: tokens and features are one dimension in memory."""
    few = next((f", up to {n} receivers" for n in FEW_RECEIVERS if receivers <= n), "")
    return f"{_dtype(dtype)}, {'flat' if flat else 'strided'}{few}"


def masked_read_case(dtype: str, share: float) -> str:
    return f"{_dtype(dtype)}, up to {next(x for x in SHARES if share <= x):.0%} kept"


def head_space_scores_case(dtype: str) -> str:
    return _dtype(dtype)


def _dtype(name: str) -> str:
    # The same kernels at the same rate.
    return "bfloat16" if name == "float16" else name


def _arithmetic(x: Tensor) -> str:
    """The arithmetic of products on a GPU."""
    return "tf32" if x.dtype == torch.float32 and tf32() else str(x.dtype).removeprefix("torch.")


def _edge_scores_on_gpu(delta: Tensor, grad: Tensor, reach: Tensor, out: Any = None, segments: Any = None) -> str:
    flat = flattens(delta) and flattens(grad) and segments is None
    return edge_scores_case(_arithmetic(delta), flat, grad.shape[0])


def _edge_scores_on_cpu(delta: Tensor, grad: Tensor, reach: Tensor, out: Any = None, segments: Any = None) -> Choice:
    if segments is not None:
        return Choice("cpu", "segments cut the library's matrix product into short ones")
    if delta.dtype != accumulation_dtype(delta.dtype):
        return Choice("cpu", "low precision is widened on the way, not in a copy")
    if not (flattens(delta) and flattens(grad)):
        return Choice("cpu", "these strides are read in place, the library would copy")
    if grad.shape[0] != 1:
        return Choice("cpu", "only products inside the staircase are computed")
    return Choice("reference", "one receiver on flat memory is a matrix-vector product, fastest in the library")


def _masked_read_on_gpu(base: Tensor, delta: Tensor, mask: Tensor) -> str:
    return masked_read_case(_arithmetic(delta), int(torch.count_nonzero(mask)) / max(1, mask.numel()))


def _masked_read_on_cpu(base: Tensor, delta: Tensor, mask: Tensor) -> Choice:
    receivers = mask.shape[1]
    if receivers <= FEW_READERS:
        return Choice("cpu", f"{receivers} receivers are too narrow for the library's matrix product")
    kept = int(torch.count_nonzero(mask)) / receivers
    if kept <= SPARSE:
        return Choice("cpu", f"{kept:.0f} edges are kept a receiver, and cost follows them")
    return Choice("reference", f"{kept:.0f} edges are kept a receiver, enough for the library's matrix product")


# For each operator: its case in measured.json, for GPUs; and the choice on CPUs if the compiled library is there.
RULES: dict[str, tuple[Callable[..., str], Callable[..., Choice]]] = {
    "edge_scores": (_edge_scores_on_gpu, _edge_scores_on_cpu),
    "head_space_scores": (
        lambda values, *_: head_space_scores_case(_arithmetic(values[0])),
        lambda *_: Choice("cpu", "tiles of expanded rows stay in cache"),
    ),
    "masked_read": (_masked_read_on_gpu, _masked_read_on_cpu),
}
