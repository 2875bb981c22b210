"""Run circuits and measure how much of the model's behaviour they keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..capture import (
    TOKENS_TOGETHER,
    Batch,
    Progress,
    RecordedRun,
    Runner,
    borrowed,
    in_memory,
    make_batches,
    prepare,
    run_circuits,
)
from ..errors import expected
from ..graph import Circuit
from ..tasks import PairedDataset


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """A metric of a circuit, of the whole model and of the corrupted run, per example: float64 [E] each."""

    values: Tensor
    clean_values: Tensor
    corrupted_values: Tensor

    @property
    def mean(self) -> float:
        """The circuit's metric, mean over examples."""
        return float(self.values.mean())

    @property
    def clean(self) -> float:
        """The whole model's metric on the clean prompts, mean over examples."""
        return float(self.clean_values.mean())

    @property
    def corrupted(self) -> float:
        """The whole model's metric on the corrupted prompts, mean over examples."""
        return float(self.corrupted_values.mean())

    @property
    def faithfulness(self) -> float:
        """(m(circuit) − m(corrupted)) / (m(model) − m(corrupted)); not a number where the two runs do not differ."""
        span = self.clean - self.corrupted
        return (self.mean - self.corrupted) / span if span else float("nan")

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
    ablation: str = ...,
    batch_size: int | None = ...,
    reuse_prefix: bool = ...,
    progress: Progress | None = ...,
) -> EvaluationResult: ...
@overload
def evaluate(
    model: nn.Module,
    circuit: Sequence[Circuit],
    data: PairedDataset,
    metric: Any = ...,
    ablation: str = ...,
    batch_size: int | None = ...,
    reuse_prefix: bool = ...,
    progress: Progress | None = ...,
) -> list[EvaluationResult]: ...
def evaluate(
    model: nn.Module,
    circuit: Circuit | Sequence[Circuit],
    data: PairedDataset,
    metric: Any = "logit_diff",
    ablation: str = "patching",
    batch_size: int | None = None,
    reuse_prefix: bool = True,
    progress: Progress | None = None,
) -> EvaluationResult | list[EvaluationResult]:
    """Run a circuit on the clean prompts, every edge outside it carrying the corrupted prompt's activation.

    The model comes back as it was, also after an error.

    Args:
        model: a Hugging Face causal language model, on one device.
        circuit: the circuit, or a list of them; the corrupted and the clean run are then shared.
        data: clean and corrupted prompts with answers.
        metric: a name in `METRICS`, or a callable (logits [E, V], batch) -> [E], higher is better.
        ablation: "patching".
        batch_size: examples per batch; by default about a thousand tokens.
        reuse_prefix: run the tokens before the first difference once and keep their keys and values; exact.
        progress: called with (examples done, examples in all) after each batch.

    Returns:
        An EvaluationResult, or a list of them for a list of circuits.

    Raises:
        InputError: a circuit of another graph, or anything that `attribute` refuses.
    """
    circuits = [circuit] if isinstance(circuit, Circuit) else list(circuit)
    run = prepare(model, data, metric, ablation, batch_size)
    model = run.arch.model
    for item in circuits:
        if not isinstance(item, Circuit):
            raise expected("circuit", "a Circuit or a list of them", type(item).__name__)
        if item.graph != run.arch.graph(item.graph.heads):
            raise expected("circuit", f"one of {run.arch.graph(item.graph.heads)!r}", f"one of {item.graph!r}")

    if not circuits:
        return []
    graphs = {item.graph.heads: item.graph for item in circuits}
    results = torch.empty(2 + len(circuits), len(data), dtype=torch.float64)

    def values(batch: Batch, tokens: int) -> Tensor:
        """The metric of the clean run, the corrupted run and each circuit: float64 [2 + C, E]."""
        found = torch.empty(len(results), batch.n_examples, dtype=torch.float64)
        clean = corrupted = None
        for heads, graph in graphs.items():
            runner = Runner(run.arch, graph, batch)
            record = RecordedRun(runner, corrupted=True)
            if clean is None or corrupted is None:
                clean, corrupted = runner.logits(runner.embed(batch.clean)), record.logits
                for row, logits in enumerate((clean, corrupted)):
                    found[row] = run.values(logits, batch, clean, corrupted)
            plain = {graph.n_edges: 0, 0: 1}  # all edges are the clean run, none the corrupted run
            rows = []
            for row, item in enumerate(circuits, 2):
                if item.graph.heads == heads and item.n_edges in plain:
                    found[row] = found[plain[item.n_edges]]
                elif item.graph.heads == heads:
                    rows.append(row)
            outputs = run_circuits(runner, graph, record, [circuits[row - 2].mask for row in rows], tokens)
            for row, logits in zip(rows, outputs, strict=True):
                found[row] = run.values(logits, batch, clean, corrupted)
        return found

    done = 0
    with borrowed(model), torch.no_grad():
        batches = make_batches(data, batch_size, reuse_prefix, run.arch.device)
        for batch, found in in_memory(data, batches, TOKENS_TOGETHER, values):
            results[:, batch.index] = found
            done += batch.n_examples
            if progress is not None:
                progress(done, len(data))
    evaluated = [EvaluationResult(row, results[0], results[1]) for row in results[2:]]
    return evaluated[0] if isinstance(circuit, Circuit) else evaluated
