"""Means of several scorings."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap

GRAPH = eap.Graph((2, 3), (1, 3), 8)


def scores(seed: int, method: str = "eap") -> eap.EdgeScores:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(GRAPH.n_senders, GRAPH.n_receivers, generator=generator) * GRAPH.edge_mask
    return eap.EdgeScores(GRAPH, values, {"method": method, "seed": seed})


def test_mean():
    several = [scores(i) for i in range(3)]
    found = eap.ensemble(several)
    torch.testing.assert_close(found.values, sum(each.values for each in several) / 3)
    assert found.info["method"] == "eap" and [info["seed"] for info in found.info["scores"]] == [0, 1, 2]
    assert eap.ensemble(several[:1]) == several[0]


def test_rank_mean_by_counting():
    one, other = scores(0), scores(1, "exact")
    one.values[0, :2] = other.values[0, :2] = torch.tensor([0.5, -0.5])  # equal ranks
    found = eap.ensemble([one, other], how="rank-mean")
    edges = GRAPH.edge_mask.nonzero().tolist()
    for u, v in edges[:10]:
        wanted = 0.0
        for each in (one, other):
            size = [abs(float(each.values[a, b])) for a, b in edges]
            own = abs(float(each.values[u, v]))
            wanted += (sum(x < own for x in size) + (sum(x == own for x in size) + 1) / 2) / len(edges) / 2
        assert float(found.values[u, v]) == pytest.approx(wanted, rel=1e-6)
    assert not found.values[~GRAPH.edge_mask].any() and found.info["method"] == "eap and exact"
    with pytest.raises(eap.InputError, match=r"node_scores\(\)"):
        found.node_scores()


def test_ranks_do_not_depend_on_units():
    several = [scores(0), scores(1)]
    scaled = [several[0], eap.EdgeScores(GRAPH, several[1].values * -7)]
    assert torch.equal(*(eap.ensemble(each, how="rank-mean").values for each in (several, scaled)))


def test_what_is_refused():
    other = eap.Graph((2,), (2,), 8)
    wrong = eap.EdgeScores(other, torch.zeros(other.n_senders, other.n_receivers))
    spoiled = scores(0)
    spoiled.values[0, 0] = torch.nan
    cases = {
        "scores: expected at least one scoring, found none": [],
        r"scores\[1\]: expected those of Graph": [scores(0), wrong],
        r"scores\[0\]: expected finite values": [spoiled],
        r"scores\[1\]: expected an EdgeScores, found Tensor": [scores(0), scores(0).values],
    }
    for sentence, given in cases.items():
        with pytest.raises(eap.InputError, match=sentence):
            eap.ensemble(given)
    with pytest.raises(eap.InputError, match="how: expected one of 'mean', 'rank-mean'"):
        eap.ensemble([scores(0)], how="median")
