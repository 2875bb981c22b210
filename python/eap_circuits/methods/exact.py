"""Exact edge scores: each edge alone carries its corrupted value, and the metric is measured."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..capture import Batch, PatchedEdges, Progress, Run
from ..errors import expected
from ..files import DAMAGED, check_writable, write_whole
from ..graph import Circuit, Graph
from .statistics import Statistics

SECONDS_BETWEEN_SAVES = 60.0
_FORMAT = "eap-circuits/exact-1"


def edges_to_score(graph: Graph, edges: object) -> Tensor:
    """bool [S, R] of what `attribute(edges=)` names: all edges, a circuit's, or a mask's."""
    if edges is None:
        return graph.edge_mask
    if isinstance(edges, Circuit):
        if edges.graph != graph:
            raise expected("edges", f"a circuit of {graph!r}", f"one of {edges.graph!r}")
        return edges.mask
    if not isinstance(edges, Tensor) or edges.dtype != torch.bool or edges.shape != graph.edge_mask.shape:
        found = f"{edges.dtype} {list(edges.shape)}" if isinstance(edges, Tensor) else type(edges).__name__
        raise expected("edges", f"a circuit or a bool mask {list(graph.edge_mask.shape)}", found)
    return edges.cpu() & graph.edge_mask


class Checkpoint:
    """What has been measured so far, in a file from which the same request goes on.

    Args:
        path: a `.safetensors` file, or None to keep nothing.
        request: what must be the same, plain JSON values.
        statistics: the sums that are kept.

    Raises:
        InputError: the file is of another request, damaged, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None, request: dict[str, Any], statistics: Statistics) -> None:
        self.sums = statistics.sums
        self.done = torch.zeros_like(self.sums["total"], dtype=torch.bool)  # of the current batch
        self.batches = 0
        self._request = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        self._path = None if path is None else check_writable(path)
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
                    for name, tensor in (*self.sums.items(), ("done", self.done)):
                        tensor.copy_(file.get_tensor(name))
                    self.batches = int(metadata["batches"])
                    return
        except DAMAGED as error:
            raise expected(str(path), "a checkpoint", f"a file that cannot be read ({error})") from error
        raise expected(str(path), "a checkpoint of this model, data and request", f"another one ({found[0]})")

    def add(self, u: int, v: int, batch: Batch, scores: Tensor) -> None:
        """An edge's scores of the batch's examples, float64 [E]."""
        self.sums["total"][u, v] += scores.sum()
        if "squares" in self.sums:
            self.sums["squares"][u, v] += scores.square().sum()
        if "examples" in self.sums:
            self.sums["examples"][batch.index, u, v] = scores.float()
        self.done[u, v] = True

    def next_batch(self) -> None:
        self.batches += 1
        self.done.zero_()
        self.save()

    def save(self, every: float = 0.0) -> None:
        """Write the file, unless it was written less than so many seconds ago."""
        if self._path is None or time.monotonic() - self._saved < every:
            return
        metadata = {"format": _FORMAT, "request": self._request, "batches": str(self.batches)}
        tensors = {**self.sums, "done": self.done}
        write_whole(self._path, lambda file: save_file(tensors, file, metadata=metadata))
        self._saved = time.monotonic()


def exact_scores(
    run: Run,
    graph: Graph,
    batches: Iterable[Batch],
    mask: Tensor,
    checkpoint: Checkpoint,
    tokens: int,
    progress: Progress | None,
) -> None:
    """Add m(clean) − m(edge corrupted) of every edge in the mask and of every example to the checkpoint's sums."""
    total = int(mask.sum()) * len(run.data)
    finished = 0
    for number, batch in enumerate(batches):
        if number < checkpoint.batches:
            finished += int(mask.sum()) * batch.n_examples
            continue
        finished += int(checkpoint.done.sum()) * batch.n_examples
        patched = PatchedEdges(run.runner(graph, batch), graph, run.constants)
        clean = run.values(patched.clean_logits, batch, patched.clean_logits, patched.corrupted_logits)
        together = max(1, tokens // batch.clean.numel())
        for edges in _passes(patched, mask & ~checkpoint.done, together):
            for (u, v), logits in zip(edges, patched.logits(edges), strict=True):
                values = run.values(logits, batch, patched.clean_logits, patched.corrupted_logits)
                checkpoint.add(u, v, batch, (clean - values).double().cpu())
            checkpoint.save(SECONDS_BETWEEN_SAVES)
            finished += len(edges) * batch.n_examples
            if progress is not None:
                # In examples, as of every method.
                progress(finished * len(run.data) // max(total, 1), len(run.data))
        checkpoint.next_batch()


def _passes(patched: PatchedEdges, mask: Tensor, size: int) -> Iterable[list[tuple[int, int]]]:
    """Edges that run together: from one layer, those of one sender beside each other."""
    by_layer: dict[int, list[tuple[int, int]]] = {}
    for u, v in mask.nonzero().tolist():
        by_layer.setdefault(patched.layer(v), []).append((u, v))
    for edges in by_layer.values():
        for first in range(0, len(edges), size):
            yield edges[first : first + size]
