"""Attribution where a circuit runs: the gradient of its mask, at edges that it keeps and at those that it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import flag, known_arguments
from ..forward import Constants, borrowed, one_want_of_memory
from ..graph import Circuit, EdgeScores
from ..modules.loans import gives_back
from ..provenance import called
from ..ranks import together
from ..request import Progress, check_circuit, prepare, watched
from ..tasks import PairedDataset
from .asked import check_gradient, origin
from .lessons import Runs, tokens_together


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
        _, slopes = Runs(request, graph, len(data), tokens).slopes(circuit.mask, graph.edge_mask, progress=progress)
    values = torch.zeros(graph.edge_mask.shape, dtype=slopes.dtype)
    values[graph.edge_mask] = slopes[0]
    return EdgeScores(graph, values.float(), info)
