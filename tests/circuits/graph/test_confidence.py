"""How sure the signs of scores are, against resampling written out and against the normal distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eap_circuits import EdgeScores, Graph, InputError, bootstrap_confidence, normal_confidence


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=4))
def test_bootstrap_is_the_share_of_all_resamples_with_the_same_sign(examples: list[int]) -> None:
    n, total = len(examples), sum(examples)
    sums = [sum(resample) for resample in itertools.product(examples, repeat=n)]
    wanted = sum((x > 0) - (x < 0) == (total > 0) - (total < 0) for x in sums) / len(sums) if total else 0.0
    draws = 4000
    found = bootstrap_confidence(torch.tensor(examples).float()[:, None, None], draws=draws, seed=3)
    # Six standard errors of a share of so many draws.
    assert float(found) == pytest.approx(wanted, abs=6 * 0.5 / math.sqrt(draws))


def test_sure_edges_unsure_edges_and_no_edges() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.stack(
        [torch.full((40,), 2.0), -torch.ones(40), torch.zeros(40), torch.randn(40, generator=generator)]
    )
    confidence = bootstrap_confidence(values.T.reshape(40, 2, 2))
    assert confidence.flatten()[:3].tolist() == [1.0, 1.0, 0.0]
    assert 0.3 < confidence[1, 1] < 1
    assert torch.equal(confidence, bootstrap_confidence(values.T.reshape(40, 2, 2)))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6))
def test_moments_give_what_many_examples_give(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(200, 3, 4, generator=generator).double() + 0.1 * torch.randn(3, 4, generator=generator)
    mean, variance = values.mean(0), values.var(0, correction=0)
    found = normal_confidence(mean, variance, 200)
    for u, v in itertools.product(range(3), range(4)):
        z = abs(float(mean[u, v])) / math.sqrt(float(variance[u, v]) / 200)
        assert float(found[u, v]) == pytest.approx(0.5 * (1 + math.erf(z / math.sqrt(2))))
    assert float((bootstrap_confidence(values, draws=4000) - found).abs().max()) < 0.06


def test_moments_of_equal_scores() -> None:
    mean = torch.tensor([[2.0, -1.0, 0.0]])
    assert normal_confidence(mean, torch.zeros(1, 3), 5).tolist() == [[1.0, 1.0, 0.0]]


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0))
    whole = bootstrap_confidence(values, draws=50)
    monkeypatch.setattr("eap_circuits.graph.confidence._CHUNK", 150)
    assert torch.equal(bootstrap_confidence(values, draws=50), whole)


def test_selection_among_sure_edges() -> None:
    graph = Graph((2, 2), (1, 1), 8)
    generator = torch.Generator().manual_seed(0)
    examples = torch.randn(12, *graph.edge_mask.shape, generator=generator) * graph.edge_mask
    scores, sure = EdgeScores(graph, examples.mean(0)), bootstrap_confidence(examples) >= 0.95
    circuit = scores.select(10, among=sure, prune=False)
    wanted = scores.values.abs()[sure].sort(descending=True).values[:10]
    assert 0 < int(sure.sum()) < graph.n_edges
    assert torch.equal(scores.values.abs()[circuit.mask].sort(descending=True).values, wanted)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_confidence(torch.ones(3, 4)), r"^values: expected shape \[E, S, R\]"),
        (lambda: bootstrap_confidence(torch.ones(1, 3, 4)), "at least 2 examples"),
        (lambda: bootstrap_confidence(torch.full((2, 3, 4), math.nan)), "finite scores"),
        (
            lambda: bootstrap_confidence(torch.ones(2, 3, 4), draws=0),
            "^draws: expected a whole number from 1 to 1,000,000",
        ),
        (lambda: normal_confidence(torch.ones(3, 4), torch.ones(4, 3), 5), r"^variance: expected shape \[3, 4\]"),
        (lambda: normal_confidence(torch.ones(3, 4), -torch.ones(3, 4), 5), "variances of 0 or more"),
        (lambda: normal_confidence(torch.ones(3, 4), torch.full((3, 4), math.nan), 5), "variances of 0 or more"),
        (
            lambda: normal_confidence(torch.ones(3, 4), torch.ones(3, 4), 1),
            "^n_examples: expected a whole number of at least 2",
        ),
    ],
)
def test_what_is_refused(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()  # type: ignore[operator]
