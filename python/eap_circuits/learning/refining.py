"""A circuit is refined within itself: edges at its boundary change places, as runs of the circuits decide."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, Where, opened, settings_of
from ..edges import prune
from ..errors import flag, known_arguments, whole
from ..forward import Constants, borrowed, one_want_of_memory
from ..graph import Circuit
from ..modules.loans import gives_back
from ..provenance import called
from ..ranks import together
from ..request import Progress, Request, check_circuit, prepare, watched
from ..tasks import PairedDataset
from .asked import check_gradient, origin
from .lessons import Runs, tokens_together

_SWAPS = (1, 2, 4, 8, 16, 32, 64)  # how many are tried together


@together
@gives_back
@one_want_of_memory
@known_arguments
def refine(
    model: nn.Module,
    circuit: Circuit,
    data: PairedDataset,
    metric: Any = None,
    *,
    rounds: int = 10,
    candidates: int = 16,
    ablation: str | Constants = "patching",
    ablation_data: PairedDataset | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
    progress: Progress | bool | None = None,
    checkpoint: Where = None,
) -> Circuit:
    """Swap edges of a circuit for others as long as its metric comes nearer to the model's; its size stays.

    In each round the gradient of the circuit's mask says which edges it should rather lose, and which it lacks. The
    circuits with the first 1, 2, 4 … 64 swaps run side by side, and the best is taken if it is nearer to the model on
    average over the pairs. If none is, `candidates` edges of either kind run alone, and swaps are tried in the order of
    what these runs did. If none of them helps either, the circuit is done. docs/learning.md.

    Args:
        model: a Hugging Face language model, causal or masked, or a classifier of prompts; it comes back as it was.
        circuit: the circuit to refine; without spans.
        data: prompt pairs to refine on. Measure the circuit on others.
        metric: what is to come nearer to the model's own on each pair, differentiable: a name in `METRICS` or a
            callable as in `attribute`; by default the data's own, `data.metric`.
        rounds: how many rounds at most. One costs a forward and a backward pass of the circuit and up to 7 forwards of
            others, where edges run alone 2·`candidates` + 7 more.
        candidates: how many edges that go, and how many that come, run alone.
        ablation, ablation_data: what edges outside the circuit carry, as in `evaluate`; not "optimal".
        reuse_prefix: as in `attribute`.
        memory: what refining may take besides the model and the data, in bytes or as "8GiB"; by default half of what is
            free.
        progress: called with (rounds done, rounds in all); True shows a bar.
        checkpoint: as in `attribute`; written after a round.

    Returns:
        A circuit of as many edges, all of them on paths from `input` to `logits`, or a few less: those that end up on
        no path are left out. `info["refining"]` has the mean distance of the metric from the model's, before and after,
        and how many circuits ran.

    Raises:
        InputError: a circuit of another graph, or anything that `attribute` refuses.

    Example:
        >>> refined = eap.refine(model, circuit, data, rounds=2)
        >>> refined.n_edges <= circuit.n_edges
        True
    """
    call = called(refine, locals())
    rounds, candidates = whole("rounds", rounds, 1), whole("candidates", candidates, 1)
    progress, reuse_prefix = watched(progress), flag("reuse_prefix", reuse_prefix)
    request = prepare(model, data, metric, ablation, None, ablation_data, reuse_prefix, memory)
    check_circuit(circuit, request.arch)
    check_gradient(request)
    graph = circuit.graph
    info = origin(request, call, graph, "refined", request.arch.accumulate)
    settings = partial(settings_of, request, call="refine", circuit=circuit, rounds=rounds, candidates=candidates)
    with opened(checkpoint, request.arch.model, settings) as kept, borrowed(request.arch.model):
        state = _State(request.verified(graph.heads).with_constants(), circuit, kept)
        while state.done < rounds:
            better = state.better(candidates)
            with kept.changing():
                state.take(better, rounds)
            if progress is not None:
                progress(int(state.done), rounds)
    before, after = state.apart.tolist()
    info["refining"] = {
        **{"rounds": rounds, "candidates": candidates, "circuits": int(state.circuits)},
        **{"before": before, "after": after, "from": circuit.info.get("method")},
    }
    return Circuit(graph, state.mask, None, info)


class _State:
    """`mask`: the circuit so far, pruned; `apart`: how far its metric was from the model's at first, and is now, means
    over the pairs; `done`: rounds; `circuits`: how many ran."""

    def __init__(self, request: Request, circuit: Circuit, checkpoint: Checkpoint) -> None:
        self.graph, self.size, self.ran = circuit.graph, circuit.n_edges, 0
        edges = self.graph.edge_mask
        self.mask = prune(self.graph, circuit.mask)
        self.apart = torch.full((2,), float("nan"), dtype=torch.float64)
        self.done, self.circuits = torch.tensor(0), torch.tensor(0)
        checkpoint.keep({name: getattr(self, name) for name in ("mask", "apart", "done", "circuits")})
        fitting = tokens_together(request, self.graph, 0.5 * edges[None].to(request.arch.accumulate))
        self.runs = Runs(request, self.graph, len(request.data), checkpoint.tokens(fitting))
        self._own = self.runs.values([edges])  # the circuit of all edges is the model
        if self.apart.isnan().any():
            # Where constants are carried, edges on no path may change what a circuit does.
            self.apart.copy_(self._apart([circuit.mask, self.mask]))

    def take(self, better: tuple[Tensor, Tensor] | None, rounds: int) -> None:
        """A round is done; without a better circuit it is the last."""
        self.done.fill_(rounds if better is None else int(self.done) + 1)
        self.circuits += self.ran
        self.ran = 0
        if better is not None:
            self.mask.copy_(better[0])
            self.apart[1] = better[1]

    def better(self, candidates: int) -> tuple[Tensor, Tensor] | None:
        """A round's best circuit and its distance, if it is nearer to the model."""
        edges = self.graph.edge_mask
        slope = torch.zeros(edges.shape, dtype=torch.float64)
        slope[edges] = self.runs.slopes(self.mask, edges, signed=False)[1][0]
        # What goes lowers the distance by its slope, what comes raises it by its slope.
        going, coming = _ordered(self.mask, -slope), _ordered(edges & ~self.mask, slope)
        found = self._swapped(going, coming)
        if found is not None:
            return found
        going, coming, none = going[:candidates], coming[:candidates], going[:0]
        apart = self._apart(
            [*(self._with(edge[None], none) for edge in going), *(self._with(none, edge[None]) for edge in coming)]
        )
        return self._swapped(going[apart[: len(going)].argsort()], coming[apart[len(going) :].argsort()])

    def _swapped(self, going: Tensor, coming: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of the circuits with the first swaps, filled up to the size, the best, if it is nearer to the model."""
        missing = self.size - int(self.mask.sum())
        counts = [n for n in (0, *_SWAPS) if n <= len(going) and (n or missing)]
        tried = [prune(self.graph, self._with(going[:n], coming[: n + missing])) for n in counts]
        apart = self._apart(tried)
        best = int(apart.argmin()) if tried else 0
        return (tried[best], apart[best]) if tried and apart[best] < self.apart[1] else None

    def _with(self, going: Tensor, coming: Tensor) -> Tensor:
        """The circuit without some edges and with others, [n, 2] each."""
        mask = self.mask.clone()
        mask[tuple(going.T)] = False
        mask[tuple(coming.T)] = True
        return mask

    def _apart(self, circuits: list[Tensor]) -> Tensor:
        """How far circuits' metric is from the model's, float64 [C]: means over the pairs."""
        if not circuits:
            return self._own.new_empty(0)
        self.ran += len(circuits)
        return (self.runs.values(circuits) - self._own).abs().mean(1)


def _ordered(edges: Tensor, worth: Tensor) -> Tensor:
    """Edges [n, 2], those of the least worth [S, R] first."""
    return edges.nonzero()[worth[edges].argsort(stable=True)]
