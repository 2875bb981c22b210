"""What `impl="auto"` runs, and why: for each operator a rule on CPUs and a case on GPUs, both measured.

On GPUs, what was measured on this very card counts (`tune/choices.py`). Where nothing was, and nothing may run for it,
measured.json ranks the backends by device, operator and case; bench/record.py writes it. A GPU that is not in it counts
as one of the same architecture. A case names what decides within an operator: dtype, memory layout, sizes. The same
functions name it when a bench is recorded, when the card is measured, and when `auto` looks it up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from eap_kernels._registry import BACKENDS
from eap_kernels._schemas import accumulation_dtype, tf32
from eap_kernels.reference.edge_scores import flattens
from eap_kernels.tune import choices

TABLE = Path(__file__).with_name("measured.json")
# edge_scores on a GPU: the most receivers of each measured case; any larger number is one more case.
FEW_RECEIVERS = (1, 12, 37)
# masked_read on a GPU: the largest share of kept edges of each measured case.
SHARES = (0.03, 0.3, 1.0)
# masked_read on a CPU: the sparse walk wins up to this many kept edges per receiver, or up to this many receivers. With
# vectors of 32 bytes the library's matrix product is slower, and the walk waits less for memory (measured on an AMD
# EPYC; the first figure on an Intel Xeon).
SPARSE = 150
SPARSE_V3 = 400
FEW_READERS = 8


# Each is one kernel of Triton's on a GPU, where the reference launches up to a dozen. The launches are the time, so it
# is taken wherever it is known to be right. On a CPU each is one pass over what it reads, whatever its shape.
ONE_LAUNCH = ("normalise_rows", "collapse")


class Card(TypedDict):
    """What was measured on a GPU: by operator and case its backends, the fastest first."""

    capability: str
    operators: dict[str, dict[str, list[str]]]


class Choice(NamedTuple):
    """A backend's name, and the measured rule behind it; a long sentence is made only where it is read."""

    impl: str
    why: str | Callable[[], str]

    @property
    def reason(self) -> str:
        return self.why if isinstance(self.why, str) else self.why()


MEASURED: dict[str, Card] = json.loads(TABLE.read_text())


def choose(op: str, *args: Any) -> Choice:
    """What `auto` runs for an operator's arguments; trailing ones that its rule does not look at may be left out.

    On a GPU of which nothing is known yet it is measured now, unless `choices.allowed` says no.
    """
    x = args[0][0] if isinstance(args[0], Sequence) else args[0]
    if op == "masked_read" and args[1].dim() == 4 and not x.is_cpu:
        return Choice("reference", "all circuits are one product of the library's")
    if x.is_cuda:
        found = choices.known(x.device, _arithmetic(x))
        small = Choice("reference", "it takes too little time for a choice to matter")
        return _prior(op, x, *args) if found is None else _measured_here(found, small, op, *args)
    if x.device.type != "cpu":
        return Choice("reference", f"nothing faster has been measured on {x.device.type}")
    if reason := BACKENDS["cpu"].missing():
        return Choice("reference", reason)
    if op in ONE_LAUNCH:
        return Choice("cpu", "it is one pass where the reference takes up to a dozen")
    return RULES[op].on_cpu(*args)


def _prior(op: str, x: Tensor, *args: Any) -> Choice:
    """What was measured on another card of this name or architecture."""
    name = _card(x.device)
    if name is None:
        # Without a look at the arguments, for which the host may have to wait.
        return Choice("reference", f"nothing was measured on {torch.cuda.get_device_name(x.device)}")
    if op in ONE_LAUNCH:
        return _one_launch(BACKENDS["triton"].missing())
    if op not in MEASURED[name]["operators"]:
        return Choice("reference", f"nothing was measured on {name}")
    case = RULES[op].case(*args)
    fastest = _first_that_runs(ranking(name, op, case))
    measured = "the fastest" if fastest else "nothing was"
    return Choice(fastest or "reference", f"{measured} measured on {name} for {case}")


def _card(device: torch.device) -> str | None:
    """The measured card that a GPU counts as: one of its name, or else one of its architecture."""
    own = torch.cuda.get_device_name(device)
    if own in MEASURED:
        return own
    capability = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return next((name for name, card in MEASURED.items() if card["capability"] == capability), None)


def _first_that_runs(impls: Iterable[str]) -> str | None:
    return next((impl for impl in impls if impl in BACKENDS and BACKENDS[impl].missing() is None), None)


def ranking(name: str, op: str, case: str) -> list[str]:
    """Backends, the fastest first; empty if this case was not measured on such a device."""
    return MEASURED[name]["operators"].get(op, {}).get(case, [])


def _measured_here(found: choices.Found, otherwise: Choice, op: str, *args: Any) -> Choice:
    """`otherwise`: what is taken where the reference takes little time."""
    failed = found["failed"].get(op, {})

    def left_out() -> str:
        return "".join(f"; {impl} is left out ({why})" for impl, why in failed.items())

    if op in ONE_LAUNCH:
        right = "triton" in found["verified"].get(op, ())
        return _one_launch(BACKENDS["triton"].missing() if right else f"triton is not right on this device{left_out()}")
    case, elements = RULES[op].case(*args), RULES[op].elements(*args)
    sizes = found["seconds"].get(op, {}).get(case, {})
    size = min((each for each in sizes if elements <= int(each)), key=int, default=max(sizes, key=int, default="0"))
    times = sizes.get(size, {})
    fastest = _first_that_runs(sorted(times, key=times.__getitem__))
    if fastest is None or len(times) < 2:
        if otherwise.impl in failed:
            return Choice("reference", lambda: f"nothing else is right on this device{left_out()}")
        return Choice(otherwise.impl, lambda: otherwise.reason + left_out())

    def reason() -> str:
        listed = ", ".join(f"{impl} {times[impl] * 1e3:.3g} ms" for impl in sorted(times, key=times.__getitem__))
        return f"measured on this device, {case}, {int(size):,} elements: {listed}{left_out()}"

    return Choice(fastest, reason)


def _one_launch(reason: str | None) -> Choice:
    return Choice("reference", reason) if reason else Choice("triton", "it is one kernel where others launch a dozen")


def told(device: torch.device, arithmetic: str) -> dict[str, str]:
    """What `auto` takes on a device in an arithmetic, as pairs to print; nothing if nothing was measured."""
    found = choices.stored(device).get(arithmetic)
    if found is None:
        return {}
    taken: dict[str, list[str]] = {}
    for op, _, _, impls in choices.ranks(found):
        taken.setdefault(op, []).extend(impls[:1] if len(impls) > 1 else ())
    words = [
        f"{op} " + (", ".join(f"{impl} in {fastest.count(impl)}" for impl in dict.fromkeys(fastest)) or "untimed")
        for op, fastest in taken.items()
    ]
    words += [f"{op} without {impl}: {why}" for op, by in found["failed"].items() for impl, why in by.items()]
    return {f"auto in {arithmetic}": f"{'; '.join(words)} ({found['date']})"}


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


def _edge_scores_in(delta: Tensor, grad: Tensor, reach: Tensor, out: Any = None, segments: Any = None) -> str:
    flat = flattens(delta) and flattens(grad) and segments is None
    return edge_scores_case(_arithmetic(delta), flat, grad.shape[0])


def _edge_scores_on_cpu(delta: Tensor, grad: Tensor, reach: Tensor, out: Any = None, segments: Any = None) -> Choice:
    if segments is not None:
        return Choice("cpu", "segments cut the library's matrix product into short ones")
    if delta.dtype != accumulation_dtype(delta.dtype):
        plain = Choice("cpu", "low precision is widened on the way, not in a copy")
        return _here("edge_scores", delta, plain, delta, grad, reach)
    if not (flattens(delta) and flattens(grad)):
        return Choice("cpu", "these strides are read in place, the library would copy")
    if grad.shape[0] != 1:
        return Choice("cpu", "only products inside the staircase are computed")
    return Choice("reference", "one receiver on flat memory is a matrix-vector product, fastest in the library")


def _masked_read_in(base: Tensor, delta: Tensor, mask: Tensor) -> str:
    return masked_read_case(_arithmetic(delta), int(torch.count_nonzero(mask)) / max(1, mask.numel()))


def _masked_read_on_cpu(base: Tensor, delta: Tensor, mask: Tensor) -> Choice:
    receivers = mask.shape[1]
    if receivers <= FEW_READERS:
        return Choice("cpu", f"{receivers} receivers are too narrow for the library's matrix product")
    kept = int(torch.count_nonzero(mask)) / receivers
    if kept <= (SPARSE_V3 if choices.instruction_set() == "x86-64-v3" else SPARSE):
        return Choice("cpu", f"{kept:.0f} edges are kept a receiver, and cost follows them")
    return Choice("reference", f"{kept:.0f} edges are kept a receiver, enough for the library's matrix product")


def _here(op: str, x: Tensor, otherwise: Choice, *args: Any) -> Choice:
    """What was measured on this processor, if anything was."""
    found = choices.known(x.device, _arithmetic(x))
    return otherwise if found is None else _measured_here(found, otherwise, op, *args)


def _head_space_scores_on_cpu(values: Sequence[Tensor], *_: Any) -> Choice:
    plain = Choice("cpu", "tiles of expanded rows stay in cache")
    return _here("head_space_scores", values[0], plain, values)


class Rule(NamedTuple):
    """Of an operator's arguments: the measured case that they are, the elements that are read and written where sizes
    decide, and the choice on CPUs if the compiled library is there."""

    case: Callable[..., str]
    elements: Callable[..., int]
    on_cpu: Callable[..., Choice]


RULES = {
    "edge_scores": Rule(_edge_scores_in, lambda delta, grad, *_: delta.numel() + grad.numel(), _edge_scores_on_cpu),
    "head_space_scores": Rule(
        lambda values, *_: head_space_scores_case(_arithmetic(values[0])), lambda *_: 0, _head_space_scores_on_cpu
    ),
    "masked_read": Rule(
        _masked_read_in,
        lambda base, delta, mask: delta.numel() // max(1, len(mask)) * sum(mask.shape),
        _masked_read_on_cpu,
    ),
}
