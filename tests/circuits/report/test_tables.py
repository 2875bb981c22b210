"""The rows that the command line and the HTML report share."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eap_circuits import EdgeScores, Graph, InputError
from eap_circuits.report import load_curve, smallest_faithful
from eap_circuits.report.curves import jsonable
from eap_circuits.report.tables import (
    areas_line,
    curve_table,
    edge_table,
    number,
    percent,
    result_table,
    settings,
    versions,
)


@pytest.fixture
def scores() -> EdgeScores:
    graph = Graph((3, 3), (1, 1), 8)
    values = torch.randn(graph.n_senders, graph.n_receivers, generator=torch.Generator().manual_seed(0))
    return EdgeScores(graph, values * graph.edge_mask, {"method": "eap"})


def curve(faithfulness: tuple[float, ...], n_edges: tuple[int, ...], fractions: tuple[float, ...]) -> Any:
    numbers = {"fractions": fractions, "n_edges": n_edges, "faithfulness": faithfulness, "mean": faithfulness}
    return SimpleNamespace(**numbers, clean=1.0, corrupted=0.0, cpr=0.5, cmd=0.5, baselines={})


def test_edges_come_strongest_first_and_know_their_circuit(scores: EdgeScores) -> None:
    circuit = scores.select(n_edges=6, prune=False)
    records = edge_table(scores, circuit, 10).records()
    sizes = [abs(record["score"]) for record in records]
    assert sizes == sorted(sizes, reverse=True)
    assert [record["in_circuit"] for record in records] == [True] * 6 + [False] * 4
    for record in records:
        u, v = scores.graph.senders.index(record["sender"]), scores.graph.receivers.index(record["receiver"])
        assert record["score"] == float(scores.values[u, v])


def test_no_circuit_no_column(scores: EdgeScores) -> None:
    assert "in_circuit" not in edge_table(scores, None, 3).records()[0]


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 1e4])
def test_scores_of_any_scale_are_told_apart(scores: EdgeScores, scale: float) -> None:
    table = edge_table(EdgeScores(scores.graph, scores.values * scale), None, 3)
    for shown, (_, _, score) in zip((float(row[2]) for row in table.cells()), table.rows, strict=True):
        assert shown == pytest.approx(score, rel=1e-2)


def test_scores_of_zero_and_tables_without_rows(scores: EdgeScores) -> None:
    zero = EdgeScores(scores.graph, torch.zeros_like(scores.values))
    assert float(edge_table(zero, None, 1).cells()[0][2]) == 0
    assert edge_table(scores, None, 0).cells() == []


def test_curve_rows_and_the_marked_one(scores: EdgeScores) -> None:
    circuit = scores.select(n_edges=5, prune=False)
    measured = curve((0.25, math.nan), (5, 9), (0.1, 0.2))
    table = curve_table(measured, circuit)
    assert table.marked == 0
    assert table.rows == ((0.1, 5, 0.25, 0.25), (0.2, 9, measured.faithfulness[1], measured.mean[1]))
    assert table.cells()[1][2] == number(math.nan)
    assert table.records()[1]["faithfulness"] is None


def test_result_stands_between_model_and_corrupted(scores: EdgeScores) -> None:
    result = SimpleNamespace(mean=1.5, clean=2.0, corrupted=-1.0, faithfulness=2.5 / 3)
    table = result_table(result, scores.select(n_edges=4, prune=False))
    assert [(row[1], row[2]) for row in table.rows] == [(scores.graph.n_edges, 2.0), (4, 1.5), (0, -1.0)]


@pytest.mark.parametrize(
    ("faithfulness", "index"),
    [((0.1, 0.85, 0.9, 1.0), 1), ((0.9, 0.2, 0.9, 1.0), 0), ((0.1, 0.2, 0.3, 1.0), 2), ((math.nan,) * 4, 2)],
)
def test_smallest_faithful_circuit(faithfulness: tuple[float, ...], index: int) -> None:
    assert smallest_faithful(curve(faithfulness, (2, 5, 9, 20), (0.1, 0.2, 0.4, 1.0))) == index


def test_smallest_faithful_circuit_is_not_empty_where_another_is_there() -> None:
    assert smallest_faithful(curve((0.9, 0.1, 1.0), (0, 5, 20), (0.01, 0.2, 1.0))) == 1
    assert smallest_faithful(curve((1.0,), (20,), (1.0,))) == 0


def test_settings_are_flat_and_name_no_folder() -> None:
    pairs = settings({"zzz": [1, 2], "model": "/home/somebody/models/small", "selection": {"how": "top"}})
    assert pairs == [("model", "small"), ("selection", "how top"), ("zzz", "1, 2")]
    assert settings({"model": "org/name"}) == [("model", "org/name")]


def test_versions_are_those_that_scored_or_unknown() -> None:
    assert versions({"versions": {"torch": "9.9"}}) == [("torch", "9.9")]
    assert versions({}) == versions({"versions": "9.9"}) == []


def test_a_number_that_rounds_to_zero_has_no_sign() -> None:
    assert [number(x) for x in (-0.0004, -0.0, 0.0, -0.0006, 12.3456)] == ["0.000"] * 3 + ["-0.001", "12.346"]


def test_percent() -> None:
    assert [percent(x) for x in (0.001, 0.1234, 1.0, math.nan)] == [
        "0.1 %",
        "12.3 %",
        "100 %",
        number(math.nan),
    ]


def test_saved_curve(tmp_path: Any) -> None:
    content = {
        "fractions": [0.1, 1.0],
        "n_edges": [3, 30],
        "faithfulness": [None, 1.0],
        "mean": [0.5, 2.0],
        "clean": 2.0,
        "corrupted": 0.0,
        "cpr": None,
        "cmd": 0.2,
    }
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(content))
    loaded = load_curve(path)
    assert loaded.n_edges == (3, 30)
    assert math.isnan(loaded.faithfulness[0])
    assert [row[3] for row in curve_table(loaded).rows] == [0.5, 2.0]


def test_baselines_are_columns_and_are_read_back(tmp_path: Any) -> None:
    numbers = {"mean": [0.5, 2.0], "clean": 2.0, "corrupted": 0.0, "cpr": 0.7, "cmd": 0.2}
    random = {"faithfulness": [0.25, 1.0], "draws": [[0.0, 1.0], [0.5, 1.0]], "cpr": 0.125, "cmd": 0.875}
    content = {"fractions": [0.1, 1.0], "n_edges": [3, 30], "faithfulness": [0.4, 1.0], **numbers}
    path = tmp_path / "curve.json"
    path.write_text(json.dumps({**content, "baselines": {"random": random}}))
    loaded = load_curve(path)
    assert loaded.baselines["random"].draws == ((0.0, 1.0), (0.5, 1.0))
    assert [row["random"] for row in curve_table(loaded).records()] == [0.25, 1.0]
    assert areas_line(loaded) == "CPR 0.700, CMD 0.200; random circuits 0.125, 0.875."
    random["draws"] = [[0.0, 1.0], [0.5]]
    path.write_text(json.dumps({**content, "baselines": {"random": random}}))
    with pytest.raises(InputError, match="baseline 'random': expected 2 values"):
        load_curve(path)
    path.write_text(json.dumps({**content, "baselines": {"random": {}}}))
    with pytest.raises(InputError, match="a curve written by"):
        load_curve(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fractions": 3}', '{"fractions": ["a"]}', "\x00"])
def test_damaged_curve_is_refused_by_name(tmp_path: Any, text: str) -> None:
    path = tmp_path / "curve.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"curve\.json: expected"):
        load_curve(path)


def test_curve_of_unequal_lengths_and_missing_file_are_refused(tmp_path: Any) -> None:
    path = tmp_path / "curve.json"
    numbers = {"mean": [1], "clean": 1, "corrupted": 0, "cpr": 1, "cmd": 0}
    path.write_text(json.dumps({"fractions": [1.0], "n_edges": [1, 2], "faithfulness": [1.0], **numbers}))
    with pytest.raises(InputError, match="as many fractions"):
        load_curve(path)
    with pytest.raises(InputError, match="nothing there"):
        load_curve(tmp_path / "none.json")


def test_jsonable() -> None:
    value = {"a": (1, math.inf), 2: torch.tensor([0.5, math.nan])}
    assert jsonable(value) == {"a": [1, None], "2": [0.5, None]}
