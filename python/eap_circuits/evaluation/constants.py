"""Constants learned for a circuit: optimal ablation (Li & Janson 2024, arXiv 2409.09951)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..capture import (
    Constants,
    Progress,
    RecordedRun,
    Run,
    Runner,
    borrowed,
    learning_run,
    make_batches,
    means,
    prepare,
)
from ..errors import expected
from ..graph import Circuit
from ..tasks import PairedDataset

TOKENS_TOGETHER = 256  # of a batch, every receiver's input of which is kept for the backward pass


def optimal_constants(
    model: nn.Module,
    circuit: Circuit,
    data: PairedDataset,
    metric: Any = "kl_divergence",
    steps: int = 50,
    rate: float = 0.05,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Constants:
    """Learn one constant for every sender, which the edges outside a circuit carry, so that the circuit does its best.

    Optimal ablation (Li & Janson 2024, arXiv 2409.09951): what a circuit loses is not to depend on values that
    mislead the rest of the model. The constants start at the means over the clean prompts' tokens and follow Adam, each
    step over all the data, in units of each feature's own deviation from its mean; the best ones seen are given back,
    so that on these data they are at least as good as the means. Deterministic; the batch size does not matter.

    Args:
        model: a Hugging Face causal language model; it comes back as it was.
        circuit: the circuit whose edges are kept.
        data: prompts to learn from, of which only the clean side matters to the default metric.
        metric: what is to be raised: by default minus the divergence from the whole model, as in the paper.
        steps: passes over the data, each a forward and backward of the circuit.
        rate: Adam's learning rate.
        batch_size: examples per batch; by default a few hundred tokens.
        progress: called with (steps done, steps in all).

    Returns:
        Constants, to be passed as `ablation=` to `evaluate`, `faithfulness_curve` and `attribute`.

    Raises:
        InputError: a circuit of another graph, steps or a rate that are no positive numbers, or anything that
            `evaluate` refuses.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise expected("steps", "a whole number of at least 1", repr(steps))
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
        raise expected("rate", "a positive number", repr(rate))
    run = prepare(model, data, metric, "mean", batch_size)
    check_circuit(circuit, run)
    with borrowed(run.arch.model):
        run = run.with_constants()
        assert run.constants is not None
        if circuit.n_edges == circuit.graph.n_edges:
            return run.constants
        return _learn(run, circuit, steps, rate, batch_size, progress)


def check_circuit(circuit: object, run: Run) -> None:
    """Refuse what is no circuit of the model."""
    if not isinstance(circuit, Circuit):
        raise expected("circuit", "a Circuit or a list of them", type(circuit).__name__)
    if circuit.graph != run.arch.graph(circuit.graph.heads):
        raise expected("circuit", f"one of {run.arch.graph(circuit.graph.heads)!r}", f"one of {circuit.graph!r}")


def _learn(
    run: Run, circuit: Circuit, steps: int, rate: float, batch_size: int | None, progress: Progress | None
) -> Constants:
    start = run.constants
    assert start is not None
    batches = list(make_batches(run.data, batch_size, False, run.arch.device, TOKENS_TOGETHER))
    squares = means(run.arch, batches, of=torch.square)
    units = [
        (square - mean.square()).clamp(min=0).sqrt()
        for square, mean in zip(squares.tensors, start.tensors, strict=True)
    ]
    moves = [torch.zeros_like(mean, requires_grad=True) for mean in start.tensors]
    adam = torch.optim.Adam(moves, lr=rate)
    best, found = -float("inf"), start
    plain = []  # clean and corrupted logits of each batch
    for batch in batches:
        runner = Runner(run.arch, circuit.graph, batch)
        with torch.no_grad():
            sides = (batch.clean, batch.corrupted)
            plain.append([runner.logits(runner.embed(tokens), None, side) for side, tokens in enumerate(sides)])
    for step in range(steps + 1):
        adam.zero_grad()
        reached = 0.0
        for batch, (clean, corrupted) in zip(batches, plain, strict=True):
            terms = zip(start.tensors, units, moves, strict=True)
            constants = start.of_tensors([mean + unit * move for mean, unit, move in terms])
            runner = Runner(run.arch, circuit.graph, batch)
            ablated = RecordedRun(runner, False, constants)
            logits = learning_run(runner, circuit.graph, ablated, circuit.mask)
            value = run.values(logits, batch, clean, corrupted).sum()
            reached += float(value.detach())
            if value.requires_grad:  # edges that nothing reads leave nothing to learn
                (-value).backward()
        if reached > best:
            best, found = reached, constants.map(Tensor.detach)
        adam.step()
        if progress is not None:
            progress(step, steps)
    return found
