"""ACDC: edges go one after another while the circuit gets no worse (Conmy et al. 2023, arXiv 2304.14997).

The circuit is that of the sequential algorithm. To run many circuits side by side, decisions are tried ahead: each edge
has a guess, and the circuits that follow from the guesses run in one pass. Decisions are then taken in order. Up to and
with the first that was guessed wrong they are right; what later circuits did is the next guess.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import Cost, bytes_without_gradient, measure_cost, most_tokens, tokens_within
from ..checkpoint import Checkpoint, Where, opened, settings_of
from ..errors import known_arguments, number, one_of
from ..forward import TOKENS_PER_BATCH, Batch, Constants, borrowed, one_want_of_memory
from ..graph import Circuit, Graph, Heads
from ..intervention import TOKENS_TOGETHER, CircuitRuns
from ..modules.loans import gives_back
from ..provenance import called
from ..ranks import together
from ..request import Progress, Request, prepare, watched
from ..tasks import PairedDataset
from .asked import check_constants, origin
from .lessons import Runs, prepare_lesson, share_kept

FEWEST_AHEAD = 8  # circuits tried ahead: alone they take longer


@together
@gives_back
@one_want_of_memory
@known_arguments
def acdc(
    model: nn.Module,
    data: PairedDataset,
    threshold: float,
    metric: Any = None,
    *,
    heads: Heads = "kv",
    ablation: str | Constants = "patching",
    ablation_data: PairedDataset | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
    progress: Progress | bool | None = None,
    checkpoint: Where = None,
) -> Circuit:
    """The circuit of ACDC (Conmy et al. 2023, arXiv 2304.14997): what is left after removing edges that hardly matter.

    From `logits` to the first layer, and at each receiver from its last sender to `input`, an edge is removed if the
    metric without it is less than `threshold` below that of the circuit so far. Each edge costs a run of a circuit
    on all pairs, except for those into nodes that nothing in the circuit reads any more.

    Args:
        model: a Hugging Face language model, causal or masked, or a classifier of prompts; it comes back as it was.
        data: clean and corrupted prompts with answers.
        threshold: τ, in units of the metric: a larger one gives a smaller circuit.
        metric: what must not fall, a name in `METRICS` or a callable as in `attribute`, differentiable or not; by
            default the data's own, `data.metric`. The paper's is "kl_divergence".
        heads, ablation, ablation_data, reuse_prefix: as in `attribute`.
        memory: what the run may take besides the model and the data, in bytes or as "8GiB"; by default half of what is
            free.
        progress: called with (edges decided, edges in all); True shows a bar.
        checkpoint: as in `attribute`; written after every pass.

    Returns:
        The circuit. It may keep edges out of nodes that read nothing of it, as in the paper; `pruned()` leaves them
        out. `info["acdc"]` says how many circuits were run, and in how many passes.

    Raises:
        InputError: a threshold that is not positive, or anything that `attribute` refuses.

    Example:
        >>> circuit = eap.acdc(model, data, threshold=0.1)
    """
    call = called(acdc, locals())
    threshold, progress = number("threshold", threshold, "a positive number", 5e-324, 1e308), watched(progress)
    one_of("heads", heads, ("kv", "query"))
    request = prepare(model, data, metric, ablation, None, ablation_data, reuse_prefix, memory)
    check_constants(request)
    graph = request.arch.graph(heads)
    info = origin(request, call, graph, "acdc", request.arch.contraction_dtype)
    settings = partial(settings_of, request, call="acdc", threshold=threshold, heads=heads)
    with opened(checkpoint, request.arch.model, settings) as kept, borrowed(request.arch.model), torch.no_grad():
        state = _State(graph, kept)
        _decide(request.verified(heads).with_constants(), graph, threshold, state, kept, progress)
    info["acdc"] = {"threshold": threshold, "circuits": int(state.circuits), "passes": int(state.passes)}
    return Circuit(graph, state.mask, None, info)


class _State:
    """How far the decisions are, and what is guessed of the others.

    `order`: edges [n, 2] as (receiver, sender) in the order of decisions; `mask`: the circuit so far; `value`: its
    metric; `removed`: of each edge in that order, whether it goes, as decided or guessed; `ahead`: how many circuits
    to try in a pass.
    """

    def __init__(self, graph: Graph, checkpoint: Checkpoint) -> None:
        self.graph, self.order = graph, graph.edge_mask.T.nonzero().flip(0)
        self.mask = graph.edge_mask.clone()
        self.removed = torch.ones(len(self.order), dtype=torch.bool)  # most edges go
        self.value = torch.tensor(float("nan"), dtype=torch.float64)
        self.done, self.circuits, self.passes = (torch.tensor(0) for _ in range(3))
        self.ahead = torch.tensor(FEWEST_AHEAD)
        names = ("mask", "removed", "value", "done", "circuits", "passes", "ahead")
        checkpoint.keep({name: getattr(self, name) for name in names})

    def tried(self) -> tuple[list[int], list[Tensor], int]:
        """The next edges, as places in the order, and for each the circuit without it, if all guesses before it are
        right; then the place where this ends. Edges into nodes that nothing reads need no run: they go."""
        mask, owners = self.mask.clone(), self.graph.owners
        places: list[int] = []
        circuits: list[Tensor] = []
        start, last = int(self.done), self.graph.n_receivers - 1
        for place, (receiver, sender) in enumerate(self.order[start:].tolist(), start):
            if receiver == last or mask[owners[receiver]].any():
                if len(circuits) == self.ahead:
                    return places, circuits, place
                circuits.append(mask.clone())
                circuits[-1][sender, receiver] = False
                places.append(place)
            else:
                self.removed[place] = True
            mask[sender, receiver] = ~self.removed[place]
        return places, circuits, len(self.order)

    def decide(self, places: list[int], values: list[float], stop: int, threshold: float) -> int:
        """Take the decisions up to and with the first that was guessed wrong, and guess the others anew from what their
        circuits did. Returns how many of the circuits counted."""
        start, base, counted = int(self.done), float(self.value), 0
        right = True
        for place, value in zip(places, values, strict=True):
            goes, guess = base - value < threshold, bool(self.removed[place])
            self.removed[place] = goes
            if right:
                counted += 1
                right = goes == guess
                if goes:
                    self.value.fill_(value)
                if not right:
                    stop = place + 1
            if guess:
                base = value
        receivers, senders = self.order[start:stop].T
        self.mask[senders, receivers] = ~self.removed[start:stop]
        self.done.fill_(stop)
        return counted


def _decide(
    request: Request, graph: Graph, threshold: float, state: _State, checkpoint: Checkpoint, progress: Progress | None
) -> None:
    tokens = checkpoint.tokens(_tokens_together(request, graph))
    runs = Runs(request, graph, len(request.data), tokens, min(tokens, TOKENS_PER_BATCH))
    most = tokens // max(batch.clean.numel() for batch in runs.lessons.batches(0))

    def values(circuits: list[Tensor]) -> list[float]:
        found: list[float] = runs.values(circuits).mean(1).tolist()
        return found

    if state.value.isnan():
        state.value.fill_(*values([graph.edge_mask]))
    while state.done < len(state.order):
        places, circuits, stop = state.tried()
        found = values(circuits) if circuits else []
        with checkpoint.changing():
            counted = state.decide(places, found, stop, threshold)
            state.circuits += len(circuits)
            state.passes += 1
            # What was guessed wrong runs again: as many as were right this time, more where all were.
            wanted = 2 * counted if counted == len(circuits) else counted
            state.ahead.fill_(max(FEWEST_AHEAD, min(wanted, most)))
        if progress is not None:
            progress(int(state.done), len(state.order))


def _tokens_together(request: Request, graph: Graph) -> int:
    """How many tokens of circuits can run together within the budget."""
    device = request.arch.device
    largest = graph.edge_mask.clone()
    largest[0] = False  # every receiver but the first layer's reads a part
    most = max(TOKENS_TOGETHER, most_tokens(device.type))
    rows = CircuitRuns(graph, [largest]).rows(request.arch)
    rough = bytes_without_gradient(request, TOKENS_PER_BATCH, most, rows * request.arch.width)

    def measured(few: Batch, copies: int) -> None:
        lesson = prepare_lesson(request, graph, few)
        together = copies + 1  # one alone takes less than preparing the lesson does
        lesson.values(request, graph, [largest] * together, together * few.clean.numel())

    def cost(batch: Batch) -> Cost:
        return measure_cost(request.data, batch, measured)

    return tokens_within(request, most, rough, cost, beside=share_kept(request))
