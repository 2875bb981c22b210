"""The report: one well-formed page that needs nothing else and shows what it was given."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eap_circuits import Circuit, EdgeScores, Graph, InputError, edge_overlap, random_circuit
from eap_circuits.report import write_report
from eap_circuits.report.html import N_EDGES
from eap_circuits.report.tables import curve_table, edge_table

VOID = {"meta", "br", "img", "link", "hr", "input"}
EVIL = "<script>alert('x')</script> & \"quoted\" <q>"


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps the text and the attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def scores() -> EdgeScores:
    graph = Graph((3, 3), (1, 1), 8)
    values = torch.randn(graph.n_senders, graph.n_receivers, generator=torch.Generator().manual_seed(3))
    info = {
        "method": "eap-ig-inputs",
        "steps": 5,
        "model": EVIL,
        "data": "ioi",
        "metric": "logit_diff",
        "n_examples": 12,
    }
    return EdgeScores(graph, values * graph.edge_mask, info)


@pytest.fixture
def curve(scores: EdgeScores) -> Any:
    circuits = tuple(scores.select(n_edges=n) for n in (9, 20, 40))
    faithfulness = (0.123, 0.456, 0.789)
    return SimpleNamespace(
        fractions=(0.111, 0.222, 0.555),
        circuits=circuits,
        n_edges=tuple(circuit.n_edges for circuit in circuits),
        faithfulness=faithfulness,
        mean=tuple(f * 3 for f in faithfulness),
        clean=3.25,
        corrupted=-1.75,
        cpr=0.777,
        cmd=0.333,
        baselines={},
    )


def written(path: Path, *args: Any, **kwargs: Any) -> tuple[str, Page]:
    write_report(path, *args, **kwargs)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_page_shows_every_number_of_the_tables(tmp_path: Path, scores: EdgeScores, curve: Any, make_pairs: Any) -> None:
    circuit = curve.circuits[1]
    data = make_pairs(n=1)
    data = replace(data, prompts=(("the clean one", "the corrupted one"),))
    _, page = written(tmp_path / "r.html", scores, circuit, curve, data)
    for table in (edge_table(scores, circuit, N_EDGES), curve_table(curve, circuit)):
        for row in table.cells():
            for cell in row:
                assert cell in page.text
    for text in (
        "0.777",
        "0.333",
        "3.25",
        "-1.75",
        "0.456",
        "the clean one",
        "the corrupted one",
        "eap-ig-inputs",
    ):
        assert text in page.text
    assert page.tags.count("svg") == 2
    assert ("class", "marked") in page.attributes


def test_page_needs_nothing_from_elsewhere(tmp_path: Path, scores: EdgeScores, curve: Any) -> None:
    text, page = written(tmp_path / "r.html", scores, curve.circuits[0], curve)
    assert {"link", "iframe", "img", "object"}.isdisjoint(page.tags)
    assert page.tags.count("script") == 2  # the data, and what reads it
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value.startswith("#"), (name, value)
        if name == "id":
            assert [v for n, v in page.attributes if n == "id"].count(value) == 1
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)'\"]*)", text))


def test_texts_are_escaped(tmp_path: Path, scores: EdgeScores, make_pairs: Any) -> None:
    data = replace(make_pairs(n=1), prompts=((EVIL, EVIL),))
    files = {"scores": EVIL}
    text, page = written(tmp_path / "r.html", scores, scores.select(n_edges=20), None, data, title=EVIL, files=files)
    assert "<script>alert" not in text
    assert page.tags.count("script") == 2
    assert "q" not in page.tags
    assert page.text.count(EVIL) >= 4
    assert "<q>" in html.unescape(text)


def test_page_without_curve_and_prompts(tmp_path: Path, scores: EdgeScores) -> None:
    _, page = written(tmp_path / "r.html", scores, scores.select(n_edges=20))
    assert page.tags.count("svg") == 1
    assert "Example prompts" not in page.text
    assert "CPR" not in page.text


def test_scores_without_info_and_an_empty_circuit(tmp_path: Path, scores: EdgeScores) -> None:
    empty = Circuit.from_mask(scores.graph, torch.zeros_like(scores.graph.edge_mask))
    _, page = written(tmp_path / "r.html", EdgeScores(scores.graph, scores.values), empty)
    assert "Circuit" in page.text


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    "how", [{"how": "greedy", "signed": True}, {"how": "optimal", "signed": True}, {"positive_ratio": 0.5}]
)
def test_lines_that_get_the_circuit_back_run(
    tmp_path: Path, scores: EdgeScores, saved: bool, how: dict[str, Any]
) -> None:
    if how.get("how") == "optimal":
        pytest.importorskip("scipy")
    circuit = scores.select(n_edges=30, **how)
    names = {"scores": str(tmp_path / "s.safetensors"), "circuit": str(tmp_path / "c.json")}
    scores.save(names["scores"])
    circuit.save(names["circuit"])
    if not saved:
        del names["circuit"]
    _, page = written(tmp_path / "r.html", scores, circuit, files=names)
    code = page.text[page.text.index("import eap_circuits") : page.text.index("The versions")]
    space: dict[str, Any] = {}
    exec(code, space)
    assert torch.equal(space["scores"].values, scores.values)
    assert space["circuit"] == circuit


def test_no_lines_choose_again_among_edges_that_no_file_holds(tmp_path: Path, scores: EdgeScores) -> None:
    sure, files = scores.values > 0.5, {"scores": "s.safetensors"}
    for circuit in (scores.select(n_edges=9, among=sure), random_circuit(scores.graph, 9)):
        text, _ = written(tmp_path / "r.html", scores, circuit, files=files)
        assert "EdgeScores.load" in text
        assert "scores.select(" not in text


def test_wrong_circuit_and_unwritable_path_are_refused(tmp_path: Path, scores: EdgeScores) -> None:
    other = Graph((2,), (2,), 4)
    with pytest.raises(InputError, match="circuit: expected"):
        write_report(tmp_path / "r.html", scores, Circuit.from_mask(other, other.edge_mask))
    with pytest.raises(InputError, match="folder"):
        write_report(tmp_path / "none" / "r.html", scores, scores.select(n_edges=20))
    assert list(tmp_path.iterdir()) == []


def test_two_circuits_have_their_faithfulness_on_both_tasks(tmp_path: Path, scores: EdgeScores) -> None:
    other = EdgeScores(scores.graph, -scores.values.flip(0) * scores.graph.edge_mask, {**scores.info, "data": "<b> &"})
    circuit = scores.select(20, exactly=True)
    second = other.select(20, exactly=True)
    found: Any = SimpleNamespace(edges=edge_overlap(circuit, second), faithfulness=[[0.911, 0.122], [0.233, 0.844]])
    _, page = written(tmp_path / "r.html", scores, circuit, against=other, comparison=found)
    text = "".join(page.text.split())
    assert "circuitonioi'spromptson<b>&'spromptsioi0.9110.122<b>&0.2330.844" in text
    wrong: Any = SimpleNamespace(edges=edge_overlap(second, second), faithfulness=found.faithfulness)
    for given in ({"against": other, "comparison": wrong}, {"comparison": found}):
        with pytest.raises(InputError, match="comparison: expected"):
            written(tmp_path / "r.html", scores, circuit, **given)


def test_a_learned_rank_is_not_called_a_fall_of_the_metric(scores: EdgeScores, tmp_path: Path) -> None:
    for method, said in (("eap", "expected to fall"), ("learned", "its rank among all edges")):
        each = EdgeScores(scores.graph, scores.values, {**scores.info, "method": method})
        write_report(tmp_path / "page.html", each, each.select(10))
        text = " ".join(Page((tmp_path / "page.html").read_text()).text.split())
        assert (said in text) and ("expected to fall" in text) == (method == "eap")
