"""Faithfulness cards: every number against evaluations made one by one, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from html import escape

import pytest
import torch

import eap_circuits as eap
from eap_circuits.cards import RESAMPLED, card
from eap_circuits.evaluation import EvaluationResult
from eap_circuits.report import write_report
from eap_circuits.report.curves import jsonable
from eap_circuits.report.tables import card_line, card_table, cost_table


@pytest.fixture
def model(make_model):
    return make_model("gpt2")


@pytest.fixture
def scored(make_pairs):
    return make_pairs(seed=3, n=5)


@pytest.fixture
def data(make_pairs):
    return make_pairs(seed=4, n=5)


@pytest.fixture
def scores(model, scored):
    return eap.attribute(model, scored, method="eap", keep="examples")


def test_its_numbers_are_those_of_evaluations_one_by_one(model, scored, data, scores):
    circuit = scores.select(20, how="greedy")
    given = {"resamples": 3, "seeds": (5, 7), "most_edges": 6}
    card = eap.faithfulness_card(model, circuit, data, scores, others={"scored": scored}, **given)

    def alone(one, pairs=data):
        return pytest.approx(eap.evaluate(model, one, pairs).faithfulness, abs=1e-9)

    assert card.faithfulness == alone(circuit) and card.others["scored"].faithfulness == alone(circuit, scored)
    assert set(card.beside) == {RESAMPLED, "random", "complement"}
    assert [draw for (draw,) in card.beside["random"].draws] == [
        alone(eap.random_circuit(circuit.graph, circuit.n_edges, seed=seed)) for seed in (5, 7)
    ]
    assert card.beside["complement"].faithfulness == (alone(circuit.complement()),)
    # A resample's circuit is chosen as the circuit was.
    picked = torch.randint(5, (5,), generator=torch.Generator().manual_seed(0))
    again = replace(scores, values=scores.per_example[picked].mean(0)).select(20, how="greedy")
    assert card.beside[RESAMPLED].circuits[0][0] == again
    assert card.beside[RESAMPLED].draws[0][0] == alone(again)
    assert card.shared[0] == pytest.approx(
        int((again.mask & circuit.mask).sum()) / int((again.mask | circuit.mask).sum())
    )
    assert len(card.cost) == 6 and list(card.cost.values()) == sorted(card.cost.values())
    for name, cost in card.cost.items():
        sender, receiver = name.split("->")
        mask = circuit.mask.clone()
        mask[circuit.graph.senders.index(sender), circuit.graph.receivers.index(receiver)] = False
        assert cost == pytest.approx(
            card.faithfulness - eap.evaluate(model, eap.Circuit(circuit.graph, mask), data).faithfulness
        )
    # Model, ablated run, circuit, 3 resamples, 2 random, 1 complement, 6 without an edge; 3 runs of 5 others.
    assert card.forwards == 5 * (2 + 13) + 5 * 3
    told = json.loads(json.dumps(jsonable(card.to_dict())))
    assert told["faithfulness"] == card.faithfulness and told["cost"] == card.cost
    assert told["interval"] == list(card.result.interval) and told["info"]["circuit"]["method"] == "eap"


def test_all_edges_are_left_out_where_there_are_few(model, data):
    circuit = eap.random_circuit(eap.attribute(model, data, method="eap").graph, 9)
    card = eap.faithfulness_card(model, circuit, data, seeds=(0,))
    names = {f"{sender}->{receiver}" for sender, receiver in circuit.edges}
    assert set(card.cost) == names and RESAMPLED not in card.beside and card.shared == ()
    assert "share" not in card_line(card) and "Of 9 edges" in card_line(card)


def test_circuits_of_nodes_are_chosen_again_by_nodes(model, data, scores):
    circuit = scores.node_scores().select(3)
    card = eap.faithfulness_card(model, circuit, data, scores, resamples=2, most_edges=0)
    picked = torch.randint(5, (5,), generator=torch.Generator().manual_seed(0))
    again = replace(scores, values=scores.per_example[picked].mean(0)).node_scores().select(3)
    assert card.beside[RESAMPLED].circuits[0][0] == again


def test_an_interval_holds_what_resamples_of_the_pairs_give():
    """Against the standard error of a mean: with the model at 1 and the ablated run at 0 everywhere."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)).double()
    result = EvaluationResult(values, torch.ones(400).double(), torch.zeros(400).double())
    low, high = result.interval
    error = float(values.std()) / 20
    assert low == pytest.approx(result.mean - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(result.mean + 1.96 * error, abs=0.3 * error)
    undefined = EvaluationResult(values, torch.ones(400).double(), torch.ones(400).double())
    assert all(end != end for end in undefined.interval)


def test_tables_show_it_in_notebooks_and_reports(model, scored, data, scores, tmp_path):
    circuit = scores.select(20)
    card = eap.faithfulness_card(model, circuit, data, scores, others={"<evil>": scored}, resamples=2, most_edges=3)
    table = card_table(card)
    assert [row[0] for row in table.rows] == [
        "the circuit", "on <evil>", "chosen by resampled pairs", "random circuits", "all other edges"
    ]  # fmt: skip
    assert [row[1] for row in table.rows[-2:]] == [circuit.n_edges, circuit.graph.n_edges - circuit.n_edges]
    write_report(tmp_path / "report.html", scores, circuit, card=card)
    pages = [card._repr_html_(), (tmp_path / "report.html").read_text(encoding="utf-8")]
    for cell in [cell for each in (table, cost_table(card)) for row in each.cells() for cell in row]:
        assert all(escape(cell) in page for page in pages)
    assert all("<evil>" not in page and card_line(card) in page for page in pages)


def test_prompts_that_chose_the_circuit_are_told_from_others(model, scored, scores):
    with pytest.warns(UserWarning, match="was chosen by the prompts it is measured on") as seen:
        eap.faithfulness_card(model, scores.select(10), scored, most_edges=0)
    assert seen[0].filename == __file__  # the line that called, not one of ours


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"circuit": "scores"}, "circuit: expected a Circuit, such as"),
        ({"scores": "plain"}, r"scores: expected those of attribute\(keep=\"examples\"\), found none of single"),
        ({"scores": "other graph"}, "scores: expected those of Graph"),
        (
            {"circuit": "complement", "scores": "scores"},
            "scores: expected those that chose the circuit, found some that choose another",
        ),
        (
            {"circuit": "sure", "scores": "scores"},
            "circuit: expected one that resampled scores can choose again, found one chosen among edges whose sign",
        ),
        ({"others": "data"}, "others: expected prompts by name, found PairedDataset"),
        ({"others": {"a": 1}}, r"others\['a'\]: expected a PairedDataset, found int"),
        ({"seeds": ()}, "seeds: expected at least one, found none"),
        ({"resamples": 0}, "resamples: expected"),
        ({"most_edges": -1}, "most_edges: expected"),
    ],
)
def test_what_cannot_be_is_refused(given, words, model, data, scores):
    found = {"scores": scores, "plain": replace(scores, per_example=None), "data": data}
    found["complement"] = scores.select(10).complement()
    found["sure"] = scores.select(10, among=scores.confidence() >= 0.5)
    other = eap.Graph((3,), (3,), 8)
    found["other graph"] = eap.EdgeScores(other, torch.zeros(other.edge_mask.shape))
    named = {name: found[value] if isinstance(value, str) else value for name, value in given.items()}
    asked = {"circuit": scores.select(10), "data": data, **named}
    with pytest.raises(eap.InputError, match=words):
        eap.faithfulness_card(model, **asked)


def test_what_is_wrong_with_other_prompts_is_said_before_anything_runs(model, data, scores, monkeypatch):
    monkeypatch.setattr(card, "evaluate", lambda *_, **__: pytest.fail("it ran"))
    beyond = replace(data, answers=data.answers + 1000)
    with pytest.raises(eap.InputError, match="answers of example 0: expected token ids below"):
        eap.faithfulness_card(model, scores.select(10), data, others={"beyond": beyond})
