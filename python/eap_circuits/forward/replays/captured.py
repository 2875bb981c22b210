"""The passes of a batch, captured in a CUDA graph: what was thousands of launches is one.

A graph repeats kernels on the same memory and knows nothing of the host. So another batch's values are first copied
into the memory of the captured one, and passes are refused that depend on the host in any other way: that read the
host's copy of the batch, send something to the device, or wait for it. A capture in which the host waits is lost, and
torch's random numbers may be lost with it, for the whole process; so the passes are rehearsed first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ...modules.loans import Changes
from ..batches import Batch
from .uploading import NOTHING_IS_SENT

T = TypeVar("T")
# What torch says where the host waits for the device.
_WAITED = "synchronizing CUDA operation"
# Those of all threads that capture: torch can do one at a time.
_capturing: list[object] = []


def signature(batch: Batch) -> object:
    """Equal for batches whose passes differ only in what tensors hold."""
    several = () if batch.positions is None else tuple(x.shape for x in vars(batch.positions).values())
    place = batch.places.start if isinstance(batch.places, slice) else None
    return batch.known, place, several, {name: x.shape for name, x in batch.host.items()}


class Captured(Generic[T]):
    """Passes over a batch, captured.

    Args:
        batch: its memory is the graph's from now on.
        run: the passes; they must have run once for a batch of this shape, so that nothing is left to be set up.

    Attributes:
        found: what `run` returned. Its tensors hold nothing before the first `replay`.

    Raises:
        RuntimeError: they cannot be captured; the message is a clause that says why.
    """

    def __init__(self, batch: Batch, run: Callable[[Batch], T]) -> None:
        self._batch, self._graph = _standing(batch), torch.cuda.CUDAGraph()
        try:
            self._capture(run)
        except BaseException:
            self._give_back()
            raise

    def _capture(self, run: Callable[[Batch], T]) -> None:
        device = self._batch.clean.device
        with torch.cuda.device(device), Changes() as changes:
            changes.note(lambda: _capturing.remove(self) if self in _capturing else None)
            _capturing.append(self)
            if _capturing[0] is not self:
                raise RuntimeError("another thread captures passes")
            changes.note(partial(NOTHING_IS_SENT.set, False))
            NOTHING_IS_SENT.set(True)
            # Where a capture is lost, torch leaves its stream behind as the current one.
            here, aside = torch.cuda.current_stream(), _aside(device)
            changes.note(partial(torch.cuda.set_stream, here))
            # On the capture's own stream, for which libraries set up memory of their own.
            changes.note(partial(here.wait_stream, aside))
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                waited = _rehearsed(partial(run, self._batch))
            if waited is not None:
                raise RuntimeError(f"the host waits for the device in {waited}")
            # Other threads may do what they like meanwhile.
            with torch.cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
                self.found = run(self._batch)

    def replay(self, batch: Batch) -> T:
        """`found`, now of another batch with the same `signature`. The next replay overwrites what its tensors hold."""
        assert self._batch.piece is not None and batch.piece is not None
        self._batch.piece.copy_(batch.piece)
        self._graph.replay()
        return self.found

    def close(self) -> None:
        """Give the memory back; `found` is no more."""
        del self.found
        self._give_back()

    def _give_back(self) -> None:
        self._graph.reset()
        torch.cuda.empty_cache()


class _Unread(dict[str, Tensor]):
    """In place of the host's copy of a batch, which is another's when the passes are replayed."""

    def __missing__(self, name: str) -> Tensor:
        raise RuntimeError(f"the passes depend on what the host knows of {name!r}")


def _standing(batch: Batch) -> Batch:
    """The batch as passes see it that are replayed for others: on the host it has shapes, and no values."""
    index, pair = (x.to("meta") for x in (batch.index, batch.pair))
    found = replace(batch, index=index, pair=pair, host=_Unread(), _moved={})
    vars(found)["known"] = batch.known  # which the signature holds
    return found


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures: libraries keep memory for each."""
    return torch.cuda.Stream(device)


def _rehearsed(run: Callable[[], object]) -> str | None:
    """Run as in a capture, but for good; the line in which the host waits for the device, if it does."""
    with Changes() as changes, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # Models ask this, and go another way where they must not wait.
        asked = "is_current_stream_capturing"
        changes.note(partial(setattr, torch.cuda, asked, getattr(torch.cuda, asked)))
        setattr(torch.cuda, asked, lambda: True)
        # It warns where an error could be caught by the model, and would stop other threads.
        changes.note(partial(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode()))
        torch.cuda.set_sync_debug_mode("warn")
        run()
    waits = (f"{Path(each.filename).name}:{each.lineno}" for each in said if _WAITED in str(each.message))
    return next(waits, None)
