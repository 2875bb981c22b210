"""Batches whose passes are replayed from a CUDA graph: small models are bound by launches, and a graph is one.

The first batch of a shape runs as ever. So does the second, whose passes are then captured. The third runs both ways:
if its scores differ, a warning says so and nothing is replayed. All further batches of the shape are replayed. Senders
meet receivers outside the graph, as what our own kernels read of the host is sent anew for each call.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

from torch import nn

from ...budget import budget
from ...errors import out_of_memory, reason, warn
from ...forward import Batch, Captured, logit_tolerance, signature
from ...metrics import METRICS
from ...ranks import count
from ...request import Measurement
from ..spec import AttributionRequest
from ..statistics import BatchScores, Side, batch_bytes
from .plans import pass_bytes, rates_of

if TYPE_CHECKING:
    from typing_extensions import Self

    from .method import GradientMethod, Passes

# To capture a shape costs about as much as three of its batches.
FEWEST = 8
# A batch is at least this many launches for each layer (tests/circuits/test_counts.py counts), and a launch takes the
# host at least this many seconds; not yet measured.
LAUNCHES, _SECONDS = 70, 4e-6
# Operations of a forward and backward pass for a weight and a token: gradients of weights are not wanted.
_OPERATIONS = 4


class Recorded(Protocol):
    """What all passes of a batch leave on the device."""

    @property
    def senders(self) -> Side: ...
    @property
    def receivers(self) -> Side: ...
    @property
    def measured(self) -> Measurement: ...


class Replays:
    """Scores of one batch after another; on exit the memory of what was captured is given back."""

    def __init__(self, method: GradientMethod, request: AttributionRequest) -> None:
        self._method, self._request = method, request
        self._refused = why_not(method, request)
        self._kept_from = "no two batches in a row are of one shape"
        self._shape: object = None
        self._captured: Captured[Recorded] | None = None
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

    def score(self, batch: Batch, passes: Passes) -> BatchScores:
        """Scores of the batch's examples."""
        self._batches += 1
        if self._refused is not None:
            return self._plain(batch, passes)
        try:
            return self._score(batch, passes)
        except BaseException as error:
            self._refuse("memory ran out" if out_of_memory(error) else reason(error))
            raise

    def _score(self, batch: Batch, passes: Passes) -> BatchScores:
        shape = signature(batch), passes
        if shape != self._shape:
            self._forget()
            self._shape = shape
            return self._plain(batch, passes)
        if self._captured is not None:
            return self._again(self._captured, batch, passes)
        found, unpaid = self._plain(batch, passes), self._unpaid(batch, passes)
        if unpaid is not None:
            self._kept_from = unpaid
            return found
        try:
            self._captured = Captured(batch, partial(self._method.record, self._request, passes=passes))
            self._kept_from = "no more of their shape followed"
        except Exception as error:  # of any kind, in a model's own code
            self._refuse(reason(error))
        return found

    def _again(self, captured: Captured[Recorded], batch: Batch, passes: Passes) -> BatchScores:
        left = captured.replay(batch)
        replayed = BatchScores(self._request, batch)
        replayed.add(left.senders, left.receivers)
        replayed.include(left.measured.of(batch))
        if self._trusted:
            self._replayed += 1
            return replayed
        found = self._plain(batch, passes)
        self._trusted = self._alike(replayed, found)
        if not self._trusted:
            name = type(self._request.arch.model).__name__
            warn(f"{name}: passes are not replayed, as scores differ then from those of passes that are not.")
            self._refuse("scores differ then")
        return found

    def _plain(self, batch: Batch, passes: Passes) -> BatchScores:
        return self._method.score(self._request, batch, passes)

    def _alike(self, replayed: BatchScores, plain: BatchScores) -> bool:
        most = logit_tolerance(self._request.arch)
        pairs = [(replayed.sums[name].double(), right.double()) for name, right in plain.sums.items()]
        return all(bool(((found - right).norm() <= most * right.norm()).all()) for found, right in pairs)

    def _unpaid(self, batch: Batch, passes: Passes) -> str | None:
        """Why it does not pay to capture the passes of a batch, as a clause."""
        request, tokens = self._request, batch.clean.numel() * passes.together
        if passes.held < len(passes.path):
            return "a batch's points are contracted in several parts"
        if len(request.data) < FEWEST * batch.n_examples:
            return f"the data make fewer than {FEWEST} such batches"
        rates, layers = rates_of(request), request.arch.layers
        weights = sum(weight.numel() for layer in layers for weight in layer.module.parameters())
        if rates is None or _OPERATIONS * tokens * weights / rates.passes > LAUNCHES * len(layers) * _SECONDS:
            return "passes are bound by work, not by launches"
        # The graph's own memory, beside that of batches that run as ever.
        if 2 * pass_bytes(request, tokens) + batch_bytes(request, batch.n_examples) > budget(request):
            return "there is no memory for passes and a graph of them"
        return None

    def _refuse(self, why: str) -> None:
        self._refused = why
        self._forget()

    def _forget(self) -> None:
        if self._captured is not None:
            self._captured.close()
        self._captured, self._trusted, self._shape = None, False, None


def why_not(method: GradientMethod, request: AttributionRequest) -> str | None:
    """Why no passes of a request can be captured, as a clause."""
    arch = request.arch
    if arch.device.type != "cuda":
        return "the model is not on a GPU"
    if not method.replayed:
        return f"{method.name} contracts between its passes"
    if arch.encoder:
        return "an encoder-decoder's passes have not been captured yet"
    if count() > 1:
        return "processes share the work"
    modules = list(arch.model.modules())
    if len(arch.devices) > 1 or any(hasattr(module, "_hf_hook") for module in modules):
        return "the model is on several devices, or its weights are elsewhere"
    quantised = getattr(arch.model.config, "quantization_config", None) is not None
    if quantised or not all(weight.is_floating_point() for weight in arch.model.parameters()):
        return "the model is quantised"
    if any(map(_hooks, modules)):
        return "the model has hooks, which would not be called"
    if request.metric not in METRICS.values():
        return "the metric is one's own, and may compute on the host"
    return None


def _hooks(module: nn.Module) -> bool:
    """Has it hooks, except for those with which transformers returns what layers give?"""
    kinds = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return any("output_capturing" not in str(hook.__module__) for hooks in kinds for hook in hooks.values())
