"""Edges go where the circuit runs: a share of them at a time, by the gradient of the present circuit's mask."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, Where, opened, settings_of
from ..edges import prune
from ..errors import flag, known_arguments, number, whole
from ..forward import Constants, borrowed, one_want_of_memory
from ..graph import EdgeScores
from ..modules.loans import gives_back
from ..provenance import called
from ..ranks import together
from ..request import Progress, Request, prepare, watched
from ..tasks import PairedDataset
from .asked import check_gradient, check_start, origin, ranking, sizes_of
from .lessons import Runs, tokens_together

_SHARES = 0.0005, 0.2  # of all edges, at which pruning ends and begins
_GROUPS = 4  # of pairs, by default: a round's passes are few and full, however many pairs there are
_ASCENTS = 100  # towards the multipliers of a round


@dataclass(frozen=True)
class _Asked:
    """How to prune, as `prune_gradually` takes it; `smallest` and `largest` are the sizes."""

    keep: float
    examples: int
    smallest: int
    largest: int


@together
@gives_back
@one_want_of_memory
@known_arguments
def prune_gradually(
    model: nn.Module,
    data: PairedDataset,
    metric: Any = None,
    *,
    start: EdgeScores,
    keep: float = 0.75,
    examples: int | None = None,
    n_edges: int | tuple[int, int] | None = None,
    ablation: str | Constants = "patching",
    ablation_data: PairedDataset | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
    progress: Progress | bool | None = None,
    checkpoint: Where = None,
) -> EdgeScores:
    """Rank all edges by pruning a circuit a share at a time, each time scored where the circuit then runs.

    In each round the circuit runs on all pairs. By the gradient of its mask, those of its edges go that matter least
    and together bring the metric of every few pairs to the model's own; docs/learning.md. A round costs a forward and
    a backward pass of the circuit. The result is deterministic.

    Args:
        model: a Hugging Face language model, causal or masked, or a classifier of prompts; it comes back as it was.
        data: prompt pairs to prune by. Measure the circuits on others.
        metric: what circuits keep, differentiable: a name in `METRICS` or a callable as in `attribute`; by default the
            data's own, `data.metric`.
        start: the ranking to start from, by absolute score, such as those of `attribute`.
        keep: the share of its edges that a circuit keeps in a round.
        examples: how many pairs are few: whose metric is kept as a mean; by default a quarter of all.
        n_edges: the sizes at which pruning ends and begins, or the one at which it ends; by default 0.05 % and 20 % of
            all edges, or all of them where it ends at 20 % or more. What lies beyond keeps the order in which it was.
        ablation, ablation_data: what edges outside the circuit carry, as in `evaluate`; not "optimal".
        reuse_prefix: as in `attribute`.
        memory: what pruning may take besides the model and the data, in bytes or as "8GiB"; by default half of what is
            free.
        progress: called with (edges gone, edges to go in all); True shows a bar.
        checkpoint: as in `attribute`; written after a round.

    Returns:
        EdgeScores whose values are ranks: the weakest edge has 1/n, the strongest 1.

    Raises:
        InputError: scores of another graph, numbers out of range, or anything that `attribute` refuses.

    Example:
        >>> pruned = eap.prune_gradually(model, data, start=scores, keep=0.5)
        >>> circuit = pruned.select(20, exactly=True)
    """
    call = called(prune_gradually, locals())
    keep = number("keep", keep, "a share between 0 and 1", 5e-324, 1 - 2**-53)
    if examples is not None:
        examples = whole("examples", examples, 1)
    progress, reuse_prefix = watched(progress), flag("reuse_prefix", reuse_prefix)
    request = prepare(model, data, metric, ablation, None, ablation_data, reuse_prefix, memory)
    check_gradient(request)
    check_start(start, request)
    graph = start.graph
    few = examples or -(-len(data) // _GROUPS)
    smallest, largest = sizes_of(n_edges, graph.n_edges, _SHARES)
    if not isinstance(n_edges, (tuple, list)):  # says where pruning ends
        _, largest = sizes_of(None, graph.n_edges, _SHARES)
        largest = largest if smallest < largest else graph.n_edges
    asked = _Asked(keep, few, smallest, largest)
    info = {
        **origin(request, call, graph, "pruned", request.arch.accumulate),
        "additive": False,
        "pruning": {**asdict(asked), "start": start.info.get("method")},
    }
    settings = partial(
        settings_of, request, call="prune_gradually", start=start.values, heads=graph.heads, **asdict(asked)
    )
    with opened(checkpoint, request.arch.model, settings) as kept, borrowed(request.arch.model):
        order = _prune(request.verified(graph.heads).with_constants(), start, asked, kept, progress)
    return ranking(graph, order, info)


def _prune(
    request: Request, start: EdgeScores, asked: _Asked, checkpoint: Checkpoint, progress: Progress | None
) -> Tensor:
    """The edges' numbers [n], from the weakest to the strongest."""
    graph, edges = start.graph, start.graph.edge_mask
    first = start.select(asked.largest).mask
    order = start.values[edges].abs().argsort(stable=True)
    order = order[first[edges][order].int().argsort(stable=True)]  # the last ones are the circuit's
    size = torch.tensor(int(first.sum()))
    to_go = max(0, int(size) - asked.smallest)
    checkpoint.keep({"order": order, "size": size})
    fitting = tokens_together(request, graph, 0.5 * first[None].to(request.arch.accumulate))
    runs = Runs(request, graph, asked.examples, checkpoint.tokens(fitting))

    def circuit_of(numbers: Tensor) -> Tensor:
        mask, flags = torch.zeros_like(edges), torch.zeros(len(order), dtype=torch.bool)
        flags[numbers] = True
        mask[edges] = flags
        return mask

    while size > asked.smallest:
        inside = order[-int(size) :]
        mask = circuit_of(inside)
        above, slope = runs.slopes(mask, mask)
        slope = slope[:, inside.argsort().argsort()]
        count = min(max(1, round((1 - asked.keep) * int(size))), int(size) - asked.smallest)
        inside = inside[nearest(slope, centre(slope, above, count))]
        going, staying = inside[:count], inside[count:]
        # Those that no path leads through any more go along.
        connected = prune(graph, circuit_of(staying))[edges][staying]
        with checkpoint.changing():
            order[-int(size) :] = torch.cat([staying[~connected], going, staying[connected]])
            size.fill_(int(connected.sum()))
        if progress is not None:
            progress(min(to_go, to_go - int(size) + asked.smallest), to_go)
    return order


def centre(slopes: Tensor, above: Tensor, count: int) -> Tensor:
    """Around which the edges are that go, [G, 1]: those of this many that are nearest to it.

    Without an edge, the metric of a group of pairs falls by about the edge's slope there. So the slopes of the edges
    that go should add up to what the metric is to fall by, in each group; and of all such sets the one with the least
    sum of squares is wanted. It consists of the edges that are nearest to some point, the problem's Lagrange
    multipliers, which ascend along what is missing of the sums.

    Args:
        slopes: float64 [G, n], of each edge in each group.
        above: float64 [G], how far the metric is above the model's own.
        count: how many edges go, 1 to n.
    """
    point = torch.zeros(len(above), 1, dtype=torch.float64)
    best, least = point, torch.tensor(torch.inf)
    for _ in range(_ASCENTS):
        going = nearest(slopes, point)[:count]
        missing = above - slopes[:, going].sum(1)
        if missing.norm() < least:
            best, least = point, missing.norm()
        point = point + missing[:, None] / count
    return best


def nearest(slopes: Tensor, point: Tensor) -> Tensor:
    """Edges [n] by the distance of their slopes [G, n] from a point [G, 1]; equals in their order."""
    return (slopes - point).square().sum(0).argsort(stable=True)
