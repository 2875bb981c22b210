"""Run circuits and measure how much of the model's behaviour they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from eap_kernels import explain

from ..budget import Replays, dealt_in_memory
from ..checkpoint import Checkpoint, Where, opened, remaining, settings_of
from ..display import Result, library
from ..edges import usable
from ..errors import known_arguments, warn
from ..forward import TOKENS_PER_BATCH, Constants, borrowed, one_want_of_memory, zeros
from ..graph import Circuit
from ..modules.loans import gives_back
from ..provenance import called, provenance
from ..ranks import together
from ..recording import ablation_of
from ..request import Progress, Request, as_circuits, check_circuit, prepare, watched
from ..tasks import PairedDataset
from .circuit_values import CircuitValues
from .optimal_ablation import optimal_constants

_DRAWS, _SHARE = 1000, 0.95  # of an interval


@dataclass(frozen=True, eq=False)
class EvaluationResult(Result):
    """A metric of a circuit, of the whole model and of the fully ablated run, per example: float64 [E] each.

    The fully ablated run is that of the circuit without edges; under patching it is the model's run on the corrupted
    prompts. `rounding`: how far the two means of model and ablated run may differ by rounding alone.
    `info` says what ran, as plain JSON values.
    """

    values: Tensor
    clean_values: Tensor
    corrupted_values: Tensor
    rounding: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("values", "clean_values", "corrupted_values"):  # else those of circuits side by side share memory
            object.__setattr__(self, name, usable(getattr(self, name).clone()))

    @property
    def mean(self) -> float:
        """The mean of the circuit's metric over examples."""
        return float(self.values.mean())

    @property
    def clean(self) -> float:
        """The mean of the whole model's metric over the clean prompts."""
        return float(self.clean_values.mean())

    @property
    def corrupted(self) -> float:
        """The mean of the metric with every edge ablated: under patching, the model's on the corrupted prompts."""
        return float(self.corrupted_values.mean())

    @property
    def faithfulness(self) -> float:
        """(m(circuit) − m(corrupted)) / (m(model) − m(corrupted)); NaN if the two differ by no more than rounding."""
        span = self.clean - self.corrupted
        return (self.mean - self.corrupted) / span if abs(span) > self.rounding else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Within which faithfulness stays for 95 % of resamples of the examples; NaN where it is undefined."""
        if self.faithfulness != self.faithfulness:
            return float("nan"), float("nan")
        n = len(self.values)
        picked = torch.randint(n, (_DRAWS, n), generator=torch.Generator().manual_seed(0))
        runs = (self.values, self.clean_values, self.corrupted_values)
        circuit, clean, ablated = (values[picked].mean(1) for values in runs)
        ends = torch.tensor([(1 - _SHARE) / 2, (1 + _SHARE) / 2], dtype=torch.float64)
        low, high = ((circuit - ablated) / (clean - ablated)).nanquantile(ends).tolist()
        return low, high

    def to_pandas(self) -> Any:
        """A pandas DataFrame of the metric of each example: circuit, model, ablated."""
        columns = {"circuit": self.values, "model": self.clean_values, "ablated": self.corrupted_values}
        values = {name: x.tolist() for name, x in columns.items()}
        return library("pandas", "to_pandas()").DataFrame(values)

    def __repr__(self) -> str:
        return (
            f"EvaluationResult(mean={self.mean:.4g}, faithfulness={self.faithfulness:.4g}, "
            f"clean={self.clean:.4g}, corrupted={self.corrupted:.4g}, {len(self.values)} examples)"
        )


@overload
def evaluate(
    model: nn.Module,
    circuit: Circuit,
    data: PairedDataset,
    metric: Any = ...,
    *,
    ablation: str | Constants = ...,
    batch_size: int | None = ...,
    reuse_prefix: bool = ...,
    progress: Progress | bool | None = ...,
    ablation_data: PairedDataset | None = ...,
    memory: int | str | None = ...,
    checkpoint: Where = ...,
) -> EvaluationResult: ...
@overload
def evaluate(
    model: nn.Module,
    circuit: Sequence[Circuit],
    data: PairedDataset,
    metric: Any = ...,
    *,
    ablation: str | Constants = ...,
    batch_size: int | None = ...,
    reuse_prefix: bool = ...,
    progress: Progress | bool | None = ...,
    ablation_data: PairedDataset | None = ...,
    memory: int | str | None = ...,
    checkpoint: Where = ...,
) -> list[EvaluationResult]: ...
@together
@gives_back
@one_want_of_memory
@known_arguments
def evaluate(
    model: nn.Module,
    circuit: Circuit | Sequence[Circuit],
    data: PairedDataset,
    metric: Any = None,
    *,
    ablation: str | Constants = "patching",
    batch_size: int | None = None,
    reuse_prefix: bool = True,
    progress: Progress | bool | None = None,
    ablation_data: PairedDataset | None = None,
    memory: int | str | None = None,
    checkpoint: Where = None,
) -> EvaluationResult | list[EvaluationResult]:
    """Run a circuit on the clean prompts; every edge outside it carries an ablated contribution.

    The model comes back as it was, even after an error. Ranks of a process group share the work, as in `attribute`.

    Args:
        model: a Hugging Face language model (causal, masked, encoder-decoder) or a classifier of prompts.
        circuit: the circuit, or a list of circuits, which share the ablated and the clean run.
        data: clean and corrupted prompts with answers.
        metric: a name in `METRICS`, or a callable (logits [E, V], batch) -> [E], higher is better; by default the
            data's own, `data.metric`.
        ablation: what edges outside the circuit carry: "patching", the sender's contribution in the corrupted run;
            "zero", nothing; "mean", its mean over all tokens of the ablation data's clean prompts; "mean-positional",
            its mean at the same position; constants of `optimal_constants`; or "optimal", constants learned on the
            ablation data for each circuit. Faithfulness is 0 for the circuit without edges, which under "optimal" has
            its own constants. Except under "patching", prompts run from their first token on.
        ablation_data: whose clean prompts are used to compute means or learn constants; by default the data
            themselves.
        batch_size, reuse_prefix, memory, progress, checkpoint: as in `attribute`; results do not depend on them.

    Returns:
        An EvaluationResult, or a list of them for a list of circuits. If model and ablated run differ by no more than
        rounding, faithfulness is NaN, with a warning.

    Raises:
        InputError: a circuit of another graph, or anything that `attribute` refuses.

    Example:
        >>> result = eap.evaluate(model, circuit, data)
        >>> share = result.faithfulness
        >>> small, large = eap.evaluate(model, [scores.select(10), scores.select(40)], data)  # side by side
    """
    call = called(evaluate, locals())
    circuits = as_circuits(circuit)
    progress = watched(progress)
    request = to_evaluate(circuits, model, data, metric, ablation, batch_size, ablation_data, reuse_prefix, memory)
    learned = ablation_of(ablation).learned
    if not circuits:
        return []
    info = {
        "metric": request.metric.name,
        "ablation": ablation_of(ablation).name,
        **provenance(request, call, _operator(request, circuits)),
    }
    spans = {"spans": data.spans} if any(item.graph.spans for item in circuits) else {}
    settings = partial(settings_of, request, call="evaluate", circuits=circuits, **spans)
    with opened(checkpoint, request.arch.model, settings) as kept:
        run = _with_own_constants if learned else _evaluate
        evaluated = [replace(result, info=info | result.info) for result in run(request, circuits, kept, progress)]
    return _said(evaluated)[0] if isinstance(circuit, Circuit) else _said(evaluated)


def to_evaluate(circuits: Sequence[Circuit], model: nn.Module, data: PairedDataset, *asked: Any) -> Request:
    """What `evaluate` is asked, checked; `asked` as of `prepare`."""
    request = prepare(model, data, *asked)
    for item in circuits:
        check_circuit(item, request.arch, None if ablation_of(request.ablation).learned else request.data)
    return request


def _evaluate(
    request: Request, circuits: list[Circuit], checkpoint: Checkpoint, progress: Progress | None
) -> list[EvaluationResult]:
    data = request.data
    with borrowed(request.arch.model), torch.no_grad():
        results = torch.zeros(3 + len(circuits), len(data), dtype=torch.float64)
        finished = torch.zeros(len(data), dtype=torch.bool)
        checkpoint.keep({"values": results, "finished": finished})
        heads = {item.graph.heads for item in circuits}
        request = request.verified("query" if "query" in heads else "kv").with_constants()
        values = CircuitValues(request, circuits)
        tokens = checkpoint.tokens(values.tokens_together())
        batches = remaining(data, request.batches(min(tokens, TOKENS_PER_BATCH)), finished)
        with Replays(request, values) as replays:
            for batch, found in dealt_in_memory(data, batches, tokens, replays.run, request.arch.team):
                results[:, batch.index] = found
                finished[batch.index] = True
                checkpoint.save()
                if progress is not None:
                    progress(int(finished.sum()), len(data))
    # Rounding averages out over examples, but not below what similar ones have in common.
    rounding = float(results[-1].mean().sqrt()) * max(3 / len(data) ** 0.5, 0.5)
    return [EvaluationResult(row, results[0], results[1], rounding, replays.told()) for row in results[2:-1]]


def _said(results: list[EvaluationResult]) -> list[EvaluationResult]:
    """The results, with a warning where there is no faithfulness."""
    undefined = next((result for result in results if result.faithfulness != result.faithfulness), None)
    if undefined is not None:
        span = abs(undefined.clean - undefined.corrupted)
        warn(
            f"Faithfulness is undefined (nan): the mean metrics of the whole model and of the ablated run differ by "
            f"{span:.2g}, which rounding alone can explain ({undefined.rounding:.2g})."
        )
    return results


def _operator(request: Request, circuits: Sequence[Circuit]) -> str:
    """What adds up the contributions that the largest circuit's receivers read."""
    # Off the CPU all circuits are read together.
    shape = (0,) if request.arch.device.type == "cpu" else (len(circuits), 0, 0, 0)
    nothing = torch.empty(shape, dtype=request.arch.contraction_dtype, device=request.arch.device)
    largest = max(circuits, key=lambda circuit: circuit.n_edges)
    return explain("masked_read", nothing, nothing, largest.graph.per_span(largest.mask).any(0))


def _with_own_constants(
    request: Request, circuits: list[Circuit], checkpoint: Checkpoint, progress: Progress | None
) -> list[EvaluationResult]:
    """Evaluate each circuit with its own learned constants, relative to the circuit without edges with its own."""
    model, data, graph = request.arch.model, request.data, circuits[0].graph
    lessons = request.ablation_data or data
    cut: dict[str, Any] = {"batch_size": request.batch_size, "memory": request.memory, "checkpoint": checkpoint}
    every = [Circuit.from_mask(graph, torch.zeros_like(graph.edge_mask)), *circuits]
    values, clean = (torch.zeros(len(every), len(data), dtype=torch.float64) for _ in range(2))
    learned, finished = (torch.zeros(len(every), dtype=torch.bool) for _ in range(2))
    rounding = torch.zeros(len(every), dtype=torch.float64)
    constants = zeros(request.arch).map(Tensor.cpu)  # of the circuit that is being evaluated
    latest = {f"constants {i}": x for i, x in enumerate(constants.tensors)}
    own = {"values": values, "clean": clean, "rounding": rounding, "learned": learned, "finished": finished}
    checkpoint.keep({**own, **latest})
    for number, item in enumerate(every):
        if not learned[number]:
            found = optimal_constants(model, item, lessons, "kl_divergence", **cut)
            for x, new in zip(constants.tensors, found.tensors, strict=True):
                x.copy_(new)
            learned[number] = True
            checkpoint.save()
        if not finished[number]:
            result = evaluate(
                model, item, data, request.metric, ablation=constants, reuse_prefix=request.reuse_prefix, **cut
            )
            values[number], clean[number], rounding[number] = result.values, result.clean_values, result.rounding
            finished[number] = True
            checkpoint.save()
        if progress is not None:
            progress(number * len(data) // len(circuits), len(data))
    rows = zip(values[1:], clean[1:], rounding[1:].tolist(), strict=True)
    return [EvaluationResult(row, known, values[0], apart) for row, known, apart in rows]
