"""Everything that can be wrong with a model, its data and a metric is said here, before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Architecture, bind
from .errors import expected, one_of
from .forward import Batch, Constants, Runner, zeros
from .graph import Graph
from .metrics import Metric, MetricBatch, check_metric_values, get_metric
from .recording import ABLATIONS, Rules, different_throughout
from .tasks import PairedDataset

Progress = Callable[[int, int], None]  # (examples done, examples in all)


@dataclass(frozen=True)
class Run:
    """A checked request: the bound model, the data, the metric, the ablation, the backward
    rules, and what is kept of scores.

    `constants`, once `with_constants` has found them, are what the ablation puts in place of contributions; there are
    none for patching.
    """

    arch: Architecture
    data: PairedDataset
    metric: Metric
    ablation: str | Constants = "patching"
    ablation_data: PairedDataset | None = None
    constants: Constants | None = None
    rules: Rules | None = None
    keep: frozenset[str] = frozenset()

    def with_constants(self) -> Run:
        """The request with its constants, for which means are taken; the model is to be borrowed already."""
        if isinstance(self.ablation, Constants):
            return replace(self, constants=self.ablation.on(self.arch))
        find = ABLATIONS[self.ablation].constants
        return replace(self, constants=find and find(self.arch, self.ablation_data or self.data))

    def runner(self, graph: Graph, batch: Batch) -> Runner:
        """The model on a batch, with no more logits than the metric looks at."""
        return Runner(self.arch, graph, batch, batch.answer_tokens if self.metric.of_answers else None)

    def values(self, logits: Tensor, batch: Batch, clean: Tensor, corrupted: Tensor) -> Tensor:
        """The metric of each example: logits [E, V], or [E, U] of `runner`, -> [E]; raises InputError where it is not
        finite."""
        answers = batch.answers
        if self.metric.of_answers and logits.shape[1] == len(batch.answer_tokens):
            answers = torch.searchsorted(batch.answer_tokens, answers.clamp(min=0)).where(answers >= 0, -1)
        given = MetricBatch(
            answers=answers,
            clean_logits=clean.detach(),
            corrupted_logits=corrupted.detach(),
            lengths=batch.lengths,
            index=batch.index,
        )
        values = self.metric(logits, given)
        check_metric_values(values, given, logits)
        return values


def prepare(
    model: nn.Module,
    data: PairedDataset,
    metric: object,
    ablation: str | Constants,
    batch_size: int | None,
    ablation_data: PairedDataset | None = None,
) -> Run:
    """Check a request; raises InputError with what is wrong."""
    run = Run(bind(model), data, get_metric(metric), ablation, ablation_data)  # type: ignore[arg-type]
    if not isinstance(data, PairedDataset):
        raise expected("data", "a PairedDataset", type(data).__name__)
    _check_ablation(run)
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise expected("batch_size", "a whole number of at least 1, or None", repr(batch_size))
    _check_tokens(run.arch.model, data)
    return run if ablation == "patching" else replace(run, data=different_throughout(data))


def _check_ablation(run: Run) -> None:
    ablation, other = run.ablation, run.ablation_data
    if isinstance(ablation, Constants):
        found, right = ([x.shape[1] for x in each.tensors] for each in (ablation, zeros(run.arch)))
        if found != right:
            raise expected("ablation", f"constants of this model, of widths {right}", found)
        covered, longest = len(ablation.embedding), int(run.data.lengths.max())
        if 1 < covered < longest:
            raise expected("ablation", f"constants for {longest} positions, the data's most, or for all alike", covered)
    else:
        one_of("ablation", ablation, ABLATIONS)
    if other is None:
        return
    if isinstance(ablation, Constants) or not ABLATIONS[ablation].from_data:
        what = "constants" if isinstance(ablation, Constants) else repr(ablation)
        names = ", ".join(repr(each.name) for each in ABLATIONS.values() if each.from_data)
        raise expected("ablation_data", f"none, except for {names}", f"some for {what}")
    if not isinstance(other, PairedDataset):
        raise expected("ablation_data", "a PairedDataset", type(other).__name__)
    _check_tokens(run.arch.model, other, "ablation_data, ")
    longest, covered = int(run.data.lengths.max()), int(other.lengths.max())
    if ablation == "mean-positional" and covered < longest:
        raise expected("ablation_data", f"prompts of {longest} tokens, the data's most", f"at most {covered}")


def _check_tokens(model: Any, data: PairedDataset, label: str = "") -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for name, tokens in (("clean", data.clean), ("corrupted", data.corrupted), ("answers", data.answers)):
        beyond = (tokens >= vocabulary).flatten(1).any(1).nonzero()
        if len(beyond):
            example = int(beyond[0])
            raise expected(
                f"{label}{name} of example {example}",
                f"token ids below the model's {vocabulary}",
                int(tokens[example].max()),
            )
    limit = getattr(model.config, "max_position_embeddings", None)
    lengths = data.longer_lengths
    longest = int(torch.argmax(lengths))
    if limit is not None and int(lengths[longest]) > limit:
        raise expected(f"{label}example {longest}", f"at most the model's {limit} tokens", f"{int(lengths[longest])}")
