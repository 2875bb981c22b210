"""Constants learned for a circuit: optimal ablation (Li & Janson 2024, arXiv 2409.09951)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import Cost, dealt_in_memory, in_memory, measure_cost, numbers_per_token, tokens_within
from ..checkpoint import Checkpoint, Where, opened, remaining, settings_of
from ..errors import known_arguments, number, whole
from ..forward import Batch, Constants, Runner, borrowed, one_want_of_memory
from ..graph import Circuit
from ..intervention import learning_run
from ..modules.loans import gives_back
from ..ranks import together
from ..recording import deviations, record_run
from ..request import Measurement, Progress, Request, check_circuit, fetch, prepare, watched
from ..tasks import PairedDataset

TOKENS_PER_LESSON = 256  # per batch, as the backward pass keeps every receiver's input at each token


@together
@gives_back
@known_arguments
@one_want_of_memory
def optimal_constants(
    model: nn.Module,
    circuit: Circuit,
    data: PairedDataset,
    metric: Any = None,
    *,
    steps: int = 50,
    rate: float = 0.05,
    batch_size: int | None = None,
    progress: Progress | bool | None = None,
    memory: int | str | None = None,
    checkpoint: Where = None,
) -> Constants:
    """Learn a constant for each sender, to be carried by the edges outside a circuit, so that the circuit does best.

    This is optimal ablation (Li & Janson 2024, arXiv 2409.09951): a circuit should not seem worse because ablated
    values mislead the rest of the model. The constants start at the means over the clean prompts' tokens and take steps
    of Adam, each over all the data, in units of each feature's standard deviation. The best constants seen are
    returned, so on these data they are at least as good as the means. The result is deterministic and independent of
    the batch size.

    Args:
        model: a Hugging Face language model, causal or masked, or a classifier of prompts; it comes back as it was.
        circuit: the circuit whose edges are kept.
        data: prompts to learn from; "kl_divergence" uses only their clean side.
        metric: the metric to maximise; by default the data's own, `data.metric`. The paper's is "kl_divergence", minus
            the divergence from the whole model, which `evaluate(ablation="optimal")` takes too; one without a bound,
            such as "logit_diff", is driven beyond the model's own value.
        steps: passes over the data, each with a forward and a backward of the circuit.
        rate: Adam's learning rate.
        batch_size: examples per batch; by default a few hundred tokens.
        progress: called with (steps done, steps in all); True shows a bar.
        memory: what learning may take besides the model and the data, in bytes or as "8GiB"; by default half of what is
            free. If memory runs out all the same, learning goes on with smaller batches.
        checkpoint: as in `attribute`.

    Returns:
        Constants to pass as `ablation=` to `evaluate`, `faithfulness_curve` and `attribute`.

    Raises:
        InputError: a circuit of another graph, steps or a rate that are not positive numbers, or anything that
            `evaluate` refuses.

    Example:
        >>> constants = eap.optimal_constants(model, circuit, data, "kl_divergence", steps=10)
        >>> result = eap.evaluate(model, circuit, data, ablation=constants)
    """
    steps, progress = whole("steps", steps, 1), watched(progress)
    rate = number("rate", rate, "a positive number", 5e-324, 1e308)
    request = prepare(model, data, metric, "mean", batch_size, reuse_prefix=False, memory=memory)
    check_circuit(circuit, request.arch)
    request.refuse_parts()
    settings = partial(settings_of, request, call="optimal_constants", circuit=circuit, steps=steps, rate=rate)
    with opened(checkpoint, request.arch.model, settings) as kept, borrowed(request.arch.model):
        request = request.verified(circuit.graph.heads).with_constants()
        assert request.constants is not None
        if circuit.n_edges == circuit.graph.n_edges:
            return request.constants
        return _learn(request, circuit, steps, rate, kept, progress)


class _Lessons:
    """Where learning is: the moves from the means in units, Adam's state, and the sums of the step that was begun."""

    def __init__(self, start: Constants, rate: float, examples: int, checkpoint: Checkpoint) -> None:
        self.moves = [torch.zeros_like(mean, requires_grad=True) for mean in start.tensors]
        self.adam = torch.optim.Adam(self.moves, lr=rate)
        self.step = torch.tensor(0)
        self.best, self.learned = torch.tensor(-float("inf"), dtype=torch.float64), start.map(Tensor.clone)
        self.finished = torch.zeros(examples, dtype=torch.bool)
        self.reached = torch.tensor(0.0, dtype=torch.float64)
        self.slopes = [torch.zeros_like(mean) for mean in start.tensors]
        self.sloped = torch.zeros(len(self.moves), dtype=torch.bool)
        kept = {name: getattr(self, name) for name in ("step", "best", "finished", "reached", "sloped")}
        for i, move in enumerate(self.moves):
            moments = {name: torch.zeros_like(move, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[move] = {"step": torch.tensor(0.0), **moments}
            tensors = {
                "move": move,
                "slope": self.slopes[i],
                "learned": self.learned.tensors[i],
                **self.adam.state[move],
            }
            kept |= {f"{name} {i}": x for name, x in tensors.items()}
        checkpoint.keep(kept)

    def add(self, index: Tensor, value: float, slopes: tuple[Tensor | None, ...]) -> None:
        """Add those of a batch."""
        self.reached += value
        for i, slope in enumerate(slopes):
            if slope is not None:
                self.slopes[i] += slope.to(self.slopes[i].device)
                self.sloped[i] = True
        self.finished[index] = True

    def next(self, constants: Constants) -> None:
        """End the step, in which these constants were tried."""
        if self.reached > self.best:
            self.best.copy_(self.reached)
            for kept, found in zip(self.learned.tensors, constants.tensors, strict=True):
                kept.copy_(found.detach())
        # Adam leaves alone what no gradient reaches.
        for move, slope, sloped in zip(self.moves, self.slopes, self.sloped.tolist(), strict=True):
            move.grad = slope.clone() if sloped else None
        self.adam.step()
        self.step += 1
        for x in (self.finished, self.reached, self.sloped, *self.slopes):
            x.zero_()


def _learn(
    request: Request, circuit: Circuit, steps: int, rate: float, checkpoint: Checkpoint, progress: Progress | None
) -> Constants:
    start, data = request.constants, request.data
    assert start is not None
    lessons = _Lessons(start, rate, len(data), checkpoint)
    if lessons.step > steps:
        return lessons.learned
    batches = list(request.batches(tokens := checkpoint.tokens(_tokens_together(request, circuit))))
    units = deviations(request.arch, batches, start).tensors

    def moved() -> Constants:
        terms = zip(start.tensors, units, lessons.moves, strict=True)
        return start.of_tensors([mean + unit * move for mean, unit, move in terms])

    def plain(batch: Batch, _: int) -> list[Tensor]:
        runner = Runner(request.arch, circuit.graph, batch)
        with torch.no_grad():
            return [runner.logits(runner.embed(side), None, i) for i, side in enumerate((batch.clean, batch.corrupted))]

    def lesson(batch: Batch, _: int) -> tuple[float, tuple[Tensor | None, ...]]:
        measured = Measurement(request, batch, *sides[_sides(sides, batch)])
        value = _value(measured, circuit, moved())
        # If nothing reads the ablated edges, there is nothing to learn.
        slopes = torch.autograd.grad(-value, lessons.moves, allow_unused=True) if value.requires_grad else ()
        return float(fetch([measured], value.detach())[1][0]), slopes

    sides = torch.empty(0)  # clean and corrupted logits, [2, n, V]
    for batch, logits in in_memory(data, batches, tokens, plain):
        if not len(sides):
            most = [max(each.n_positions for each in batches)] if batch.positions is not None else []
            sides = logits[0].new_empty(2, len(data), *most, logits[0].shape[-1])
        sides[_sides(sides, batch)] = torch.stack(logits)
    while lessons.step <= steps:
        ran = []
        left = remaining(data, batches, lessons.finished)
        for batch, (value, slopes) in dealt_in_memory(data, left, tokens, lesson, request.arch.team):
            ran.append(batch)
            with checkpoint.changing():
                lessons.add(batch.index, value, slopes)
        if sum(batch.n_examples for batch in ran) == len(data):
            batches = ran  # some were halved because memory ran out
        with checkpoint.changing():
            lessons.next(moved())
        if progress is not None:
            progress(int(lessons.step) - 1, steps)
    return lessons.learned


def _sides(sides: Tensor, batch: Batch) -> tuple[slice | Tensor, ...]:
    """Where a batch's logits are among those of all examples, [2, E, V] or [2, E, P, V]."""
    where = slice(None), batch.index.to(sides.device)
    return where if batch.positions is None else (*where, slice(batch.n_positions))


def _value(measured: Measurement, circuit: Circuit, constants: Constants) -> Tensor:
    """The circuit's metric, summed over the batch."""
    runner = Runner(measured.request.arch, circuit.graph, measured.batch)
    ablated = record_run(runner, False, constants)
    return measured.values(learning_run(runner, circuit.graph, ablated, circuit.mask[None].cpu())[0]).sum()


def _tokens_together(request: Request, circuit: Circuit) -> int:
    """How many tokens a batch may have within the budget."""
    graph, constants = circuit.graph, request.constants
    assert constants is not None
    # For each receiver its input and the norm's output are kept, for each sender its difference.
    kept = (2 * graph.n_receivers + graph.n_senders) * request.arch.d_model + 2 * numbers_per_token(request)
    rough = TOKENS_PER_LESSON * kept * request.arch.accumulate.itemsize
    # Kept throughout: the batches; both sides' logits; the means, units, moves, their gradient, Adam's two moments and
    # the best constants so far.
    vocabulary = request.arch.vocabulary(decoder=request.arch.encoder > 0)
    batches = list(request.batches(TOKENS_PER_LESSON))
    positions = max(each.n_positions for each in batches)
    stays = 2 * len(request.data) * positions * vocabulary * request.arch.dtype.itemsize
    stays += 7 * sum(x.nbytes for x in constants.tensors)
    stays += sum(x.nbytes for batch in batches for x in batch.host.values())

    def measured(few: Batch, _: int) -> None:
        learned = constants.map(lambda x: x.clone().requires_grad_())
        runner = Runner(request.arch, graph, few)
        logits = runner.logits(runner.embed(few.clean)).detach()
        value = _value(Measurement(request, few, logits, logits), circuit, learned)
        if value.requires_grad:
            torch.autograd.grad(value, learned.tensors, allow_unused=True)

    def cost(batch: Batch) -> Cost:
        return measure_cost(request.data, batch, measured, copies=False)

    return tokens_within(request, TOKENS_PER_LESSON, rough, cost, TOKENS_PER_LESSON, stays)
