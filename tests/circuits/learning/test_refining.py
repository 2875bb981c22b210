"""Refined circuits: no swap helps them, all circuits of a tiny model, size, checkpoint, and what is refused."""

import pytest
import torch

import eap_circuits as eap


@pytest.fixture
def circuit(model, data):
    return eap.attribute(model, data, method="eap").select(30, exactly=True)


def distances(model, circuits, data, metric=None):
    """Of circuits' metric from the model's, means over pairs."""
    ran = eap.evaluate(model, circuits, data, metric)
    return torch.stack([(result.values - result.clean_values).abs().mean() for result in ran])


@pytest.mark.parametrize(("number", "size"), [(0, 6), (1, 4), (1, 6), (2, 4)])
def test_the_best_of_all_circuits_is_found(number, size, all_circuits):
    model, data, scores, every = all_circuits(number, size)
    apart, start = distances(model, every, data), scores.select(size, exactly=True)
    found = eap.refine(model, start, data, candidates=11)
    before, after = distances(model, [start, found], data)
    assert before > apart.min() + 1e-3, "EAP's circuit is not the best one"
    assert after < apart.min() + 1e-6
    said = found.info["refining"]
    assert [said["before"], said["after"]] == pytest.approx([float(before), float(after)], abs=1e-5)


def test_no_swap_of_edges_whose_gradient_asks_for_it_helps_any_more(model, data, circuit):
    found = eap.refine(model, circuit, data, rounds=50, candidates=8)
    (before, after) = distances(model, [circuit, found], data)
    assert after < 0.5 * before and found.n_edges <= circuit.n_edges
    assert torch.equal(found.pruned().mask, found.mask)
    again = eap.refine(model, found, data, rounds=50, candidates=8)
    assert torch.equal(again.mask, found.mask)
    # The gradient of the distance, by that of the metric on each pair by itself.
    edges, slope = found.graph.edge_mask, torch.zeros(found.mask.shape)
    (ran,) = eap.evaluate(model, [found], data)
    for pair, above in enumerate(ran.values - ran.clean_values):
        slope += eap.attribute_circuit(model, found, data[[pair]]).values * above.sign()
    going = found.mask.nonzero()[slope[found.mask].argsort(descending=True)[:4]]
    coming = (edges & ~found.mask).nonzero()[slope[edges & ~found.mask].argsort()[:4]]
    swapped = []
    for n in (1, 2, 4):
        mask = found.mask.clone()
        mask[tuple(going[:n].T)], mask[tuple(coming[:n].T)] = False, True
        swapped.append(eap.Circuit(found.graph, mask))
    assert (distances(model, swapped, data) > after - 1e-4 * before).all()


def test_before_is_the_distance_of_the_circuit_that_was_given(model, data, circuit):
    """Under constants, edges on no path change what a circuit does."""
    graph = circuit.graph
    later = torch.arange(graph.n_receivers) >= graph.n_receivers // 2  # heads of the first layers read nothing
    given = eap.Circuit(graph, graph.edge_mask & ~circuit.mask & later)
    found = eap.refine(model, given, data, rounds=1, candidates=1, ablation="mean")
    ran = eap.evaluate(model, [given, given.pruned(), found], data, ablation="mean")
    before, pruned, after = (float((each.values - each.clean_values).abs().mean()) for each in ran)
    said = found.info["refining"]
    assert before != pytest.approx(pruned, rel=1e-3)
    assert [said["before"], said["after"]] == pytest.approx([before, after], rel=1e-4)


@pytest.mark.parametrize("whole", [False, True])
def test_a_circuit_of_nothing_or_of_everything_stays(whole, model, data, circuit):
    edges = circuit.graph.edge_mask
    mask = edges if whole else torch.zeros_like(edges)
    assert torch.equal(eap.refine(model, eap.Circuit(circuit.graph, mask), data).mask, mask)


@pytest.mark.parametrize("metric", ["prob_diff", "kl_divergence"])
def test_it_refines_by_any_metric_and_goes_on_after_a_stop(metric, model, data, circuit, tmp_path, monkeypatch):
    monkeypatch.setattr("eap_circuits.checkpoint.file.SECONDS_BETWEEN_SAVES", 0.0)
    right = eap.refine(model, circuit, data, metric, rounds=3)
    before, after = distances(model, [circuit, right], data, metric)
    assert after < before

    def stop(done, of):
        if done == 1:
            raise KeyboardInterrupt

    file = tmp_path / "refining.safetensors"
    with pytest.raises(KeyboardInterrupt):
        eap.refine(model, circuit, data, metric, rounds=3, checkpoint=file, progress=stop)
    found = eap.refine(model, circuit, data, metric, rounds=3, checkpoint=file)
    assert found == right and found.info["refining"] == right.info["refining"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rounds": 0}, "rounds"),
        ({"candidates": 0}, "candidates"),
        ({"metric": "rank"}, "metric: .*kl_divergence"),
        ({"ablation": "optimal"}, "ablation: .*optimal_constants"),
        ({"circuit": None}, "circuit: expected a Circuit"),
    ],
)
def test_what_cannot_be_refined_is_refused(given, words, model, data, circuit):
    with pytest.raises(eap.InputError, match=words):
        eap.refine(model, **{"circuit": circuit, "data": data, **given})
