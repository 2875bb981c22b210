"""Everything that can be wrong with a model, its data and a metric is said here, before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Architecture, bind
from ..errors import expected, one_of
from ..metrics import MetricBatch, check_metric_values, get_metric
from ..tasks import PairedDataset
from .batches import Batch
from .rules import Rules

ABLATIONS = ("patching",)
Progress = Callable[[int, int], None]  # (examples done, examples in all)


@dataclass(frozen=True)
class Run:
    """A checked request: the bound model, the data, the metric and the backward rules."""

    arch: Architecture
    data: PairedDataset
    metric: Callable[[Tensor, MetricBatch], Tensor]
    rules: Rules | None = None

    def values(self, logits: Tensor, batch: Batch, clean: Tensor, corrupted: Tensor) -> Tensor:
        """The metric of each example: logits [E, V] -> [E]; raises InputError where it is not finite."""
        given = MetricBatch(
            answers=batch.answers,
            clean_logits=clean.detach(),
            corrupted_logits=corrupted.detach(),
            lengths=batch.lengths,
            index=batch.index,
        )
        values = self.metric(logits, given)
        check_metric_values(values, given, logits)
        return values


def prepare(model: nn.Module, data: PairedDataset, metric: object, ablation: str, batch_size: int | None) -> Run:
    """Check a request; raises InputError with what is wrong."""
    run = Run(bind(model), data, get_metric(metric))  # type: ignore[arg-type]
    one_of("ablation", ablation, ABLATIONS)
    if not isinstance(data, PairedDataset):
        raise expected("data", "a PairedDataset", type(data).__name__)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise expected("batch_size", "a whole number of at least 1, or None", repr(batch_size))
    _check_tokens(run.arch.model, data)
    return run


def _check_tokens(model: Any, data: PairedDataset) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for name, tokens in (("clean", data.clean), ("corrupted", data.corrupted), ("answers", data.answers)):
        beyond = (tokens >= vocabulary).flatten(1).any(1).nonzero()
        if len(beyond):
            example = int(beyond[0])
            raise expected(
                f"{name} of example {example}",
                f"token ids below the model's {vocabulary}",
                int(tokens[example].max()),
            )
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = int(torch.argmax(data.lengths))
    if limit is not None and int(data.lengths[longest]) > limit:
        raise expected(f"example {longest}", f"at most the model's {limit} tokens", f"{int(data.lengths[longest])}")
