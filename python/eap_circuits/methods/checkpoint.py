"""What exact patching has measured so far, in a file from which the same request goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import expected
from ..files import DAMAGED, check_writable, write_whole
from ..forward import Batch, some_of
from ..tasks import PairedDataset
from .identity import request_identity
from .spec import AttributionRequest
from .statistics import Statistics

_FORMAT = "eap-circuits/exact-2"
_SUMMED = ("total", "squares")


class Checkpoint:
    """What has been measured so far, in a file from which the same request goes on.

    Args:
        request: names the `.safetensors` file, or none to keep nothing.
        statistics: the sums that are kept.

    Raises:
        InputError: the file is of another request, damaged, or cannot be written.
    """

    def __init__(self, request: AttributionRequest, statistics: Statistics) -> None:
        self.sums = statistics.sums
        self.finished = torch.zeros(len(request.data), dtype=torch.bool)
        # Of the batch that is being measured: its examples, the edges done, and their scores, not yet in the sums.
        self._current = torch.zeros_like(self.finished)
        self.done = torch.zeros_like(self.sums["total"], dtype=torch.bool)
        self._partial = {name: torch.zeros_like(self.sums[name]) for name in _SUMMED if name in self.sums}
        self._request = hashlib.sha256(json.dumps(request_identity(request), sort_keys=True).encode()).hexdigest()
        self._path = None if request.checkpoint is None else check_writable(request.checkpoint)
        self._saved = time.monotonic()
        if self._path is not None:
            if self._path.suffix != ".safetensors":
                raise expected("checkpoint", "a name ending in .safetensors", repr(self._path.name))
            if self._path.exists():
                self._load(self._path)

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                found = metadata.get("format"), metadata.get("request")
                if found == (_FORMAT, self._request):
                    for name, tensor in self._tensors().items():
                        tensor.copy_(file.get_tensor(name))
                    return
        except DAMAGED as error:
            raise expected(str(path), "a checkpoint", f"a file that cannot be read ({error})") from error
        raise expected(str(path), "a checkpoint of this model, data and request", f"another one ({found[0]})")

    def _tensors(self) -> dict[str, Tensor]:
        partial = {f"partial {name}": tensor for name, tensor in self._partial.items()}
        return {**self.sums, **partial, "done": self.done, "current": self._current, "finished": self.finished}

    def remaining(self, data: PairedDataset, batches: Iterable[Batch]) -> Iterator[Batch]:
        """What is still to be measured of the batches; one that was begun comes by itself."""
        for batch in batches:
            begun, finished = self._current[batch.index], self.finished[batch.index]
            for which in (begun, ~begun & ~finished):
                if which.all():
                    yield batch
                elif which.any():
                    yield some_of(data, batch, which.nonzero()[:, 0])

    def begin(self, batch: Batch) -> None:
        """Go on with a batch; what has been measured of another one that was not finished is forgotten."""
        examples = torch.zeros_like(self.finished)
        examples[batch.index] = True
        if not torch.equal(examples, self._current):
            self._current.copy_(examples)
            self.done.zero_()
            for tensor in self._partial.values():
                tensor.zero_()

    def add(self, u: int, v: int, batch: Batch, scores: Tensor) -> None:
        """An edge's scores of the batch's examples, float64 [E]."""
        self._partial["total"][u, v] += scores.sum()
        if "squares" in self._partial:
            self._partial["squares"][u, v] += scores.square().sum()
        if "examples" in self.sums:
            self.sums["examples"][batch.index, u, v] = scores.float()
        self.done[u, v] = True

    def finish(self) -> None:
        """All edges are done of the current batch."""
        for name, tensor in self._partial.items():
            self.sums[name] += tensor
            tensor.zero_()
        self.finished |= self._current
        self._current.zero_()
        self.done.zero_()
        self.save()

    def save(self, every: float = 0.0) -> None:
        """Write the file, unless it was written less than so many seconds ago."""
        if self._path is None or time.monotonic() - self._saved < every:
            return
        metadata = {"format": _FORMAT, "request": self._request}
        write_whole(self._path, lambda file: save_file(self._tensors(), file, metadata=metadata))
        self._saved = time.monotonic()
