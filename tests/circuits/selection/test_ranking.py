"""Edges in order of their scores, a block and a sample at a time: the very edges that sorting all of them gives."""

from __future__ import annotations

import pytest
import torch

from eap_circuits import EdgeScores, Graph, InputError
from eap_circuits.edges import blocks
from eap_circuits.selection import ranking

GRAPHS = [
    Graph((4, 2), (2, 2), 8),
    Graph((3,) * 3, (1,) * 3, 8, parallel=True),
    Graph((2,) * 2, (1,) * 2, 8, heads="query"),
]
KINDS = ["distinct", "ties", "few", "equal", "zeros", "half"]


@pytest.fixture(params=[(1, 1), (30, 20)], ids=["rows", "blocks"])
def sizes(request, monkeypatch):
    """Entries of a block, and ranks of a sample."""
    entries, sample = request.param
    monkeypatch.setattr("eap_circuits.edges.staircase._ENTRIES", entries)
    monkeypatch.setattr(ranking, "_SAMPLE", sample)


def scores(graph: Graph, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(graph.edge_mask.shape, generator=generator)
    if kind == "ties":
        values = (values * 2).round()
    if kind == "few":
        values *= torch.rand(values.shape, generator=generator) < 0.05
    if kind == "half":
        values = values.to(torch.bfloat16)
    if kind == "equal":
        values.fill_(-1.5)
    return values.zero_() if kind == "zeros" else values.masked_fill(~graph.edge_mask, torch.nan)


def sorted_by_hand(graph: Graph, values: torch.Tensor, n: int, signed: bool, among: torch.Tensor) -> torch.Tensor:
    """The n highest; of equal ones the first in the order of senders, then of receivers."""
    rank = values if signed else values.abs()
    order = sorted((-float(rank[u, v]), u, v) for u, v in (among & graph.edge_mask).nonzero().tolist())
    mask = torch.zeros_like(graph.edge_mask)
    for _, u, v in order[:n]:
        mask[u, v] = True
    return mask


@pytest.mark.parametrize("kind", KINDS)
def test_the_strongest_of_every_size_are_those_of_a_sorted_list(kind, sizes):
    for seed, (signed, share) in enumerate(((False, 1.0), (True, 1.0), (False, 0.4))):
        graph = GRAPHS[(seed + KINDS.index(kind)) % len(GRAPHS)]
        values = scores(graph, kind, seed)
        among = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed + 9)) <= share
        asked = [0, 1, 2, 7, graph.n_edges // 3, graph.n_edges // 2, graph.n_edges]
        given = EdgeScores(graph, values)
        found = given.select_sizes(asked, signed=signed, among=among)
        for n, circuit in zip(asked, found, strict=True):
            right = sorted_by_hand(graph, values, n, signed, among)
            assert torch.equal(given.select(n, signed=signed, among=among, prune=False).mask, right)
            one = given.select(n, signed=signed, among=among)
            assert circuit == one and circuit.info == one.info


@pytest.mark.parametrize("how", ["greedy", "optimal"])
def test_all_ways_to_select_take_several_sizes(how):
    graph = GRAPHS[1]
    given = EdgeScores(graph, scores(graph, "ties", 4))
    asked = [30, 3, 12, 3]
    for n, circuit in zip(asked, given.select_sizes(asked, how), strict=True):
        one = given.select(n, how)
        assert circuit == one and circuit.info == one.info


@pytest.mark.parametrize("asked", [[3, None], [-1], [2.5], 3, "34"])
def test_other_sizes_are_refused(asked):
    given = EdgeScores(GRAPHS[0], torch.zeros_like(GRAPHS[0].edge_mask, dtype=torch.float32))
    with pytest.raises(InputError, match="n_edges"):
        given.select_sizes(asked)


@pytest.mark.parametrize("graph", GRAPHS, ids=["kv", "parallel", "query"])
def test_blocks_cover_every_edge_once_in_order(graph, sizes):
    found = []
    for rows, columns, none in blocks(graph):
        part = torch.ones(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool)
        part[:, : none.shape[1]] = ~none
        found += [(rows.start + u, columns.start + v) for u, v in part.nonzero().tolist()]
    assert found == [(u, v) for u, v in graph.edge_mask.nonzero().tolist()]
