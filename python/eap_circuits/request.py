"""Everything that can be wrong with a model, its data and a metric is said here, before any work is done."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adapters import Architecture, bind
from .errors import InputError, expected, flag, function, instance, one_of, shown, warn, whole
from .forward import Batch, Constants, Runner, download, make_batches, upload, why_not_reused, zeros
from .graph import Graph, Heads
from .metrics import Metric, MetricBatch, check_finite, check_metric_values, get_metric, misspelled
from .recording import ABLATIONS, ablation_of, different_throughout
from .tasks import PairedDataset

if TYPE_CHECKING:
    from typing_extensions import Self

# Logits of SmolLM2-135M differ from those in float64 by 3 to 9 eps of their size in float32, by 1 to 2 in half
# precision.
_ERROR, DRAWS = 8, 2
_LARGEST_BATCH = 2**31  # more examples than there are
Progress = Callable[[int, int], None]  # (examples done, examples in all)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `attribute`, `plan`, `evaluate` and the others are asked, checked: the bound model, the data, the metric,
    the ablation, and how the data are cut into batches.

    Args:
        constants: what the ablation puts in place of contributions, once `with_constants` has found them; None for
            patching.
        memory: bytes that the run may take beside the model and the data; None for a share of what is free.
    """

    arch: Architecture
    data: PairedDataset
    metric: Metric
    ablation: str | Constants = "patching"
    ablation_data: PairedDataset | None = None
    constants: Constants | None = None
    batch_size: int | None = None
    reuse_prefix: bool = True
    memory: int | None = None
    looked_at: set[int] = field(default_factory=set, repr=False)  # examples whose answers' spelling was compared

    def verified(self, heads: Heads) -> Self:
        """The request without prefix reuse if the model's cache cannot serve, which a warning says; the model must be
        borrowed already."""
        why = why_not_reused(self.arch, heads, self.data, self.reuse_prefix)
        if why is None:
            return self
        name = type(self.arch.model).__name__
        warn(f"{name}: prefixes are not reused, as its cache cannot serve ({why}).")
        return replace(self, reuse_prefix=False)

    def with_constants(self) -> Self:
        """The request with its constants, for which means are taken; the model must be borrowed already."""
        find = ablation_of(self.ablation).constants
        return replace(self, constants=find and find(self.arch, self.ablation_data or self.data))

    def batches(self, tokens: int) -> Iterator[Batch]:
        """The data in batches, of at most this many tokens where the user names no size."""
        return make_batches(self.data, self.batch_size, self.reuse_prefix, self.arch.device, tokens)

    def runner(self, graph: Graph, batch: Batch) -> Runner:
        """The model on a batch, with no more logits than the metric looks at."""
        return Runner(self.arch, graph, batch, batch.answer_tokens if self.metric.of_answers else None)


class Measurement:
    """The metric of runs of a batch.

    Values stay where the logits are, so that nothing waits for a device between runs; `fetch` brings them to the host
    and checks them there.

    Args:
        request: whose metric.
        batch: the examples.
        clean, corrupted: logits [E, V] of the model on the two prompts, or [E, U] of `Request.runner`; so are those of
            all other runs.
    """

    def __init__(self, request: Request, batch: Batch, clean: Tensor, corrupted: Tensor) -> None:
        self.request, self.batch = request, batch
        # Of each run that was measured, in order: values [E], each example's sum of logits [E], and the logits' dtype.
        self.waiting: list[tuple[Tensor, Tensor, torch.dtype]] = []
        few = request.metric.of_answers and clean.shape[1] == len(batch.answer_tokens)
        self._given = MetricBatch(
            answers=batch.answer_columns if few else batch.answers,
            clean_logits=clean.detach(),
            corrupted_logits=corrupted.detach(),
            lengths=batch.lengths,
            index=batch.index,
        )
        # How many times likelier the answers' variants are, [E, 2], until that is said.
        self.misspelled: list[Tensor] = []
        variants = batch.variant_columns if few else batch.variants
        if variants is not None and not request.looked_at.issuperset(batch.index.tolist()):
            self.misspelled.append(misspelled(clean.detach(), self._given.answers, variants))
        self._noise: list[Tensor] = []

    def values(self, logits: Tensor) -> Tensor:
        """The metric of each example of a run, [E]; raises InputError if it is no such tensor."""
        values = self.request.metric(logits, self._given)
        check_metric_values(values, self._given, logits)
        # A copy, as a metric may use its result again.
        kept, sums = (
            values.detach().clone().to(logits.device),
            logits.detach().sum(1, dtype=self.request.arch.accumulate),
        )
        self.waiting.append((kept, sums, logits.dtype))
        return values

    def moved(self, logits: Tensor) -> None:
        """Measure the run DRAWS times more, its logits moved at random by as much as the run's rounding moves them."""
        arch = self.request.arch
        wide = logits.to(arch.accumulate)
        size = wide.where(wide.isfinite(), 0).square().mean(1, keepdim=True).sqrt()
        step = 2 * torch.finfo(arch.dtype).eps + _ERROR * torch.finfo(torch.float32).eps
        if not self._noise:
            seeds = (torch.Generator().manual_seed(draw) for draw in range(DRAWS))
            drawn = [torch.randn(sum(logits.shape), generator=seed).to(wide.dtype) for seed in seeds]
            self._noise = upload(wide.device, *drawn)
        for numbers in self._noise:
            # Each example takes the numbers from another one on.
            self.values(wide + step * size * numbers.unfold(0, logits.shape[1], 1)[: len(logits)])

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


def prepare(
    model: nn.Module,
    data: PairedDataset,
    metric: object,
    ablation: str | Constants = "patching",
    batch_size: int | None = None,
    ablation_data: PairedDataset | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
) -> Request:
    """Check a request; raises InputError with what is wrong. Without a metric it is the data's own."""
    instance("data", data, PairedDataset)
    if batch_size is not None:
        batch_size = min(whole("batch_size", batch_size, 1, note=", or None"), _LARGEST_BATCH)
    request = Request(
        arch=bind(model),
        data=data,
        metric=get_metric(data.metric if metric is None else metric),  # type: ignore[arg-type]
        ablation=ablation,
        ablation_data=ablation_data,
        batch_size=batch_size,
        reuse_prefix=flag("reuse_prefix", reuse_prefix),
        memory=parse_bytes(memory),
    )
    _check_ablation(request)
    _check_tokens(request.arch.model, data)
    vocabulary = _vocabulary(request.arch.model)
    if data.variants is not None and (data.variants >= vocabulary).any():
        data = replace(data, variants=data.variants.where(data.variants < vocabulary, -1))
        request = replace(request, data=data)
    # Constants stand in for contributions from the first token on.
    return request if ablation_of(ablation).patches else replace(request, data=different_throughout(data))


def _check_ablation(request: Request) -> None:
    ablation, other = request.ablation, request.ablation_data
    if isinstance(ablation, Constants):
        found, right = ([x.shape[1] for x in each.tensors] for each in (ablation, zeros(request.arch)))
        if found != right:
            raise expected("ablation", f"constants of this model, of widths {right}", found)
        covered, longest = len(ablation.embedding), int(request.data.lengths.max())
        if 1 < covered < longest:
            raise expected("ablation", f"constants for {longest} positions, the data's most, or for all alike", covered)
    else:
        one_of("ablation", ablation, ABLATIONS)
    if other is None:
        return
    entry = ablation_of(ablation)
    if not entry.from_data:
        what = "constants" if isinstance(ablation, Constants) else repr(ablation)
        names = ", ".join(repr(each.name) for each in ABLATIONS.values() if each.from_data)
        raise expected("ablation_data", f"none, except for {names}", f"some for {what}")
    instance("ablation_data", other, PairedDataset)
    _check_tokens(request.arch.model, other, "ablation_data, ")
    longest, covered = int(request.data.lengths.max()), int(other.lengths.max())
    if entry.by_position and covered < longest:
        raise expected("ablation_data", f"prompts of {longest} tokens, the data's most", f"at most {covered}")


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _check_tokens(model: Any, data: PairedDataset, label: str = "") -> None:
    vocabulary = _vocabulary(model)
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


def parse_bytes(memory: object) -> int | None:
    """Bytes of "8GiB", "500 MB" or a whole number of bytes; None stays None."""
    if memory is None:
        return None
    wanted = 'bytes, such as "8GiB" or 500_000_000'
    if not isinstance(memory, str):
        try:
            return whole("memory", memory, 0)
        except InputError as error:
            raise expected("memory", wanted, shown(memory)) from error
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([a-zA-Z]*)\s*", memory)
    if not found or found[2].lower() not in _UNITS:
        raise expected("memory", wanted, repr(memory))
    return int(float(found[1]) * _UNITS[found[2].lower()])


def watched(progress: Progress | bool | None) -> Progress | None:
    """What is called as the work goes on; for True it draws a bar of tqdm's on stderr."""
    if progress is None or progress is False:
        return None
    if progress is not True:
        function("progress", progress, "True, or a function of (done, in all)")
        return progress
    from tqdm.auto import tqdm

    bar: Any = tqdm()

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return show
