"""One scoring of the edges from several."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import expected, listed, one_of
from .agreement import of_one_graph, ranks
from .scores import EdgeScores

HOW = ("mean", "rank-mean")


def ensemble(scores: Sequence[EdgeScores], *, how: str = "mean") -> EdgeScores:
    """The mean of several scorings of the same edges: over seeds, prompt templates, models' checkpoints, or methods.

    Args:
        scores: at least one scoring, all of the same graph.
        how: "mean" of the scores, for those in the same units; "rank-mean" of the ranks by absolute score, from 1/n for
            the weakest edge to 1 for the strongest, for others, such as those of different methods. Equal scores share
            their mean rank.

    Returns:
        EdgeScores whose `info` holds that of each scoring.

    Raises:
        InputError: no scores, different graphs, or scores that are not finite.

    Example:
        >>> both = eap.ensemble([eap.attribute(model, data), eap.attribute(model, data, method="eap")], how="rank-mean")
    """
    one_of("how", how, HOW)
    scores = listed("scores", scores, "a list of EdgeScores")
    if not scores:
        raise expected("scores", "at least one scoring", "none")
    named = {f"scores[{number}]": each for number, each in enumerate(scores)}
    of_one_graph(EdgeScores, named)
    for name, each in named.items():
        if not each.values[each.graph.edge_mask].isfinite().all():
            raise expected(name, "finite values", "some that are not")
    graph = scores[0].graph
    edges = graph.edge_mask
    found = torch.stack([each.values[edges].double() for each in scores])
    if how == "rank-mean":
        found = torch.stack([ranks(each.abs()) / graph.n_edges for each in found])
    values = torch.zeros(edges.shape, dtype=torch.float32)
    values[edges] = found.mean(0).float()
    methods = sorted({str(each.info.get("method")) for each in scores})
    additive = how == "mean" and all(each.info.get("additive", True) for each in scores)
    info = {"method": " and ".join(methods), "additive": additive, "ensemble": how}
    return EdgeScores(graph, values, {**info, "scores": [each.info for each in scores]})
