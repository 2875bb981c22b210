"""Figures: what is drawn, and that nothing of matplotlib's is left changed."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

from eap_circuits import Circuit, Comparison, EdgeScores, EvaluationResult, Graph, edge_overlap, node_overlap
from eap_circuits.report import draw_circuit, draw_curve
from eap_circuits.report.figures import draw_comparison
from eap_circuits.report.figures.placement import HEIGHT, place
from eap_circuits.report.figures.svg import to_svg

GRAPHS = {
    "kv": Graph((4, 4, 4), (2, 2, 2), 8),
    "query": Graph((4, 4, 4), (2, 2, 2), 8, heads="query"),
    "parallel": Graph((2, 2), (2, 2), 8, parallel=True),
    "one-layer": Graph((1,), (1,), 4),
    "per-layer": Graph(
        *((2, 0, 2, 0), (1, 0, 1, 0), 8),
        reads=(None, None, (("q", 2),), None),
        keys=(0, 1, 0, 3),
        per_layer=(False, True) * 2,
    ),
    "beside": Graph((2, 1, 2, 0), (1, 1, 1, 0), 8, mlps=(False, True) * 2, beside=(False, True, False, False)),
}


def circuit_of(graph: Graph, n: int, prune: bool = True) -> Circuit:
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(graph.n_senders, graph.n_receivers, generator=generator) * graph.edge_mask
    return EdgeScores(graph, values).select(n_edges=min(n, graph.n_edges), prune=prune)


def edge_patches(figure: Figure) -> dict[str, Any]:
    patches = [p for p in figure.axes[0].patches if isinstance(p, PathPatch) and str(p.get_gid()).startswith("edge ")]
    return {str(patch.get_gid()).removeprefix("edge "): patch for patch in patches}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.fixture
def curve() -> Any:
    return SimpleNamespace(
        fractions=(0.01, 0.1, 1.0),
        n_edges=(10, 100, 1000),
        faithfulness=(0.2, 0.7, 1.0),
        cpr=0.81,
        cmd=0.19,
        baselines={},
    )


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("n", [3, 25, 10_000])
@pytest.mark.parametrize("prune", [True, False])
def test_every_edge_and_node_of_the_circuit_is_drawn(name: str, n: int, prune: bool) -> None:
    circuit = circuit_of(GRAPHS[name], n, prune)
    figure = draw_circuit(circuit, max_edges=10_000)
    drawn = edge_patches(figure)
    assert len(drawn) == circuit.n_edges
    assert {tuple(name.split("  ")[0].split(" → ")) for name in drawn} == set(circuit.edges)
    senders = {sender for sender, _ in circuit.edges}
    assert senders <= {"input", *texts(figure)}


def test_only_nodes_of_the_circuit_are_drawn() -> None:
    circuit = circuit_of(GRAPHS["kv"], 20)
    names = set(GRAPHS["kv"].senders) & set(texts(draw_circuit(circuit)))
    assert {sender for sender, _ in circuit.edges} <= names <= {*circuit.nodes, "input"}


def test_sign_and_size_are_seen() -> None:
    graph = GRAPHS["kv"]
    u = graph.senders.index("m0")
    values = torch.zeros(graph.n_senders, graph.n_receivers)
    values[u, -1], values[0, graph.receivers.index("m0")] = -0.2, 2.0
    patches = edge_patches(draw_circuit(EdgeScores(graph, values).select(n_edges=2)))
    strong, weak = patches["input → m0  +2"], patches["m0 → logits  -0.2"]
    assert strong.get_edgecolor()[:3] != weak.get_edgecolor()[:3]
    assert strong.get_linewidth() > weak.get_linewidth()
    assert strong.get_alpha() > weak.get_alpha()


def test_of_many_edges_the_strongest_are_drawn_and_the_caption_says_so() -> None:
    circuit = circuit_of(GRAPHS["kv"], 60, prune=False)
    figure = draw_circuit(circuit, max_edges=7)
    drawn = {float(name.split("  ")[1]) for name in edge_patches(figure)}
    strongest = circuit.values[circuit.mask].abs().topk(7).values.min()  # type: ignore[index]
    assert len(drawn) == 7
    assert min(map(abs, drawn)) >= float(strongest) * 0.999
    assert any("7 strongest edges" in text for text in texts(figure))
    assert not any("strongest" in text for text in texts(draw_circuit(circuit)))


def test_a_circuit_without_scores_and_one_without_edges() -> None:
    graph = GRAPHS["kv"]
    circuit = Circuit.from_mask(graph, circuit_of(graph, 12).mask)
    assert len(edge_patches(draw_circuit(circuit))) == circuit.n_edges
    empty = draw_circuit(Circuit.from_mask(graph, torch.zeros_like(graph.edge_mask)))
    assert edge_patches(empty) == {}
    assert {"input", "logits"} <= set(texts(empty))


@pytest.mark.parametrize("name", GRAPHS)
def test_edges_rise_from_their_sender_to_their_receiver(name: str) -> None:
    placement = place(circuit_of(GRAPHS[name], 40), 1000)
    boxes = {box.name: box for box in placement.boxes}
    bottom, top = placement.bars
    for line in placement.lines:
        (x, y), (_, end) = line.points[0], line.points[-1]
        assert end > y
        assert (
            y == bottom
            if line.sender == "input"
            else (x, y)
            == (
                boxes[line.sender].x,
                boxes[line.sender].y + HEIGHT / 2,
            )
        )
        assert (end == top) == (line.receiver == "logits")
        assert line.letter == (line.receiver[-2] if line.receiver.endswith(">") else "")
        if line.receiver in boxes:
            assert line.points[-1] == (boxes[line.receiver].x, boxes[line.receiver].y - HEIGHT / 2)


def test_nodes_stand_apart_in_the_order_of_the_model() -> None:
    graph = GRAPHS["kv"]
    placement = place(Circuit.from_mask(graph, graph.edge_mask), 10_000)
    where = {box.name: (box.x, box.y) for box in placement.boxes}
    assert set(where) == set(graph.senders) - {"input"}
    assert len(set(where.values())) == len(where)
    assert where["a0.h0"][0] < where["a0.h1"][0] < where["m0"][0]
    assert where["a0.h0"][1] == where["a0.h3"][1] < where["m0"][1] < where["a1.h0"][1]
    assert len(placement.groups) == 2 * graph.n_layers  # two key/value heads a layer, each shared by two heads


def test_svg_is_one_element_with_the_names_as_text() -> None:
    circuit = circuit_of(GRAPHS["kv"], 30)
    svg = to_svg(draw_circuit(circuit), "a <label> & more")
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "a <label> & more"
    found = "".join(root.itertext())
    drawn = {text.strip() for text in found.splitlines()}
    for sender, receiver in circuit.edges:
        assert f"{sender} → {receiver}" in found
        assert sender in drawn


def test_curve_points_and_levels(curve: Any) -> None:
    figure = draw_curve(curve)
    ax = figure.axes[0]
    (line,) = [line for line in ax.lines if line.get_gid() == "curve"]
    assert list(line.get_xdata()) == [10, 100, 1000]
    assert list(line.get_ydata()) == [0.2, 0.7, 1.0]
    assert {tuple(line.get_ydata()) for line in ax.lines} >= {(1.0, 1.0), (0.0, 0.0)}
    assert ax.get_xscale() == "log"
    assert "CPR 0.810" in ax.get_xlabel()
    assert "CMD 0.190" in ax.get_xlabel()


def test_baselines_are_drawn_at_the_curves_sizes(curve: Any) -> None:
    curve.n_edges, curve.faithfulness = (100, 10, 1000), (0.7, 0.2, 1.0)  # pruning can leave fewer of more
    curve.baselines = {
        "random": SimpleNamespace(faithfulness=(0.2, 0.1, 1.0), draws=((0.1, 0.1, 1.0), (0.3, 0.1, 1.0))),
        "complement": SimpleNamespace(faithfulness=(0.4, 0.9, 0.0), draws=((0.4, 0.9, 0.0),)),
    }
    ax = draw_curve(curve).axes[0]
    lines = {line.get_gid(): line for line in ax.lines}
    for name, values in (("curve", [0.2, 0.7, 1.0]), ("random", [0.1, 0.2, 1.0]), ("complement", [0.9, 0.4, 0.0])):
        assert list(lines[name].get_xdata()) == [10, 100, 1000]
        assert list(lines[name].get_ydata()) == values
    (band,) = ax.collections
    corners = {tuple(point) for point in band.get_paths()[0].vertices.tolist()}
    assert {(100, 0.1), (100, 0.3)} <= corners
    shown = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(shown) == ["all other edges", "circuit", "random circuits"]


def test_curve_with_an_empty_circuit_and_without_numbers(curve: Any) -> None:
    curve.n_edges, curve.faithfulness = (0, 100, 1000), (float("nan"), 0.5, 1.0)
    assert "100" in to_svg(draw_curve(curve), "curve")


def test_curve_on_axes_given(curve: Any) -> None:
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert draw_curve(curve, right) is figure
    assert not left.lines
    assert right.lines


def test_matplotlib_is_as_it_was(curve: Any) -> None:
    before = dict(matplotlib.rcParams)
    to_svg(draw_curve(curve), "curve")
    to_svg(draw_circuit(circuit_of(GRAPHS["kv"], 9)), "circuit")
    assert dict(matplotlib.rcParams) == before


def test_two_circuits_compared() -> None:
    """Bars are as long as what they count, and error bars as the intervals."""
    first, second = (circuit_of(GRAPHS["kv"], n) for n in (20, 40))
    ones = torch.ones(9).double()
    runs = [EvaluationResult(torch.linspace(0, 0.4 * i, 9).double(), ones, 0 * ones) for i in range(1, 4)]
    undefined = EvaluationResult(ones, ones, ones)
    overlaps = node_overlap(first, second), edge_overlap(first, second)
    figure = draw_comparison(Comparison(*overlaps, ((runs[0], runs[1]), (runs[2], undefined))))
    shared, faithful = figure.axes
    lengths = [bar.get_width() for bar in shared.patches]
    for found, overlap in zip((lengths[:3], lengths[3:]), overlaps, strict=True):
        both, either = overlap.n_shared, overlap.n_first + overlap.n_second - overlap.n_shared
        counted = (overlap.n_first - both, both, overlap.n_second - both)
        assert [round(either * share) for share in found] == list(counted) and sum(found) == pytest.approx(1)
    assert [bar.get_height() for bar in faithful.patches][:3] == pytest.approx([0.2, 0.4, 0.6])
    assert [tuple(line.get_ydata()) for line in faithful.lines[:3]] == [run.interval for run in runs]
    to_svg(figure)
