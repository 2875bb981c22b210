"""Differences of scores, and their error bars."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap

GRAPH = eap.Graph((2, 2), (2, 2), 8)


def scores(n: int, seed: int, data: str, keep: bool = True, method: str = "eap") -> eap.EdgeScores:
    generator = torch.Generator().manual_seed(seed)
    shape = (n, GRAPH.n_senders, GRAPH.n_receivers)
    each = torch.randn(shape, generator=generator) * GRAPH.edge_mask
    info = {"method": method, "n_examples": n, "data_sha256": data, "additive": method != "exact"}
    return eap.EdgeScores(GRAPH, each.mean(0), info, each.var(0, correction=0), each if keep else None)


def test_pairs_of_the_same_data_have_their_own_differences():
    first, second = scores(9, 0, "a"), scores(9, 1, "a")
    found, each = eap.diff(first, second), second.per_example - first.per_example
    torch.testing.assert_close(found.values, each.mean(0))
    torch.testing.assert_close(found.variance, each.var(0, correction=0))
    torch.testing.assert_close(found.confidence(), eap.bootstrap_confidence(each))
    same = eap.diff(first, first)
    assert (
        not same.values.any()
        and not same.variance.any()
        and same.select(10).n_edges == eap.diff(first, first).select(10).n_edges
    )


@pytest.mark.parametrize("keep", [True, False])
def test_other_data_are_independent(keep):
    first, second = scores(6, 0, "a", keep), scores(15, 1, "b", keep)
    found = eap.diff(first, second)
    assert found.per_example is None
    error = (first.variance / 6 + second.variance / 15).sqrt()[GRAPH.edge_mask]
    frame = found.to_pandas()
    assert frame["standard_error"].tolist() == pytest.approx(error.tolist(), rel=1e-5)
    z = (second.values - first.values)[GRAPH.edge_mask].abs() / error
    torch.testing.assert_close(found.confidence()[GRAPH.edge_mask], torch.special.ndtr(z.double()), atol=1e-6, rtol=0)


def test_without_variance_there_are_no_error_bars():
    bare = eap.EdgeScores(GRAPH, scores(3, 0, "a").values, {"method": "eap"})
    found = eap.diff(bare, scores(3, 1, "a"))
    assert (
        found.variance is None
        and "n_examples" not in found.info
        and list(found.to_pandas()) == ["sender", "receiver", "score"]
    )
    with pytest.raises(eap.InputError, match=r"confidence\(\)"):
        found.confidence()


def test_what_cannot_be_compared():
    other = eap.Graph((2, 2), (1, 1), 8)
    zeros = eap.EdgeScores(other, torch.zeros(other.n_senders, other.n_receivers))
    with pytest.raises(eap.InputError, match="second scores: expected those of Graph"):
        eap.diff(scores(3, 0, "a"), zeros)
    for pair in (("eap", "exact"), ("exact", "exact")):
        with pytest.raises(eap.InputError, match=r"node_scores\(\): expected scores of a gradient method"):
            eap.diff(*(scores(3, i, "a", method=method) for i, method in enumerate(pair))).node_scores()


def test_a_difference_is_kept_in_files(tmp_path):
    found = eap.diff(scores(9, 0, "a"), scores(9, 1, "a"))
    found.save(tmp_path / "d.safetensors")
    loaded = eap.EdgeScores.load(tmp_path / "d.safetensors")
    assert loaded == found and loaded.info["difference"] == found.info["difference"]
