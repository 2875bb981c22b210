"""The metric of the runs of a batch, measured without a wait and checked when it is fetched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from itertools import islice

import torch
from torch import Tensor

from ..errors import warn
from ..forward import Batch, download
from ..metrics import POSITIONS, MetricBatch, check_finite, check_metric_values, misspelled
from .asked import Request

# Logits of SmolLM2-135M differ from those in float64 by 3 to 9 eps of their size in float32, by 1 to 2 in half
# precision.
_ERROR, DRAWS = 8, 2


class Measurement:
    """The metric of runs of a batch.

    Values stay where the logits are, so that nothing waits for a device between runs; `fetch` brings them to the host
    and checks them there.

    Args:
        request: whose metric.
        batch: the examples.
        clean, corrupted: logits [E, V] of the model on the two prompts, [E, P, V] of several positions, or with only
            the tokens of `Request.runner`; so are those of all other runs.

    Attributes:
        given: what the metric gets with the logits.
    """

    def __init__(self, request: Request, batch: Batch, clean: Tensor, corrupted: Tensor) -> None:
        self.request, self.batch = request, batch
        # Of each run that was measured, in order: values [E], each example's sum of logits [E], and the logits' dtype.
        self.waiting: list[tuple[Tensor, Tensor, torch.dtype]] = []
        picked = request.metric.of_answers and request.arch.picks_logits
        few = picked and clean.shape[-1] == len(batch.answer_tokens)
        where = batch.positions
        self.given = MetricBatch(
            answers=batch.answer_columns if few else batch.answers,
            clean_logits=clean.detach(),
            corrupted_logits=corrupted.detach(),
            lengths=batch.lengths,
            index=batch.index,
            **({} if where is None else {name: getattr(where, name) for name in POSITIONS}),
        )
        # How many times likelier the answers' variants are, [E, 2], until that is said.
        self.misspelled: list[Tensor] = []
        variants = batch.variant_columns if few else batch.variants
        # Of passes that are captured nobody knows for which examples they will be replayed.
        unseen = batch.index.is_meta or not request.looked_at.issuperset(batch.index.tolist())
        if variants is not None and where is None and unseen:
            self.misspelled.append(misspelled(clean.detach(), self.given.answers, variants))
        self._noise: list[Tensor] = []

    def of(self, batch: Batch) -> Measurement:
        """What was measured in the same memory, now that the same passes have run over another batch."""
        other = copy(self)
        other.batch, other.waiting, other.misspelled = batch, [*self.waiting], [*self.misspelled]
        return other

    def values(self, logits: Tensor) -> Tensor:
        """The metric of each example of a run, [E]; raises InputError if it is no such tensor."""
        values = self.request.metric(logits, self.given)
        check_metric_values(values, self.given, logits)
        values = self.weighed(values)
        # A copy, as a metric may use its result again.
        kept, sums = (
            values.detach().clone().to(logits.device),
            logits.detach().flatten(1).sum(1, dtype=self.request.arch.accumulate),
        )
        self.waiting.append((kept, sums, logits.dtype))
        return values

    def weighed(self, values: Tensor) -> Tensor:
        """Values of the examples [E] times the pairs' weights, so that results are means over pairs by these."""
        weights = self.batch.pair_weights
        return values if weights is None else values * weights.to(values.device, values.dtype)

    def moved(self, logits: Tensor) -> None:
        """Measure the run DRAWS times more, its logits moved at random by as much as the run's rounding moves them."""
        arch = self.request.arch
        wide = logits.to(arch.accumulate).flatten(0, -2)  # [E·P, V]
        size = wide.where(wide.isfinite(), 0).square().mean(1, keepdim=True).sqrt()
        step = 2 * torch.finfo(arch.dtype).eps + _ERROR * torch.finfo(torch.float32).eps
        if not self._noise:
            seeds = (torch.Generator().manual_seed(draw) for draw in range(DRAWS))
            drawn = [torch.randn(sum(wide.shape), generator=seed).to(wide.dtype) for seed in seeds]
            self._noise = [self.request.sent.on(wide.device, numbers) for numbers in drawn]
        for numbers in self._noise:
            # Each example takes the numbers from another one on.
            near = wide + step * size * numbers.unfold(0, wide.shape[1], 1)[: len(wide)]
            self.values(near.view(logits.shape))

    def check(self, arrived: Iterator[Tensor]) -> list[Tensor]:
        """The values that were `waiting`, now on the host; says what is wrong with them, or `misspelled`."""
        times, values = list(islice(arrived, len(self.misspelled))), list(islice(arrived, len(self.waiting)))
        sums, dtypes = list(islice(arrived, len(self.waiting))), [dtype for *_, dtype in self.waiting]
        self.misspelled, self.waiting = [], []
        seen, index = self.request.looked_at, self.batch.index
        if times and not seen.issuperset(index.tolist()):
            seen.update(index.tolist())
            if times[0].any():
                self._warn_of_spelling(times[0])
        for found, total, dtype in zip(values, sums, dtypes, strict=True):
            check_finite(found, index, total, dtype)
        return values

    def unread(self) -> list[Tensor]:
        """What is to be brought to the host for `check`."""
        return [*self.misspelled, *(values for values, *_ in self.waiting), *(sums for _, sums, _ in self.waiting)]

    def _warn_of_spelling(self, times: Tensor) -> None:
        """Once for all data."""
        data = self.request.data
        row, side = divmod(int(times.argmax()), 2)
        example, often = int(self.batch.index[row]), f"{float(times[row, side]):,.0f}"
        prompt = "" if data.prompts is None else f" (… {data.prompts[example][0][-30:]!r})"
        assert data.variants is not None
        twin, own = (int(ids[example, side].max()) for ids in (data.variants, data.answers))
        warn(
            f"example {example}{prompt}: the model finds the {('good', 'bad')[side]} answer {often} times likelier as "
            f"token {twin} than as token {own}, which differs only in a leading space. Give the one that you mean by "
            "its id."
        )
        self.request.looked_at.update(range(len(data)))


def fetch(measured: Sequence[Measurement], *others: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What was measured since the last time, and other tensors of the same device, on the CPU.

    One copy brings all of them, for which the host waits once. Warns of answers that the model expects otherwise
    spelled; raises InputError if a value is not finite.
    """
    arrived = iter(download(*(x for one in measured for x in one.unread()), *others))
    values = [x for one in measured for x in one.check(arrived)]
    return values, list(arrived)


def variance_by_rounding(values: Tensor, moved: Sequence[Tensor]) -> Tensor:
    """The variance of each example's metric by rounding, float64 [E], of a run's `values` and those of its `moved`."""
    variance = torch.zeros(len(values), dtype=torch.float64)
    for found in moved:
        variance += (found - values).double().square() / len(moved)
    return variance
