"""Ablations other than patching, against their definition, and what does not change results."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import (
    circuit_of,
    fast_by_kind,
    logit_difference,
    loss_of,
    prompts,
    random_circuit,
    random_edges,
)
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import of_circuit, plain_run, scores


def ablated(name, every, like):
    """c' of every sender, [S] of [T, D] like its own contributions, from `every` ablation prompt's."""
    if name == "zero":
        return [torch.zeros_like(c) for c in like]
    if name == "mean":
        return [torch.cat(all_of_u).mean(0).expand_as(c) for c, *all_of_u in zip(like, *every)]
    return [
        torch.stack([torch.stack([c[t] for c in all_of_u if len(c) > t]).mean(0) for t in range(len(own))])
        for own, *all_of_u in zip(like, *every)
    ]


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_circuits_scores_and_single_edges_are_their_definitions(kind, heads, make_model, make_pairs, relative):
    model, data, other = make_model(kind), make_pairs(seed=11, n=2), make_pairs(seed=12, n=3)
    other = eap.PairedDataset.from_tokens(other.clean, other.corrupted, torch.tensor([11, 9, 6]), other.answers)
    graph, decoder = bind(model).graph(heads), Decoder(model, heads)
    edges = random_edges(graph, 3)
    none = eap.Circuit(graph, torch.zeros_like(graph.edge_mask))
    circuits = [random_circuit(graph, 3, 0.3), random_circuit(graph, 4, 0.9), none]
    assert circuits[0].n_edges and circuits[1].n_edges
    # What MLPs that read nothing of the circuit make of constants is not their own.
    unfed = graph.edge_mask.clone()
    for layer in range(graph.n_layers):
        unfed[:, graph.receivers_at(layer, "mlp")] = False
    circuits += [eap.Circuit(graph, unfed), eap.Circuit(graph, unfed & random_circuit(graph, 5, 0.9).mask)]
    all_but_one = [eap.Circuit(graph, graph.edge_mask & ~circuit_of(graph, [edge]).mask) for edge in edges]
    with StayDouble():
        embeddings = [[decoder.embed(tokens) for tokens in prompts(data, e)] for e in range(len(data))]
        own = [plain_run(decoder, clean) for clean, _ in embeddings]
        every = [plain_run(decoder, decoder.embed(prompts(other, e)[0])).c for e in range(len(other))]

        def values(kept, gone):
            """The metric of a circuit's run on every example, by definition."""
            runs = (plain_run(decoder, x, of_circuit(kept.mask, c)) for (x, _), c in zip(embeddings, gone))
            return torch.stack([logit_difference(run.logits, data, e) for e, run in enumerate(runs)]).detach()

        clean = torch.stack([logit_difference(run.logits, data, e) for e, run in enumerate(own)]).detach()
        for name in ("zero", "mean", "mean-positional"):
            settings = {"ablation": name, "ablation_data": None if name == "zero" else other}
            gone = [[c.detach() for c in ablated(name, every, run.c)] for run in own]
            lowest = values(none, gone)
            for kept, result in zip(circuits, eap.evaluate(model, circuits, data, **settings)):
                close(result.values, values(kept, gone))
                close(result.clean_values, clean)
                close(result.corrupted_values, lowest)

            exact = eap.attribute(model, data, method="exact", heads=heads, edges=circuit_of(graph, edges), **settings)
            found = eap.attribute(model, data, heads=heads, steps=2, **settings).values
            right = torch.zeros(found.shape, dtype=torch.float64)
            for e, (x, y) in enumerate(embeddings):
                points = [(0.5, plain_run(decoder, torch.lerp(y, x, alpha))) for alpha in (0.5, 1)]
                delta = (torch.stack(gone[e]) - torch.stack(own[e].c)).detach()
                right += scores(delta, points, loss_of(data, e)) / len(data)
            assert relative(found[graph.edge_mask], right[graph.edge_mask]) < 1e-6
            scale = float(found.abs().max())
            for (u, v), kept in zip(edges, all_but_one):
                alone = float((clean - values(kept, gone)).mean())
                assert float(exact.values[u, v]) == pytest.approx(alone, abs=2e-6 * scale)


def close(found, right):
    torch.testing.assert_close(found, right, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("name", "heads"), [("zero", "kv"), ("mean", "query"), ("mean-positional", "kv")])
def test_all_edges_are_the_model_and_results_do_not_depend_on_batching(
    name, heads, kind, make_model, make_pairs, relative
):
    model, data = make_model(kind), make_pairs(seed=3)
    graph = bind(model).graph(heads)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    with StayDouble():
        # All edges kept is the model's plain run and takes no other way; one receiver less does.
        mask = graph.edge_mask.clone()
        mask[:, 0] = False
        circuits = [eap.Circuit(graph, graph.edge_mask), eap.Circuit(graph, mask), random_circuit(graph, 1, 0.5)]
        right = eap.evaluate(model, circuits, data, ablation=name)
        assert right[0].faithfulness == pytest.approx(1)
        assert right[0].values.tolist() == right[0].clean_values.tolist()
        scores = eap.attribute(model, data, heads=heads, ablation=name, steps=2)
        for size, reuse in ((1, True), (3, False)):
            found = eap.evaluate(model, circuits, data[order], ablation=name, batch_size=size, reuse_prefix=reuse)
            for one, two in zip(right, found):
                torch.testing.assert_close(one.values[order], two.values)
                torch.testing.assert_close(one.corrupted_values[order], two.corrupted_values)
            again = eap.attribute(
                model, data[order], heads=heads, ablation=name, steps=2, batch_size=size, reuse_prefix=reuse
            )
            assert relative(again.values, scores.values) < 1e-6


def test_means_are_of_the_clean_prompts_real_tokens_alone(make_model, make_pairs, relative):
    """What stands on the corrupted side or in the padding of the ablation data does not matter; the prompts do."""
    model, data, other = make_model("llama"), make_pairs(seed=3), make_pairs(seed=4)
    lengths = torch.tensor([11, 6, 9, 7, 8, 5, 10])
    first = eap.PairedDataset.from_tokens(other.clean, other.corrupted, lengths, other.answers)
    wide = torch.nn.functional.pad(other.clean, (0, 4), value=7)
    wide = torch.where(torch.arange(wide.shape[1]) < lengths[:, None], wide, 9)
    second = eap.PairedDataset.from_tokens(wide, wide.flip(0), lengths, other.answers)
    for name in ("mean", "mean-positional"):
        right = eap.attribute(model, data, steps=2, ablation=name, ablation_data=first)
        assert right.info["ablation"] == name
        again = eap.attribute(model, data, steps=2, ablation=name, ablation_data=second)
        assert relative(again.values, right.values) < 1e-6
        assert relative(eap.attribute(model, data, steps=2, ablation=name).values, right.values) > 1e-3
        own = eap.attribute(model, data, steps=2, ablation=name, ablation_data=data)
        assert relative(eap.attribute(model, data, steps=2, ablation=name).values, own.values) < 1e-6


@fast_by_kind
@pytest.mark.parametrize("heads", ["kv", "query"])
def test_prompts_ablated_to_their_own_contributions_stay_what_they_are(family, heads, make_model, make_pairs):
    """Of one prompt alone the mean at each position is what it gives there: no circuit differs from the model."""
    model, data = make_model(family), make_pairs(seed=5, n=1)
    graph = bind(model).graph(heads)
    with StayDouble():
        circuits = [eap.Circuit(graph, torch.zeros_like(graph.edge_mask)), random_circuit(graph, 1, 0.5)]
        for result in eap.evaluate(model, circuits, data, ablation="mean-positional"):
            torch.testing.assert_close(result.values, result.clean_values, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(result.corrupted_values, result.clean_values, atol=1e-9, rtol=1e-9)
        scores = eap.attribute(model, data, heads=heads, ablation="mean-positional", method="eap")
        right = eap.attribute(model, data, heads=heads, ablation="mean", method="eap")
    assert float(scores.values.abs().max()) < 1e-9 * float(right.values.abs().max())


def test_metrics_are_given_the_corrupted_runs_logits_whatever_the_ablation(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(seed=6, n=3)
    seen = []

    def metric(logits, batch):
        seen.append((batch.index, batch.corrupted_logits))
        return logits[:, 0]

    circuit = random_circuit(bind(model).graph("kv"), 1, 0.5)
    eap.evaluate(model, circuit, data, metric, ablation="zero")
    eap.attribute(model, data, metric, method="eap", ablation="zero")
    eap.attribute(model, data, metric, method="exact", edges=circuit, ablation="zero")
    for index, corrupted in seen:
        for e, logits in zip(index.tolist(), corrupted):
            with torch.no_grad():
                right = model(input_ids=prompts(data, e)[1][None]).logits[0, -1]
            torch.testing.assert_close(logits, right, atol=1e-5, rtol=1e-5)


def test_a_curve_and_a_checkpoint_know_their_ablation(tmp_path, make_model, make_pairs):
    model, data, other = make_model("llama"), make_pairs(seed=6), make_pairs(seed=7)
    other = eap.PairedDataset.from_tokens(other.clean, other.corrupted, torch.full((7,), 11), other.answers)
    scores = eap.attribute(model, data, method="eap")
    given = {"ablation": "mean-positional", "ablation_data": other}
    curve = eap.faithfulness_curve(model, scores, data, (0.1, 0.5), **given)
    for circuit, value in zip(curve.circuits, curve.faithfulness):
        assert eap.evaluate(model, circuit, data, **given).faithfulness == pytest.approx(value)
    assert curve.results[0].corrupted != eap.evaluate(model, curve.circuits[0], data).corrupted

    file, edges = tmp_path / "exact.safetensors", scores.select(5)
    exact = {"method": "exact", "edges": edges, "checkpoint": file}
    first = eap.attribute(model, data, **exact, **given)
    assert torch.equal(eap.attribute(model, data, **exact, **given).values, first.values)
    for change in ({"ablation": "zero"}, {"ablation": "mean-positional"}, {}):
        with pytest.raises(eap.InputError, match="a checkpoint of this model, data and request"):
            eap.attribute(model, data, **exact, **change)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ablation": "noise"}, "ablation: expected one of 'mean', 'mean-positional'"),
        ({"ablation_data": 0}, "ablation_data: expected none, except for .* found some for 'patching'"),
        ({"ablation": "zero", "ablation_data": 0}, "ablation_data: expected none, except for .* found some for 'zero'"),
        ({"ablation": "mean", "ablation_data": "prompts"}, "ablation_data: expected a PairedDataset, found str"),
        ({"ablation": "mean-positional", "ablation_data": 6}, "ablation_data: expected prompts of 11 .* at most 6"),
    ],
)
def test_bad_requests_are_one_sentence(given, words, make_model, make_pairs):
    model, data, other = make_model("gpt2"), make_pairs(seed=3), make_pairs(seed=4)
    data = eap.PairedDataset.from_tokens(data.clean, data.corrupted, torch.full((7,), 11), data.answers)
    if isinstance(given.get("ablation_data"), int):
        short = torch.full((7,), given["ablation_data"] or 11)
        other = eap.PairedDataset.from_tokens(other.clean, other.corrupted, short, other.answers)
        given = {**given, "ablation_data": other}
    graph = bind(model).graph("kv")
    with pytest.raises(eap.InputError, match=words) as error:
        eap.attribute(model, data, **given)
    assert "\n" not in str(error.value)
    with pytest.raises(eap.InputError, match=words):
        eap.evaluate(model, eap.Circuit.from_mask(graph, graph.edge_mask), data, **given)


def test_ablation_tokens_beyond_the_vocabulary_are_named(make_model, make_pairs):
    data = make_pairs()
    clean = data.clean.clone()
    clean[2, 1] = 1000
    bad = eap.PairedDataset.from_tokens(clean, data.corrupted, data.lengths, data.answers)
    with pytest.raises(eap.InputError, match=r"ablation_data.*clean of example 2.*59.*1000"):
        eap.attribute(make_model("gpt2"), data, ablation="mean", ablation_data=bad)
