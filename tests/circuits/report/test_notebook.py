"""What results show of themselves, and what other libraries get of them."""

from __future__ import annotations

import base64
import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import networkx
import numpy as np
import pytest
import torch

import eap_circuits as eap
from eap_circuits.edges import Spans
from eap_circuits.report import inline
from tests.circuits.report.test_figures import GRAPHS, circuit_of
from tests.circuits.report.test_html import Page

HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def results(make_model, make_pairs) -> dict[str, Any]:
    model, data = make_model("llama"), make_pairs(n=12)
    texts = tuple((f"{HOSTILE} {i}", "corrupted") for i in range(12))
    scores = eap.attribute(model, data, method="eap", keep="variance")
    one, other = scores.select(n_edges=40), scores.select(n_edges=60)
    return {
        "scores": scores,
        "nodes": scores.node_scores(),
        "circuit": one,
        "curve": eap.faithfulness_curve(model, scores, data, (0.1, 0.5, 1.0), baselines=["random"]),
        "result": eap.evaluate(model, one, data),
        "comparison": eap.compare(model, one, other, data, data),
        "data": replace(data, prompts=texts),
        "ids": data,
    }


class Tags(HTMLParser):
    """Checks that what is opened is closed, and collects the cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.cells: list[str] = []
        self.frames: list[dict[str, str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "img":
            self.open.append(tag)
        if tag == "iframe":
            self.frames.append(dict(attrs))
        self.seen.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def parts_of(page: str) -> tuple[list[str], Tags]:
    """The pictures of a result's page, and what else it holds."""
    outside = re.sub(r"srcdoc='[^']*'", "srcdoc=''", page)
    pictures = re.findall(r"<svg.*?</svg>|<img .*?>", outside, flags=re.DOTALL)
    tags = Tags()
    tags.feed(re.sub(r"<svg.*?</svg>", "", outside, flags=re.DOTALL))
    assert not tags.open and "script" not in tags.seen
    return pictures, tags


def explored(page: str) -> dict[str, Any]:
    """What the page's explorer shows."""
    tags = Tags()
    tags.feed(page)
    (frame,) = tags.frames
    assert frame["sandbox"].split() == ["allow-scripts", "allow-downloads"]  # not its embedder's origin
    assert any("default-src 'none'" in value for _, value in Page(frame["srcdoc"]).attributes)
    return json.loads(re.search(r'id="explorer-data">(.*?)</script>', frame["srcdoc"])[1])


KINDS = ["scores", "nodes", "circuit", "curve", "result", "comparison", "data", "ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_results_show_themselves(kind, results):
    page = results[kind]._repr_html_()
    pictures, tags = parts_of(page)
    assert len(pictures) == (kind in ("scores", "nodes", "circuit", "curve", "comparison"))
    for picture in pictures:
        ElementTree.fromstring(picture if picture.startswith("<svg") else f"{picture[:-1]}/>")
    assert len(tags.frames) == (kind in ("scores", "circuit"))
    if kind == "data":
        assert f"{HOSTILE} 0" in tags.cells and "… and 2 more" in page
    if kind == "result":
        assert f"{results[kind].clean:.3f}" in tags.cells
    if kind == "comparison":
        for result in (result for row in results[kind].results for result in row):
            low, high = result.interval
            assert f"{result.faithfulness:.3f} ({low:.3f} to {high:.3f})" in tags.cells
    if kind == "scores":
        sender, receiver, score = results[kind].top_edges(1)[0]
        assert tags.cells[3:5] == [sender, receiver] and float(tags.cells[5]) == pytest.approx(score, rel=1e-2)


def test_the_explorer_of_an_output_is_small_and_holds_the_circuit_and_the_strongest_edges(monkeypatch):
    graph = eap.Graph((8,) * 9, (8,) * 9, 8)
    values = torch.randn(graph.n_senders, graph.n_receivers, generator=torch.Generator().manual_seed(0))
    scores = eap.EdgeScores(graph, values * graph.edge_mask, per_example=values.repeat(64, 1, 1))
    circuit = eap.Circuit(graph, graph.edge_mask & (values.abs() < 0.02), scores.values)
    assert graph.n_edges > inline.EDGES > circuit.n_edges > 0
    for result, wanted in (
        (scores, {(u, v) for u, v, _ in scores.top_edges(inline.EDGES)}),
        (circuit, set(circuit.edges) | {(u, v) for u, v, _ in scores.top_edges(inline.EDGES - circuit.n_edges)}),
    ):
        page = result._repr_html_()
        content = explored(page)
        u, v = (np.frombuffer(base64.b64decode(content["edges"][end]["data"]), "<u2") for end in "uv")
        assert {(graph.senders[a], graph.receivers[b]) for a, b in zip(u, v)} == wanted
        assert content["total"] == graph.n_edges and content["profiles"] == []
        assert f"the strongest 2,000 of {graph.n_edges:,} edges" in page
    monkeypatch.setattr(inline, "NAMES", graph.n_senders + graph.n_receivers - 1)
    for result in (scores, circuit):
        pictures, tags = parts_of(result._repr_html_())
        assert pictures[0].startswith("<svg") and not tags.frames


def test_an_output_of_the_largest_model_takes_less_than_a_megabyte():
    graph = eap.Graph((64,) * 30, (64,) * 30, 8)
    assert graph.n_senders + graph.n_receivers > 0.95 * inline.NAMES
    values = torch.ones(graph.n_senders, graph.n_receivers) * graph.edge_mask
    assert len(eap.EdgeScores(graph, values)._repr_html_()) < 1_000_000


def test_where_there_is_nothing_to_explore_a_picture_is_shown(results):
    circuit = results["circuit"]
    pictures, tags = parts_of(eap.Circuit(circuit.graph, circuit.mask)._repr_html_())
    assert pictures[0].startswith("<svg") and not tags.frames
    empty = eap.Circuit(circuit.graph, torch.zeros_like(circuit.mask), circuit.values)
    assert explored(empty._repr_html_())["circuits"][0]["n_edges"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_results_of_the_same_numbers_are_equal(kind, results):
    one = results[kind]
    assert one == copy.deepcopy(one) and one != 1
    if kind in ("scores", "nodes"):
        assert one == replace(one, info={}) and one != replace(one, values=one.values + 1)
    if kind == "ids":
        assert one == replace(one) and one != one[:3] and one != replace(one, name="other")


def test_frames_hold_the_numbers(results):
    scores, circuit, curve = results["scores"], results["circuit"], results["curve"]
    frame = scores.to_pandas()
    assert len(frame) == scores.graph.n_edges and list(frame) == ["sender", "receiver", "score", "standard_error"]
    at = {(u, v): i for i, (u, v) in enumerate(zip(frame["sender"], frame["receiver"], strict=True))}
    for sender, receiver, score in scores.top_edges(5):
        assert frame["score"][at[sender, receiver]] == score
    total = float(scores.variance[scores.graph.edge_mask].double().sum()) / 12
    assert (frame["standard_error"] ** 2).sum() == pytest.approx(total, rel=1e-5)
    kept = circuit.to_pandas()
    assert list(zip(kept["sender"], kept["receiver"], strict=True)) == circuit.edges
    assert list(curve.to_pandas()) == ["fraction", "n_edges", "faithfulness", "mean", "random"]
    assert tuple(curve.to_pandas()["faithfulness"]) == curve.faithfulness
    assert results["nodes"].to_pandas()["score"].tolist() == results["nodes"].values.tolist()
    assert results["result"].to_pandas().mean()["circuit"] == pytest.approx(results["result"].mean)
    crossed = results["comparison"].to_pandas()
    assert crossed[["circuit", "task"]].values.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert crossed["faithfulness"][1] == results["comparison"].faithfulness[0][1]
    assert tuple(crossed.loc[2, ["low", "high"]]) == results["comparison"].results[1][0].interval
    pairs, ids = results["data"].to_pandas(), results["ids"].to_pandas()
    assert tuple(zip(pairs["clean"], pairs["corrupted"], strict=True)) == results["data"].prompts
    data = results["ids"]
    assert [len(tokens) for tokens in ids["clean"]] == ids["tokens"].tolist() == data.lengths.tolist()
    assert ids[["good", "bad"]].to_numpy().tolist() == data.answers.tolist()


def test_sets_of_answers_have_no_padding(make_pairs):
    data = make_pairs(n=2)
    sets = torch.tensor([[[1, 2], [3, -1]], [[4, -1], [5, 6]]])
    frame = replace(data, answers=sets, variants=None).to_pandas()
    assert frame["good"].tolist() == [[1, 2], [4]] and frame["bad"].tolist() == [[3], [5, 6]]


def reachable(circuit: eap.Circuit) -> bool:
    """Is there a path from input to logits? By the definition of pruning: an edge is left only on such a path."""
    return circuit.pruned().n_edges > 0


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("n", [1, 5, 12, 40])
def test_paths_of_a_networkx_graph_lead_through_heads(name, n):
    circuit = circuit_of(GRAPHS[name], n, prune=False)
    graph = circuit.to_networkx()
    whole = graph.has_node("input") and graph.has_node("logits")
    assert (whole and networkx.has_path(graph, "input", "logits")) == reachable(circuit)
    assert set(graph.nodes) - {"logits"} == set(circuit.nodes) - ({"input"} - set(graph.nodes))
    edges = {
        (sender, receiver): circuit.values[circuit.graph.senders.index(sender), circuit.graph.receivers.index(receiver)]
        for sender, receiver in circuit.edges
    }
    for (sender, receiver), score in edges.items():
        node, _, letter = receiver.rstrip(">").partition("<")
        kind = letter or ("logits" if node == "logits" else "mlp")
        found = graph.get_edge_data(sender, node, kind)
        # A key or value of a group bears the number of the group, and enters all of its heads.
        assert found is not None or letter in ("k", "v")
        if found is not None and letter not in ("k", "v"):
            assert found["score"] == float(score)


@pytest.mark.parametrize("kind", ["graphml", "gml", "gexf"])
def test_other_programs_files_hold_the_networkx_graph(kind, results, tmp_path):
    path, graph = tmp_path / f"circuit.{kind}", results["circuit"].to_networkx()
    assert {"method", "versions", "selection"} <= graph.graph.keys()
    getattr(networkx, f"write_{kind}")(graph, path)
    found = getattr(networkx, f"read_{kind}")(path)
    scores = sorted((u, v, score) for u, v, score in graph.edges(data="score"))
    assert sorted((u, v, score) for u, v, score in found.edges(data="score")) == scores


def test_a_shared_key_enters_each_head_of_its_group():
    graph = GRAPHS["kv"]
    mask = torch.zeros_like(graph.edge_mask)
    mask[0, graph.receivers.index("a1.h1<k>")] = True
    found = eap.Circuit(graph, mask).to_networkx()
    assert sorted(found.edges(keys=True)) == [("input", "a1.h2", "k"), ("input", "a1.h3", "k")]


def test_dot(results):
    text = results["circuit"].to_dot()
    assert text.startswith("digraph circuit {") and text.endswith("}\n") and text.count("{") == 1
    found = re.findall(r'^  "([^"]+)" -> "([^"]+)" \[label="([^"]+)", weight=\S+, tooltip="([^"]+)"\];$', text, re.M)
    graph = results["circuit"].to_networkx()
    assert sorted(edge[:3] for edge in found) == sorted(graph.edges(keys=True))
    for sender, node, kind, score in found:
        assert float(score) == pytest.approx(graph.get_edge_data(sender, node, kind)["score"], rel=1e-5)


def test_dot_of_spans_with_odd_names():
    spans = Spans(('a"b', "c\\", "rest"), ((True,) * 3,) * 3, (True,) * 3)
    graph = GRAPHS["kv"].with_spans(spans)
    text = eap.Circuit(graph, graph.edge_mask).to_dot()
    unquoted = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    assert '"' not in unquoted and r"input@a\"b" in text and r"input@c\\" in text


def test_a_missing_library_is_named(monkeypatch, results):
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(eap.InputError, match=r"to_pandas\(\): expected pandas \(pip install pandas\), found none"):
        results["scores"].to_pandas()
    for each in results.values():  # to show them takes no more than the package itself
        assert each._repr_html_().startswith("<div>")


def test_figures_show_themselves(results):
    for figure in (
        results["scores"].plot(),
        results["scores"].heatmap(),
        results["nodes"].plot(),
        results["circuit"].plot(),
        results["curve"].plot(),
    ):
        ElementTree.fromstring(figure._repr_html_())


@pytest.mark.parametrize("name", GRAPHS)
def test_a_heatmap_has_every_node(name):
    graph = GRAPHS[name]
    values = torch.arange(1.0, graph.n_senders + 1)
    (image,) = eap.NodeScores(graph, values).plot().axes[0].images
    shown = image.get_array().compressed() if hasattr(image.get_array(), "compressed") else image.get_array()
    assert sorted(x for x in shown.flatten().tolist() if x == x) == values[1:].tolist()
    assert "input: +1" in eap.NodeScores(graph, values).plot().axes[0].get_title("left")
