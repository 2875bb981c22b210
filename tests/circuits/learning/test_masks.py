"""Rankings that are learned: against all circuits of a tiny model, seeds, memory, and what is refused."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import eap_circuits as eap
from eap_circuits import learning
from eap_circuits.budget import PeakBytes
from eap_circuits.forward import batch_of, borrowed
from eap_circuits.learning import GATES
from eap_circuits.learning.lessons import prepare_lesson, tokens_together
from eap_circuits.request import prepare


def divergence(model, circuits, data):
    """Of each circuit from the model, in nats."""
    return torch.tensor([-result.mean for result in eap.evaluate(model, circuits, data, "kl_divergence")])


@pytest.mark.parametrize(("number", "size"), [(0, 4), (0, 6), (1, 4), (1, 6)])
def test_the_best_of_all_circuits_is_found(number, size, all_circuits):
    model, data, scores, tried = all_circuits(number, size)
    every = divergence(model, tried, data)
    rankings = [scores] + [
        eap.learn_mask(
            model, data, "kl_divergence", start=scores, steps=100, n_edges=size, gates=gates, examples=8, circuits=1
        )
        for gates in GATES
    ]
    before, *after = divergence(model, [each.select(size, exactly=True) for each in rankings], data)
    assert before > every.min() + 1e-3, "EAP's circuit is not the best one"
    assert max(after) < every.min() + 1e-6


def test_what_is_learned_is_better_than_where_it_started(model, data, scores):
    learned = eap.learn_mask(model, data, "kl_divergence", start=scores, steps=30)
    sizes = [20, 40, 80]
    before, after = (
        divergence(model, [each.select(n, exactly=True) for n in sizes], data) for each in (scores, learned)
    )
    assert after.mean() < 0.9 * before.mean()


def test_values_are_ranks_of_the_graph_s_edges(model, data, scores):
    learned = eap.learn_mask(model, data, start=scores, steps=2)
    edges, n = scores.graph.edge_mask, scores.graph.n_edges
    assert torch.allclose(learned.values[edges].sort().values, torch.arange(1, n + 1) / n)
    assert not learned.values[~edges].any()
    assert learned.info["method"] == "learned" and learned.info["learning"]["steps"] == 2
    with pytest.raises(eap.InputError, match="node_scores"):
        learned.node_scores()


def test_edges_beyond_the_largest_size_drawn_keep_their_order(model, data, scores):
    n, largest = scores.graph.n_edges, 40
    learned = eap.learn_mask(model, data, start=scores, steps=20, n_edges=(10, largest))
    before, after = (each.values[scores.graph.edge_mask].abs() for each in (scores, learned))
    order = after.argsort()
    assert (before[order[: n - largest]].diff() >= 0).all()
    drawn = set(order[-largest:].tolist())
    assert drawn != set(before.argsort()[-largest:].tolist()), "others have come in"
    assert (before[order[-largest:]].diff() < 0).any(), "inside they have another order"


def test_a_seed_gives_the_same_bits_and_another_one_others(model, data, scores):
    learn = [eap.learn_mask(model, data, start=scores, steps=3, seed=seed).values for seed in (1, 1, 2)]
    assert torch.equal(learn[0], learn[1]) and not torch.equal(learn[0], learn[2])


def test_every_seed_that_is_taken_can_be_drawn_from(model, data, scores):
    largest = 2**64 - 1
    eap.learn_mask(model, data, start=scores, steps=1, seed=largest)
    eap.ibcircuit(model, data, steps=1, seed=largest)
    for call in (partial(eap.learn_mask, start=scores), eap.ibcircuit):
        with pytest.raises(eap.InputError, match="seed: expected a whole number from 0 to"):
            call(model, data, steps=1, seed=largest + 1)


def test_seeds_side_by_side_learn_what_each_learns_alone(model, data, scores):
    learn = partial(eap.learn_mask, model, data, start=scores, steps=15)
    together, alone = learn(seed=[1, 2]), [learn(seed=seed) for seed in (1, 2)]
    values = torch.stack([each.values.flatten() for each in (*together, *alone)])
    agree = torch.corrcoef(values)
    assert agree[0, 2] > 1 - 1e-5 and agree[1, 3] > 1 - 1e-5
    assert agree[0, 1] < min(agree[0, 2], agree[1, 3]), "seeds differ"
    assert [each.info["learning"] for each in together] == [each.info["learning"] for each in alone]
    assert torch.equal(learn(seed=[1])[0].values, alone[0].values)


def test_a_target_counts_by_the_pairs_weights_as_the_models_own_value_does(model, data, scores):
    weighted = replace(data, weights=torch.arange(1, len(data) + 1))
    own = eap.evaluate(model, scores.select(1), data).clean_values
    one, other = (eap.learn_mask(model, weighted, start=scores, steps=5, target=x) for x in (None, own))
    assert torch.corrcoef(torch.stack([one.values.flatten(), other.values.flatten()]))[0, 1] > 1 - 1e-6


def good_logit(logits, batch):
    return logits.gather(1, batch.answers[:, :1])[:, 0]


@pytest.mark.parametrize("metric", [None, "prob_diff", "js_divergence", good_logit])
def test_the_metric_comes_nearer_to_the_model_s_own(metric, model, data, scores):
    learned = eap.learn_mask(model, data, metric, start=scores, steps=60, n_edges=40)
    ran = [eap.evaluate(model, each.select(40, exactly=True), data, metric) for each in (scores, learned)]
    start, end = (float((result.values - result.clean_values).abs().mean()) for result in ran)
    assert end < start


@pytest.mark.parametrize("ablation", ["zero", "mean", "constants"])
def test_other_ablations(ablation, model, data, scores):
    if ablation == "constants":
        ablation = eap.optimal_constants(model, scores.select(40), data, "kl_divergence", steps=2)
    learned = eap.learn_mask(model, data, "kl_divergence", start=scores, steps=30, n_edges=40, ablation=ablation)
    start, end = (
        eap.evaluate(model, each.select(40, exactly=True), data, "kl_divergence", ablation=ablation).mean
        for each in (scores, learned)
    )
    assert end > start


def test_the_cut_into_passes_changes_only_rounding(model, data, scores):
    whole = eap.learn_mask(model, data, start=scores, steps=1, circuits=3)
    cut = eap.learn_mask(model, data, start=scores, steps=1, circuits=3, memory=0)
    agree = torch.corrcoef(torch.stack([whole.values.flatten(), cut.values.flatten()]))[0, 1]
    assert agree > 1 - 1e-6


def test_passes_keep_to_the_budget(model, data, scores):
    """The largest pass that is said to fit takes no more than that when it is counted."""
    request = prepare(model, data, "kl_divergence")
    graph, mask = scores.graph, 0.5 * scores.graph.edge_mask.float()[None]
    with borrowed(model):
        for allowed in (4_000_000, 16_000_000):
            tokens = tokens_together(replace(request, memory=allowed), graph, mask)
            batch = batch_of(data, torch.arange(len(data)), True, request.arch.device)
            copies = tokens // batch.clean.numel()
            if copies == 0:
                continue
            with PeakBytes() as count:
                prepare_lesson(request, graph, batch).gradient(request, graph, mask.expand(copies, -1, -1), tokens)
            assert count.peak <= 1.1 * allowed, (tokens, copies)


def test_learning_goes_on_with_smaller_passes(model, data, scores, monkeypatch):
    right, real = eap.learn_mask(model, data, start=scores, steps=2), learning.lessons.learning_run

    def run(runner, graph, ablated, masks, at):
        if len(masks) * runner.batch.n_examples > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore lines")
        return real(runner, graph, ablated, masks, at)

    monkeypatch.setattr(learning.lessons, "learning_run", run)
    found = eap.learn_mask(model, data, start=scores, steps=2)
    agree = torch.corrcoef(torch.stack([right.values.flatten(), found.values.flatten()]))[0, 1]
    assert agree > 1 - 1e-5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metric": "rank"}, "metric: .*kl_divergence"),
        ({"n_edges": (5, 2)}, "n_edges: expected the smaller"),
        ({"n_edges": (0, 2)}, "n_edges"),
        ({"n_edges": 0}, "n_edges"),
        ({"n_edges": (1, 2, 3)}, "n_edges"),
        ({"steps": 0}, "steps"),
        ({"rate": -1}, "rate"),
        ({"circuits": 0}, "circuits"),
        ({"examples": 0}, "examples"),
        ({"seed": -1}, "seed"),
        ({"seed": [0, -1]}, "seed: .*-1"),
        ({"seed": []}, "seed: expected at least one"),
        ({"gates": "bernoulli"}, "gates: .*uniform"),
        ({"ablation": "optimal"}, "ablation: .*optimal_constants"),
    ],
)
def test_what_cannot_be_learned_is_refused(given, said, model, data, scores):
    with pytest.raises(eap.InputError, match=said):
        eap.learn_mask(model, data, start=scores, **given)


def test_scores_of_another_model_are_refused(model, data, scores, make_model, make_pairs):
    other = eap.attribute(make_model("gpt2", torch.float32), data, method="eap")
    with pytest.raises(eap.InputError, match="start: expected scores of"):
        eap.learn_mask(model, data, start=other)
    with pytest.raises(eap.InputError, match="start"):
        eap.learn_mask(model, data, start=scores.select(10))
