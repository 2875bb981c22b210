"""How much memory a run may take, how much it will take, and what to do if memory runs out all the same.

One number governs it: the tokens of a pass. More tokens (of examples, path points, circuits, edges) keep the processor
busier and take more memory.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import InputError, expected, one_of, out_of_memory, reason
from ..forward import TOKENS_PER_BATCH, Batch, give_back_memory, halves, passes_of, some_of
from ..ranks import ALONE, Team, count, dealt, in_team
from ..tasks import PairedDataset

# For devices that a pass of TOKENS_PER_BATCH does not keep busy; not yet measured.
TOKENS_PER_PASS = {"cuda": 8192}
SHARE_OF_FREE = 0.5
# Operators that multiply matrices, and where among their arguments the two factors begin.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "_grouped_mm": 0, "_scaled_mm": 0, "_int_mm": 0}
T = TypeVar("T")


def most_tokens(kind: str) -> int:
    """How many tokens keep a device of this kind busy; more in a pass would only take memory."""
    return TOKENS_PER_PASS.get(kind, TOKENS_PER_BATCH)


def free_bytes(device: torch.device) -> int:
    """The bytes free for new tensors: on the GPU, or in the machine or container for a CPU."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"))
    free = int(found[1]) * 1024 if found else 4 * 2**30
    limit, used = (_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def kind_of(device: object) -> str:
    """ "cpu" or "cuda" of a device to plan for, which this machine need not have."""
    try:
        kind: object = torch.device(device).type  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        kind = device
    one_of("device", kind, ("cpu", "cuda"))
    return str(kind)


def free_share(kind: str) -> int:
    """What a run may take by default on a device of this kind; raises InputError if this machine has none."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise expected("memory", "what the run may take on each GPU, as this machine has none to ask", None)
    return int(SHARE_OF_FREE * free_bytes(torch.device(kind)))


def device_name(device: torch.device) -> str:
    """What tells a device of this machine apart from its others, also for another process."""
    if device.type != "cuda":
        return device.type
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside and still alive; `peak` is their maximum.

    `laps` are the peaks of the phases that `lap()` ended; `operations` the floating-point operations of matrix products
    and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._highest = self._alive = self.operations = 0
        self.laps: list[int] = []
        self._known: Any = WeakIdKeyDictionary()

    def lap(self) -> None:
        """End a phase: record its peak and start again from what is alive."""
        self.laps.append(self._highest)
        self._highest = self._alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in _tensors((*args, *kwargs.values())):
            self._known.setdefault(x.untyped_storage(), True)
        out = func(*args, **kwargs)
        self.operations += _operations(func, args)
        for x in _tensors(out if isinstance(out, (tuple, list)) else (out,)):
            self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage not in self._known:
            self._known[storage] = True
            size = storage.nbytes()
            self._alive += size
            self._highest = max(self._highest, self._alive)
            self.peak = max(self.peak, self._highest)
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._alive -= size


def _operations(func: Any, args: Any) -> int:
    """Of one operator: two for each product of two numbers."""
    name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else ""
    if name in _PRODUCTS:
        first, second = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
        # Of several second factors, as experts have, each row meets one.
        return 2 * first.numel() * second.shape[-1]
    if "scaled_dot_product" in name:
        backward = name.endswith("backward")
        query, key, value = args[backward : backward + 3]
        once = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return once * 5 // 2 if backward else once
    return 0


def end_of_phase() -> None:
    """Here a phase of a batch ends: where its memory is counted, the next phase's peak is one of its own."""
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, PeakBytes):
            mode.lap()


def zeros(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take memory only where they are written to: of a large graph's edges, those measured."""
    return torch.from_numpy(np.zeros(tuple(shape), str(dtype).removeprefix("torch.")))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results, also those inside lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from (x for x in value if isinstance(x, Tensor))


def dealt_in_memory(
    data: PairedDataset, batches: Iterable[Batch], tokens: int, run: Callable[[Batch, int], T], team: Team = ALONE
) -> Iterator[tuple[Batch, T]]:
    """`in_memory` of batches that are dealt to the ranks, as `ranks.dealt` does it; all receive all results.

    Args:
        run: returns tensors on the CPU and plain values.
        team: see `ranks.dealt`.
    """
    if count() == 1:
        yield from in_memory(data, batches, tokens, run)
        return
    # A rank whose memory runs out goes on with smaller passes; one for all its batches.
    to_run: list[Batch] = []
    fitting = in_memory(data, iter(lambda: to_run.pop(), None), tokens, run)

    def pieces(batch: Batch) -> list[tuple[Tensor, T]]:
        to_run.append(batch)
        found, left = [], batch.n_examples
        while left:
            piece, result = next(fitting)
            found.append((piece.index, result))
            left -= piece.n_examples
        return found

    for batch, found in dealt(batches, pieces, team, passes_of):
        if not torch.equal(torch.cat([index for index, _ in found]), batch.index):
            raise expected("batches", "the same on all ranks", "others, as batch_size or the model differs")
        start = 0
        for index, result in found:
            which = torch.arange(start, start := start + len(index))
            yield (batch if len(found) == 1 else some_of(data, batch, which)), result


def in_memory(
    data: PairedDataset, batches: Iterable[Batch], tokens: int, run: Callable[[Batch, int], T]
) -> Iterator[tuple[Batch, T]]:
    """(batch, run(batch, tokens)) for every batch; if memory runs out, the batch runs again with half the tokens.

    From then on a batch with more tokens than a pass may have is halved; each example is in exactly one result.

    Raises:
        InputError: not even one example at a time fits; or memory runs out on a rank that cannot run anything else than
            the others, as the model is in parts.
    """
    limit = None  # known once memory has run out
    for whole in batches:
        waiting = [whole]
        while waiting:
            batch = waiting.pop()
            if limit is not None and batch.n_examples > 1 and batch.clean.numel() > limit:
                waiting += reversed(halves(data, batch))
                continue
            failed, found = None, []
            try:
                found.append(run(batch, limit or tokens))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                failed = reason(error)
                if in_team():
                    wanted = "enough for a pass on each rank of a model in parts (a smaller memory= takes smaller ones)"
                    raise expected("memory", wanted, failed) from error
            # Continue outside `except`, whose traceback would keep alive what the run had allocated.
            if failed is None:
                yield batch, found[0]
                continue
            give_back_memory()
            size = batch.example_tokens
            if limit == size:
                raise InputError(f"memory: expected enough for one example of {size} tokens, got {failed}.")
            limit = max((limit or max(tokens, batch.clean.numel())) // 2, size)
            waiting.append(batch)
