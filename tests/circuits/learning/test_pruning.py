"""Gradual pruning: what goes in a round, the circuits on the way, and all circuits of a tiny model."""

from itertools import combinations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.learning import pruning
from eap_circuits.learning.pruning import centre, nearest


@pytest.mark.parametrize("groups", [1, 2])
def test_what_goes_has_the_least_squares_of_all_sets_with_its_sums(groups):
    """Of slopes in small whole numbers many sets have the same sums."""
    generator = torch.Generator().manual_seed(0)
    others = 0
    for _ in range(20):
        slopes = torch.randint(-2, 3, (groups, 12), generator=generator).double()
        above = 3 * torch.randn(groups, generator=generator, dtype=torch.float64)
        going = slopes[:, nearest(slopes, centre(slopes, above, 4))[:4]]
        every = torch.stack([slopes[:, list(some)] for some in combinations(range(12), 4)])
        alike = every[(every.sum(2) == going.sum(1)).all(1)]
        assert going.square().sum() == alike.square().sum((1, 2)).min()
        others += len(alike) - 1
    assert others > 50


def test_what_goes_closes_the_gap():
    """Of a thousand edges, as far as any hundred of them can."""
    generator = torch.Generator().manual_seed(1)
    slopes = torch.randn(3, 1000, generator=generator, dtype=torch.float64) ** 3
    for above in (torch.tensor([1.0, -2.0, 5.0]), torch.tensor([-30.0, 0.0, 4.0])):
        going = slopes[:, nearest(slopes, centre(slopes, above.double(), 100))[:100]]
        assert (going.sum(1) - above).norm() < 0.05 * above.norm()
        assert going.square().sum() < slopes.square().sum() * 100 / 1000


@pytest.mark.parametrize(("number", "most"), [(2, 0), (3, 1)])
def test_among_all_circuits_of_four_edges_few_are_better(number, most, all_circuits):
    model, data, scores, every = all_circuits(number, 4)
    found = eap.prune_gradually(model, data, start=scores, keep=0.9, n_edges=(4, scores.graph.n_edges))
    start, pruned = (each.select(4, exactly=True) for each in (scores, found))
    ran = eap.evaluate(model, [*every, start, pruned], data)
    *apart, before, after = ((result.values - result.clean_values).abs().mean() for result in ran)
    assert sum(each < after - 1e-6 for each in apart) <= most
    assert sum(each < before - 1e-6 for each in apart) > 5, "EAP's circuit is not among the best"


def by_hand(model, data, start, keep, smallest, largest):
    """The circuits of all rounds, one round at a time."""
    mask = start.select(largest).mask
    circuits = [mask]
    while mask.sum() > smallest:
        circuit = eap.Circuit(start.graph, mask)
        ran, scored = eap.evaluate(model, circuit, data), eap.attribute_circuit(model, circuit, data)
        slopes, size = scored.values[mask].double()[None], int(mask.sum())
        count = min(max(1, round((1 - keep) * size)), size - smallest)
        above = torch.tensor([ran.mean - ran.clean], dtype=torch.float64)
        going, left = nearest(slopes, centre(slopes, above, count))[:count], torch.zeros_like(mask)
        left[mask] = torch.ones(size, dtype=torch.bool).index_fill(0, going, False)
        mask = eap.Circuit(start.graph, left).pruned().mask
        circuits.append(mask)
    return circuits


def test_each_round_runs_the_circuit_that_the_last_one_left(make_model, data):
    model = make_model("llama")
    start = eap.attribute(model, data, method="eap")
    found = eap.prune_gradually(model, data, start=start, keep=0.6, n_edges=(6, 150), examples=len(data))
    rounds = by_hand(model, data, start, 0.6, 6, 150)
    assert len(rounds) > 4
    for mask in rounds[:-1]:
        for how in ("top", "greedy"):
            assert torch.equal(found.select(int(mask.sum()), how=how).mask, mask)


@pytest.mark.parametrize(("examples", "sizes"), [(None, [2, 2, 1]), (4, [4, 1])])
def test_groups_count_alike_whatever_their_size(examples, sizes, make_model, data, monkeypatch):
    """The gap and the slopes of each are means over its pairs."""
    model, data, seen = make_model("llama"), data[:5], []

    class Seen(pruning.Runs):
        def slopes(self, mask, edges):
            seen.append((mask, self.lessons.groups, super().slopes(mask, edges)))
            return seen[-1][2]

    monkeypatch.setattr(pruning, "Runs", Seen)
    start = eap.attribute(model, data, method="eap")
    eap.prune_gradually(model, data, start=start, n_edges=(60, 150), keep=0.5, examples=examples)
    mask, groups, (above, slopes) = seen[0]
    circuit = eap.Circuit(start.graph, mask)
    assert [len(group) for group in groups] == sizes
    for group, gap, slope in zip(groups, above, slopes, strict=True):
        ran = eap.evaluate(model, circuit, data[group])
        assert float(gap) == pytest.approx(ran.mean - ran.clean, rel=1e-5)
        right = eap.attribute_circuit(model, circuit, data[group]).values[mask]
        assert (slope - right).abs().max() < 1e-5 * right.abs().max()


def test_what_lies_beyond_keeps_its_order(model, data, scores):
    found, edges = eap.prune_gradually(model, data, start=scores, n_edges=(20, 60)), scores.graph.edge_mask
    n = scores.graph.n_edges
    assert torch.allclose(found.values[edges].sort().values, torch.arange(1, n + 1) / n)
    first = scores.select(60)
    beyond = edges & ~first.mask
    assert found.values[first.mask].min() > found.values[beyond].max()
    order = scores.values[beyond].abs().argsort(stable=True)
    assert (found.values[beyond][order].diff() > 0).all()
    asked = {"keep": 0.75, "examples": 2, "smallest": 20, "largest": 60, "start": "eap"}  # 2 is a quarter of 6
    assert found.info["pruning"] == asked


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_single_size_is_where_pruning_ends(share, model, data, scores):
    """It begins at a fifth of all edges, or at all of them where it ends with more than that."""
    n = scores.graph.n_edges
    size, first = round(share * n), round(0.2 * n) if share < 0.2 else n
    found, both = (eap.prune_gradually(model, data, start=scores, n_edges=each) for each in (size, (size, first)))
    assert torch.equal(found.values, both.values) and found.info["pruning"]["largest"] == first
    before, after = (each.select(size, exactly=True) for each in (scores, found))
    assert not torch.equal(before.mask, after.mask), "other edges are left"


@pytest.mark.parametrize("metric", [None, "prob_diff", "kl_divergence"])
def test_circuits_come_nearer_to_the_model(metric, model, data, scores):
    found = eap.prune_gradually(model, data, metric, start=scores, n_edges=(10, 200))
    sizes = [15, 20, 40]

    def apart(ranking):
        ran = eap.evaluate(model, [ranking.select(n, exactly=True) for n in sizes], data, metric)
        return torch.tensor([abs(result.mean - result.clean) for result in ran]).mean()

    assert apart(found) < apart(scores)


def test_passes_change_nothing_but_rounding(make_model, data):
    """Edges without any effect go in the order of their rounding errors."""
    model = make_model("llama")
    start = eap.attribute(model, data, method="eap")
    whole, cut = (eap.prune_gradually(model, data, start=start, n_edges=(20, 60), memory=m) for m in (None, 0))
    agree = torch.corrcoef(torch.stack([whole.values.flatten(), cut.values.flatten()]))[0, 1]
    assert agree > 1 - 1e-3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keep": 0}, "keep: expected a share between 0 and 1"),
        ({"examples": 0}, "examples"),
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
