"""Gradual pruning: what goes in a round, the circuits on the way, and all circuits of a tiny model."""

from itertools import combinations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.learning.pruning import middle


@pytest.fixture
def model(make_model):
    return make_model("llama", torch.float32)


@pytest.fixture
def data(make_pairs):
    return make_pairs(seed=3, n=6)


@pytest.fixture
def scores(model, data):
    return eap.attribute(model, data, method="eap")


@pytest.mark.parametrize("seed", range(5))
def test_what_goes_closes_the_gap_by_the_least_squares(seed):
    """Of all sets of as many slopes with that sum; of slopes in whole numbers many sums are equal."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.randint(-9, 10, (10,), generator=generator).double()
    for above in (-30, -7, 0, 4, 30):
        centre = middle(slopes, above, 4)
        going = slopes[(slopes - centre).abs().argsort(stable=True)[:4]]
        every = [torch.stack(some) for some in combinations(slopes, 4)]
        alike = [some for some in every if some.sum() == going.sum()]
        assert going.square().sum() == min(some.square().sum() for some in alike)
        extremes = min(some.sum() for some in every), max(some.sum() for some in every)
        if above < extremes[0] or above > extremes[1]:
            assert going.sum() in extremes


def by_hand(model, data, start, keep, smallest, largest):
    """The circuits of all rounds, one round at a time."""
    mask = start.select(largest).mask
    circuits = [mask]
    while mask.sum() > smallest:
        circuit = eap.Circuit(start.graph, mask)
        ran, scored = eap.evaluate(model, circuit, data), eap.attribute_circuit(model, circuit, data)
        slopes, size = scored.values[mask].double(), int(mask.sum())
        count = min(max(1, round((1 - keep) * size)), size - smallest)
        far = (slopes - middle(slopes, ran.mean - ran.clean, count)).abs()
        left = torch.zeros_like(mask)
        left[mask] = torch.ones(size, dtype=torch.bool).index_fill(0, far.argsort()[:count], False)
        mask = eap.Circuit(start.graph, left).pruned().mask
        circuits.append(mask)
    return circuits


def test_each_round_runs_the_circuit_that_the_last_one_left(make_model, data):
    model = make_model("gpt2")
    start = eap.attribute(model, data, method="eap")
    found = eap.prune_gradually(model, data, start=start, keep=0.6, n_edges=(6, 80))
    rounds = by_hand(model, data, start, 0.6, 6, 80)
    assert len(rounds) > 4
    for mask in rounds[:-1]:
        for how in ("top", "greedy"):
            assert torch.equal(found.select(int(mask.sum()), how=how).mask, mask)


def test_what_lies_beyond_keeps_its_order(model, data, scores):
    found, edges = eap.prune_gradually(model, data, start=scores, n_edges=(20, 60)), scores.graph.edge_mask
    n = scores.graph.n_edges
    assert torch.allclose(found.values[edges].sort().values, torch.arange(1, n + 1) / n)
    first = scores.select(60)
    beyond = edges & ~first.mask
    assert found.values[first.mask].min() > found.values[beyond].max()
    order = scores.values[beyond].abs().argsort(stable=True)
    assert (found.values[beyond][order].diff() > 0).all()
    assert found.info["pruning"] == {"keep": 0.75, "smallest": 20, "largest": 60, "start": "eap"}


@pytest.mark.parametrize("metric", [None, "prob_diff", "kl_divergence"])
def test_circuits_come_nearer_to_the_model(metric, model, data, scores):
    found = eap.prune_gradually(model, data, metric, start=scores, n_edges=(10, 200))
    sizes = [15, 20, 40]

    def apart(ranking):
        ran = eap.evaluate(model, [ranking.select(n, exactly=True) for n in sizes], data, metric)
        return torch.tensor([abs(result.mean - result.clean) for result in ran]).mean()

    assert apart(found) < apart(scores)


def test_passes_change_nothing_but_rounding(model, data, scores):
    whole, cut = (eap.prune_gradually(model, data, start=scores, n_edges=(20, 60), memory=m) for m in (None, 0))
    assert torch.equal(whole.select(20).mask, cut.select(20).mask)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep": 0}, "keep: expected a share between 0 and 1"),
        ({"keep": 1}, "keep: expected a share between 0 and 1"),
        ({"n_edges": (5, 2)}, "n_edges: expected the smaller"),
        ({"metric": "rank"}, "metric: .*kl_divergence"),
        ({"ablation": "optimal"}, "ablation: .*optimal_constants"),
        ({"start": None}, "start: expected"),
    ],
)
def test_what_cannot_be_pruned_is_refused(given, words, model, data, scores):
    with pytest.raises(eap.InputError, match=words):
        eap.prune_gradually(model, data, **{"start": scores, **given})
