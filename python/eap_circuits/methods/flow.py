"""Information flow routes (Ferrando & Voita 2024, arXiv 2403.00824; `information-flow-routes`).

A sender matters to a receiver in so far as it makes up the receiver's input. With x_v the residual stream that v reads
and c_u what u has written to it, at each token

    proximity(u, v) = max(0, ‖x_v‖₁ − ‖x_v − c_u‖₁),    importance(u, v) = proximity(u, v) / Σ_u' proximity(u', v),

averaged over a prompt's tokens and then over prompts. Position embeddings and biases belong to no sender. The method
uses no corrupted prompts, no metric and no gradient; all receivers behind one norm have the same scores. A token where
no sender brings a receiver closer to its input counts as 0 (the published package gives NaN there).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..adapters import Norm, receiver_sites, sender_sites
from ..budget import most_tokens
from ..checkpoint import Checkpoint
from ..forward import Batch, Runner, upload
from ..graph import Graph
from ..recording import ReferenceRun, record_run
from ..request import Progress
from .spec import AttributionRequest, Method
from .statistics import BatchScores, Statistics, score_batches

WORKSPACE = 2**26  # bytes of expanded contributions and proximities held at once


class Site(NamedTuple):
    """A norm in front of receivers, these receivers, and how many senders of their stream they see."""

    norm: Norm
    receivers: list[int]
    reach: int


class FlowMethod(Method):
    """Shares of receivers' inputs."""

    ablated: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    reuses: ClassVar[bool] = False  # prompts run whole: nothing is compared with the corrupted ones

    def operator(self, request: AttributionRequest) -> str:
        return "none: torch.cdist measures how near contributions are to inputs"

    def run(
        self, request: AttributionRequest, statistics: Statistics, checkpoint: Checkpoint, progress: Progress | None
    ) -> None:
        tokens = most_tokens(request.arch.device_kind)
        score_batches(request, tokens, partial(score_batch, request), statistics, checkpoint, progress)


def score_batch(request: AttributionRequest, batch: Batch, tokens: int) -> BatchScores:
    """Scores of the batch's examples, whose prompts run whole."""
    graph = request.graph
    record = record_run(Runner(request.arch, graph, batch, every_mlp=True), corrupted=False)
    scores = BatchScores(request, batch)
    for number, (senders, receivers, _) in enumerate(graph.streams):
        own, sites = batch.at(number), _sites(request, graph, number)
        lengths = own.host["sizes"][0, :, None]
        real = torch.arange(own.shape[1]) < lengths  # [E, T]
        rows = real.flatten().nonzero()[:, 0]
        shares = _shares(request, own).to(request.arch.accumulate)[:, None]
        weights = (real.to(request.arch.accumulate) / lengths * shares).flatten()[rows]  # [n]
        tile = max(1, WORKSPACE // (_per_token(graph, len(sites)) * request.arch.accumulate.itemsize))
        site_of = torch.empty(graph.n_receivers, dtype=torch.int64)
        for index, site in enumerate(sites):
            site_of[site.receivers] = index
        rows, weights, site_of = upload(batch.rows.device, rows, weights, site_of[receivers])
        for some, weight in zip(rows.split(tile), weights.split(tile), strict=True):
            importance = _importance(request, record, sites, number, some)  # [n, sites, S]
            found = torch.einsum("n,nvu->uv", weight, importance).double()
            scores.sums["total"][senders, receivers] += found[:, site_of]
    return scores


def _shares(request: AttributionRequest, batch: Batch) -> Tensor:
    """How much each row counts: a pair's weight, shared by its rows."""
    weights = request.data.weights
    own = torch.ones(batch.n_examples) if weights is None else weights[batch.index] / weights.mean()
    return (own / batch.pair.bincount())[batch.pair]


def _sites(request: AttributionRequest, graph: Graph, stream: int) -> list[Site]:
    """Those of a stream, in order of depth."""
    sites: dict[Norm, Site] = {}
    for site in receiver_sites(request.arch, graph):
        if site.stream == stream:
            found = sites.setdefault(site.norm, Site(site.norm, [], site.reach - site.begin))
            found.receivers.extend(range(site.receivers.start, site.receivers.stop))
    return list(sites.values())


def _per_token(graph: Graph, sites: int) -> int:
    """Numbers held for a token: what the sites read, one layer's heads, and all proximities."""
    return (sites + max(graph.n_heads)) * graph.d_model + 3 * sites * graph.n_senders


def _importance(
    request: AttributionRequest, record: ReferenceRun, sites: list[Site], stream: int, rows: Tensor
) -> Tensor:
    """Each of a stream's senders' share of what each site reads at some tokens, [n, sites, S]."""
    inputs = (_at(request, record.norm_inputs[site.norm], rows).to(rows.device) for site in sites)
    read = torch.stack(list(inputs), 1)  # [n, sites, D]
    size = read.abs().sum(-1, keepdim=True)
    proximity = read.new_zeros(*size.shape[:2], sites[-1].reach)
    sender = 0
    for written in (each.to(rows.device) for each in _contributions(request, record, stream, rows)):
        first = sum(site.reach <= sender for site in sites)  # they are in order of depth
        following = sender + written.shape[1]
        distance = torch.cdist(read[:, first:], written, p=1)  # no [n, sites, h, D]
        proximity[:, first:, sender:following] = (size[:, first:] - distance).clamp(min=0)
        sender = following
    total = proximity.sum(-1, keepdim=True)
    return torch.where(total == 0, 0, proximity / total)


def _contributions(request: AttributionRequest, record: ReferenceRun, stream: int, rows: Tensor) -> Iterator[Tensor]:
    """What each group of a stream's senders writes at some tokens, [n, h, D], one group after another."""
    for site, written in zip(sender_sites(request.arch), record.written, strict=True):
        if site.stream != stream:
            continue
        x = _at(request, written, rows)
        if site.heads is None:
            yield x[:, None] * site.factor
            continue
        by_head = x.unflatten(1, (site.heads.n_heads, -1))
        for some, weight in site.heads.out_weights(request.arch.accumulate):  # [h, K, D]
            yield torch.einsum("nhk,hkd->nhd", by_head[:, some], weight)


def _at(request: AttributionRequest, x: Tensor, rows: Tensor) -> Tensor:
    """[E, T, X] -> [n, X] at some of the batch's tokens, in the accumulation dtype."""
    return x.flatten(0, 1)[rows.to(x.device)].to(request.arch.accumulate)
