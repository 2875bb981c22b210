"""Batches whose passes are replayed from a CUDA graph: small models are bound by launches, and a graph is one.

The first batch of a shape runs as ever. So does the second, whose passes are then captured. The third runs both ways:
if its results differ, a warning says so and nothing is replayed. All further batches of the shape are replayed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from torch import Tensor

from ..errors import out_of_memory, reason, warn
from ..forward import Batch, Captured, logit_tolerance, signature
from ..metrics import METRICS
from ..ranks import count
from ..request import Request
from .fitting import budget
from .rates import rates_of

if TYPE_CHECKING:
    from typing_extensions import Self

Left = TypeVar("Left")
Found = TypeVar("Found")
# To capture a shape costs about as much as three of its batches.
FEWEST = 8
_SECONDS = 4e-6  # the least that a launch takes the host; not yet measured


class Work(NamedTuple):
    """What the passes of a batch take, roughly.

    Args:
        operations: of floating point, on the device.
        launches: of each layer, at least.
        bytes: of the passes as ever, and of a graph of them with what they leave.
    """

    operations: int
    launches: int
    bytes: int


class Replayable(ABC, Generic[Left, Found]):
    """What one batch after another gives, where a pass has at most so many tokens.

    `Left` is what a batch's passes leave on the device, `Found` the batch's result.
    """

    @abstractmethod
    def run(self, batch: Batch, tokens: int) -> Found:
        """The batch as ever."""

    @abstractmethod
    def record(self, batch: Batch, tokens: int) -> Left:
        """Its passes alone, which may be captured."""

    @abstractmethod
    def finish(self, left: Left, batch: Batch) -> Found:
        """The result of the batch, whose passes left this."""

    @abstractmethod
    def numbers(self, found: Found) -> Iterable[Tensor]:
        """Of a result, what must not change when its passes are replayed."""

    @abstractmethod
    def work(self, batch: Batch, tokens: int) -> Work | str:
        """Of the batch's passes; or why they cannot be captured, as a clause."""


class Replays(Generic[Left, Found]):
    """Results of one batch after another; on exit the memory of what was captured is given back.

    Args:
        refused: why no passes can be captured, as a clause, if that is known already.
    """

    def __init__(self, request: Request, batches: Replayable[Left, Found], refused: str | None = None) -> None:
        self._request, self._of = request, batches
        self._refused = why_not(request) or refused
        self._kept_from = "no two batches in a row are of one shape"
        self._shape: object = None
        self._captured: Captured[Left] | None = None
        self._trusted = False
        self._batches = self._replayed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._forget()

    def told(self) -> dict[str, str]:
        """What results say of it, where there is a GPU."""
        if self._request.arch.device.type != "cuda":
            return {}
        why = "" if self._replayed else f": {self._refused or self._kept_from}"
        return {"replayed": f"{self._replayed} of {self._batches} batches{why}"}

    def run(self, batch: Batch, tokens: int) -> Found:
        """The batch's result."""
        self._batches += 1
        if self._refused is not None:
            return self._of.run(batch, tokens)
        try:
            return self._run(batch, tokens)
        except BaseException as error:
            self._refuse("memory ran out" if out_of_memory(error) else reason(error))
            raise

    def _run(self, batch: Batch, tokens: int) -> Found:
        shape = signature(batch), tokens
        if shape != self._shape:
            self._forget()
            self._shape = shape
            return self._of.run(batch, tokens)
        if self._captured is not None:
            return self._again(self._captured, batch, tokens)
        found, unpaid = self._of.run(batch, tokens), self._unpaid(batch, tokens)
        if unpaid is not None:
            self._kept_from = unpaid
            return found
        try:
            self._captured = Captured(batch, partial(self._of.record, tokens=tokens))
            self._kept_from = "no more of their shape followed"
        except Exception as error:  # of any kind, in a model's own code
            self._refuse(reason(error))
        return found

    def _again(self, captured: Captured[Left], batch: Batch, tokens: int) -> Found:
        replayed = self._of.finish(captured.replay(batch), batch)
        if self._trusted:
            self._replayed += 1
            return replayed
        found = self._of.run(batch, tokens)
        self._trusted = self._alike(replayed, found)
        if not self._trusted:
            name = type(self._request.arch.model).__name__
            warn(f"{name}: passes are not replayed, as results differ then from those of passes that are not.")
            self._refuse("results differ then")
        return found

    def _alike(self, replayed: Found, plain: Found) -> bool:
        most = logit_tolerance(self._request.arch)
        pairs = zip(self._of.numbers(replayed), self._of.numbers(plain), strict=True)
        wide = ((found.double(), right.double()) for found, right in pairs)
        return all(bool(((found - right).norm() <= most * right.norm()).all()) for found, right in wide)

    def _unpaid(self, batch: Batch, tokens: int) -> str | None:
        """Why it does not pay to capture the passes of a batch, as a clause."""
        request = self._request
        if len(request.data) < FEWEST * batch.n_examples:
            return f"the data make fewer than {FEWEST} such batches"
        work, rates = self._of.work(batch, tokens), rates_of(request)
        if isinstance(work, str):
            return work
        launches = work.launches * len(request.arch.layers)
        if rates is None or work.operations / rates.passes > launches * _SECONDS:
            return "passes are bound by work, not by launches"
        if work.bytes > budget(request):
            return "there is no memory for passes and a graph of them"
        return None

    def _refuse(self, why: str) -> None:
        self._refused = why
        self._forget()

    def _forget(self) -> None:
        if self._captured is not None:
            self._captured.close()
        self._captured, self._trusted, self._shape = None, False, None


def why_not(request: Request) -> str | None:
    """Why no passes of a request can be captured, as a clause."""
    arch = request.arch
    if arch.device.type != "cuda":
        return "the model is not on a GPU"
    if arch.encoder:
        return "an encoder-decoder's passes have not been captured yet"
    if arch.keeps_states and request.reuse_prefix:
        return "passes behind states of prefixes have not been captured yet"
    if count() > 1:
        return "processes share the work"
    if len(arch.devices) > 1 or any(hasattr(module, "_hf_hook") for module in arch.model.modules()):
        return "the model is on several devices, or its weights are elsewhere"
    quantised = getattr(arch.model.config, "quantization_config", None) is not None
    if quantised or not all(weight.is_floating_point() for weight in arch.model.parameters()):
        return "the model is quantised"
    if arch.hooked:
        return "the model has hooks, which would not be called"
    if request.metric not in METRICS.values():
        return "the metric is one's own, and may compute on the host"
    return None


def layer_weights(request: Request) -> int:
    """How many numbers the weights of all layers are."""
    return sum(weight.numel() for layer in request.arch.layers for weight in layer.module.parameters())
