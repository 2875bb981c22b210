"""Attribution where a circuit runs: the gradient of its mask, at edges that it keeps and at those that it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..budget import dealt_in_memory
from ..errors import flag, known_arguments
from ..forward import Batch, Constants, borrowed, one_want_of_memory
from ..graph import Circuit, EdgeScores, Graph
from ..loans import gives_back
from ..provenance import called
from ..ranks import together
from ..request import Progress, Request, check_circuit, prepare, watched
from ..tasks import PairedDataset
from .asked import check_gradient, origin
from .lessons import Lessons, tokens_together


@together
@gives_back
@one_want_of_memory
@known_arguments
def attribute_circuit(
    model: nn.Module,
    circuit: Circuit,
    data: PairedDataset,
    metric: Any = None,
    *,
    ablation: str | Constants = "patching",
    ablation_data: PairedDataset | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
    progress: Progress | bool | None = None,
) -> EdgeScores:
    """Score every edge where a circuit runs: S[u, v] = mean over examples of ∂m(circuit)/∂mask[u, v].

    To first order, S is how much the metric falls if an edge of the circuit is cut, and how much it rises if another
    one is added: S > 0 speaks for an edge, S < 0 against it. An edge has a score only where what it carries differs
    from the ablated contribution, and where the circuit leads from its receiver to the logits. For the circuit of all
    edges the scores are those of `attribute(method="eap")`. It costs 2 forwards, and 1 forward and backward of the
    circuit.

    Args:
        model: a Hugging Face language model, causal or masked, or a classifier of prompts; it comes back as it was.
        circuit: the circuit; without spans.
        data: clean and corrupted prompts with answers.
        metric: a differentiable metric's name, or a callable as in `attribute`; by default the data's own,
            `data.metric`.
        ablation, ablation_data: what edges outside the circuit carry, as in `evaluate`; not "optimal".
        reuse_prefix: as in `attribute`.
        memory: what the run may take besides the model and the data, in bytes or as "8GiB"; by default half of what is
            free. Scores do not depend on it.
        progress: called with (examples done, examples in all); True shows a bar.

    Returns:
        EdgeScores with float32 values [S, R] in units of the metric.

    Raises:
        InputError: a circuit of another graph, or anything that `attribute` refuses.

    Example:
        >>> scores = eap.attribute_circuit(model, circuit, data)
        >>> harmful = scores.values[circuit.mask] < 0  # the metric would rise without these
    """
    call = called(attribute_circuit, locals())
    progress, reuse_prefix = watched(progress), flag("reuse_prefix", reuse_prefix)
    request = prepare(model, data, metric, ablation, None, ablation_data, reuse_prefix, memory)
    check_circuit(circuit, request.arch)
    check_gradient(request)
    graph = circuit.graph
    info = {
        **origin(request, call, graph, "at-circuit", request.arch.accumulate),
        "additive": False,
        "circuit": {"n_edges": circuit.n_edges, "method": circuit.info.get("method")},
    }
    with borrowed(request.arch.model):
        request = request.verified(graph.heads).with_constants()
        tokens = tokens_together(request, graph, 0.5 * graph.edge_mask[None].to(request.arch.accumulate))
        _, slopes = Slopes(request, graph, len(data), tokens).at(circuit.mask, graph.edge_mask, progress)
    values = torch.zeros(graph.edge_mask.shape, dtype=slopes.dtype)
    values[graph.edge_mask] = slopes[0]
    return EdgeScores(graph, values.float(), info)


class Slopes:
    """The gradient of the metric in a circuit's mask, for one circuit after another, over groups of prompts.

    Args:
        request: verified, with constants.
        examples: how many prompts a group has.
        tokens: the most that a pass has.
    """

    def __init__(self, request: Request, graph: Graph, examples: int, tokens: int) -> None:
        self.request, self.graph, self.tokens = request, graph, tokens
        self.lessons = Lessons(request, graph, examples, 0, tokens)

    def at(self, mask: Tensor, edges: Tensor, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
        """Of each group, how far the circuit's metric is above the model's, [G], and the gradient in its mask [S, R] at
        n edges, bool [S, R], in their order, [G, n]; float64, and shares of the means over all examples."""
        request, groups = self.request, self.lessons.groups
        masks, group_of = mask[None].to(request.arch.accumulate), torch.empty(len(request.data), dtype=torch.int64)
        for number, members in enumerate(groups):
            group_of[members] = number
        above = torch.zeros(len(groups), dtype=torch.float64)
        slopes, done = torch.zeros(len(groups), int(edges.sum()), dtype=torch.float64), 0

        def run(batch: Batch, tokens: int) -> tuple[Tensor, Tensor]:
            self.tokens = tokens  # fewer than before if memory ran out: later circuits begin with as many
            lesson = self.lessons.lesson(batch)
            apart, slope = lesson.gradient(request, self.graph, masks, tokens, signed=True, at=edges)
            return apart.sum(), slope[0, edges].double()

        batches = (batch for number in range(len(groups)) for batch in self.lessons.batches(number))
        for batch, (apart, slope) in dealt_in_memory(request.data, batches, self.tokens, run, request.arch.team):
            number = int(group_of[batch.index[0]])
            above[number] += apart
            slopes[number] += slope
            done += batch.n_examples
            if progress is not None:
                progress(done, len(request.data))
        return above / len(request.data), slopes / len(request.data)
