"""The report's explorer, in a headless browser: what it shows against what Python computes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eap_circuits as eap
from eap_circuits import Circuit, EdgeScores, Graph
from eap_circuits.report import explorer, write_report
from tests.circuits.report.browser import Browser, browser
from tests.circuits.report.test_figures import GRAPHS
from tests.circuits.report.test_html import EVIL

HERE = Path(explorer.__file__).parent
MIXED = Graph((4, 4), (2, 2), 8, reads=(None, (("x", 4), ("gate", 1))))
TWO_SIDES = {
    f"decoder-{x}": Graph((2, 2, 3, 3), (2, 2, 3, 3), 8, encoder=2, mlps=(True, True, x, True)) for x in (True, False)
}
LIT = (
    "explorer.scene.%s.reduce((found, on, e) => on ? [...found, [explorer.data.u[e], explorer.data.v[e]]] : found, [])"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def scored(graph: Graph, seed: int = 0, **info: Any) -> EdgeScores:
    values = torch.randn(graph.n_senders, graph.n_receivers, generator=torch.Generator().manual_seed(seed))
    return EdgeScores(graph, values.pow(3) * graph.edge_mask, info)


def opened(page: Browser, path: Path, scores: EdgeScores, hash: str = "", **more: Any) -> Circuit:
    circuit = scores.select(n_edges=min(60, scores.graph.n_edges))
    write_report(path / "r.html", scores, circuit, **more)
    page.open(path / "r.html", hash)
    return circuit


def shown(page: Browser, what: str = "flags") -> set[tuple[int, int]]:
    page.settle()
    return set(map(tuple, page.run(LIT % what)))


def edges(mask: torch.Tensor) -> set[tuple[int, int]]:
    return set(map(tuple, mask.nonzero().tolist()))


def measured(scores: EdgeScores) -> Any:
    """A curve as `faithfulness_curve` returns it, of circuits that nothing was run for."""
    fractions = (0.05, 0.2, 0.5, 1.0)
    circuits = tuple(scores.select(int(f * scores.graph.n_edges)) for f in fractions)
    n_edges, values = tuple(c.n_edges for c in circuits), (0.1, 0.6, 0.9, 1.0)
    numbers = {"clean": 3.0, "corrupted": 0.0, "cpr": 0.8, "cmd": 0.2, "baselines": {}, "mean": values}
    return SimpleNamespace(fractions=fractions, circuits=circuits, n_edges=n_edges, faithfulness=values, **numbers)


def test_the_script_is_built_from_its_sources_and_holds_the_licences() -> None:
    web = HERE / "web"
    digest = hashlib.sha256()
    for name in ("package-lock.json", "build.mjs", *sorted(f"src/{path.name}" for path in (web / "src").iterdir())):
        digest.update((web / name).read_bytes())
    script = explorer.asset("explorer.js")
    assert f"sources {digest.hexdigest()}" in script, "run `make explorer`"
    for name in json.loads((web / "package.json").read_text())["dependencies"]:
        assert re.search(rf"^{name} \d[\d.]* \((MIT|ISC)\)\n\n.*Copyright", script, re.M | re.S), name
    assert "</script" not in script and len(script) < 300_000
    assert all(len(path.read_text().splitlines()) < 400 for path in (web / "src").iterdir())


EXPLORED = {**GRAPHS, "other-mixer": MIXED, **TWO_SIDES}


@pytest.mark.parametrize("graph", EXPLORED.values(), ids=[*EXPLORED])
def test_circuits_of_every_size_are_those_of_select(page: Browser, tmp_path: Path, graph: Graph) -> None:
    scores = scored(graph)
    circuit = opened(page, tmp_path, scores)
    assert page.errors == []
    assert shown(page) == edges(circuit.mask)
    for n in {1, 3, 12, 40, graph.n_edges // 2, graph.n_edges}:
        if n <= graph.n_edges:
            page.run(f"explorer.store.set({{circuit: null, size: {n}}})")
            assert shown(page) == edges(scores.select(n).mask)


def test_paths_through_a_node_are_those_that_enumeration_finds(page: Browser, tmp_path: Path) -> None:
    graph = GRAPHS["kv"]
    circuit = opened(page, tmp_path, scored(graph), hash="paths=true")
    kept = edges(circuit.mask)
    for node in (graph.senders.index(name) for name in circuit.nodes[1:5]):
        found: set[tuple[int, int]] = set()

        def walk(at: int, path: list[tuple[int, int]], node: int = node, found: Any = found) -> None:
            for u, v in kept:
                if u == at and v == graph.n_receivers - 1 and any(a == node for a, _ in [*path, (u, v)]):
                    found.update([*path, (u, v)])
                elif u == at:
                    for owner in graph.owners[v]:
                        walk(owner, [*path, (u, v)])

        walk(0, [])
        page.run(f"explorer.store.set({{node: {node}}})")
        assert shown(page, "lit") == found


def test_filters_and_the_address(page: Browser, tmp_path: Path) -> None:
    graph = GRAPHS["kv"]
    scores = scored(graph)
    circuit = opened(page, tmp_path, scores, hash="layers=1-2&kinds=q.mlp&sign=-1&least=0.1&node=a1.h2&pins=m1~a1.h0")
    wanted = set()
    for u, v in edges(circuit.mask):
        name, sender = graph.receivers[v], graph.senders[u]
        layers = [int(re.findall(r"\d+", x)[0]) for x in (name, sender) if x not in ("input", "logits")]
        kind = name.endswith("<q>") or name.startswith("m")
        if kind and all(1 <= layer <= 2 for layer in layers) and scores.values[u, v] <= -0.1:
            wanted.add((u, v))
    assert wanted and shown(page) == wanted
    page.run(
        "explorer.store.set({names: {'a1.h2': 'a # & name'}, view: {k: 2, x: 0.25, y: 0.5}}); explorer.store.flush()"
    )
    page.run("explorer.store.save()")
    hash = page.run("location.hash.slice(1)")
    before = page.run("JSON.stringify(explorer.store.state)")
    page.open(tmp_path / "r.html", hash)
    assert page.run("JSON.stringify(explorer.store.state)") == before
    assert shown(page) == wanted
    page.open(tmp_path / "r.html", "size=-3&layers=9-1&node=none&edge=x&view=a~b~c&names=%7B&circuit=77")
    assert page.errors == [] and shown(page) == edges(circuit.mask)


def test_mouse_and_keyboard_select_pan_and_zoom(page: Browser, tmp_path: Path) -> None:
    circuit = opened(page, tmp_path, scored(GRAPHS["kv"]))
    node = GRAPHS["kv"].senders.index(circuit.nodes[3])
    page.run("explorer.graph.element.scrollIntoView()")
    where = f"""(() => {{ const g = explorer.graph, f = g.element.getBoundingClientRect(), n = g.place.nodes[{node}];
      const [x, y] = g.transform.apply([n.x, n.y]); return [f.left + x, f.top + y]; }})()"""
    x, y = page.run(where)
    page.click(x, y)
    assert page.run("explorer.store.state.node") == node
    assert circuit.nodes[3] in page.run("document.querySelector('.details').innerText")
    page.mouse("Pressed", x, y)
    for i in range(1, 6):
        page.mouse("Moved", x + 10 * i, y + 4 * i, pressed=True)
    page.mouse("Released", x + 50, y + 20)
    after = page.run(where)
    assert after == pytest.approx([x + 50, y + 20], abs=1)
    page.run("explorer.graph.element.focus()")
    for key in ("Escape", "+", "ArrowUp", "Enter", "p"):
        page.key(key)
    state = json.loads(page.run("JSON.stringify(explorer.store.state)"))
    assert state["node"] and GRAPHS["kv"].senders[state["node"]] in circuit.nodes
    assert state["pins"] == [state["node"]] and state["view"]["k"] > 1
    assert page.run("document.querySelector('#node-pin').ariaPressed") == "true"
    assert page.run("document.querySelector('#node-paths').ariaPressed") == "false"
    pressed = """["graph.element", "table.window"].map(at => at.split(".").reduce((x, name) => x[name], explorer))
      .flatMap(x => ["ctrlKey", "metaKey", "altKey"].flatMap(held => ["p", "0", "-", "ArrowDown"].map(key =>
        x.dispatchEvent(new KeyboardEvent("keydown", { key, [held]: true, cancelable: true })))))"""
    assert all(page.run(pressed)), "what the browser prints or zooms by"
    page.settle()
    assert json.loads(page.run("JSON.stringify(explorer.store.state)")) == state


def test_a_group_is_one_node_whose_edges_are_summed(page: Browser, tmp_path: Path) -> None:
    graph = GRAPHS["kv"]
    scores = scored(graph)
    circuit = opened(page, tmp_path, scores)
    # One of the two heads that share a key stays outside.
    groups = {"some": ("a0.h1", "a1.h0", "m1"), "others": ("a1.h2", "a1.h3", "m2")}
    nodes = {name: sorted(map(graph.senders.index, members)) for name, members in groups.items()}
    given = json.dumps([{"name": name, "nodes": members} for name, members in nodes.items()])
    page.run(f"explorer.store.set({{groups: {given}}})")
    page.settle()

    def place(owners: list[int], name: str) -> str:
        return next((group for group, members in nodes.items() if owners and set(owners) <= set(members)), name)

    wanted: dict[tuple[str, str], float] = {}
    for u, v in edges(circuit.mask):
        ends = place([u], graph.senders[u]), place(list(graph.owners[v]), graph.receivers[v])
        if ends[0] != ends[1]:
            wanted[ends] = wanted.get(ends, 0.0) + abs(float(scores.values[u, v]))
    assert len(wanted) < circuit.n_edges
    lines = """[...explorer.scene.lines].map(e =>
      [explorer.scene.label(explorer.data.u[e]), explorer.scene.end(e), explorer.scene.sum(e, explorer.data.score)])"""
    found = page.run(lines)
    assert len(found) == len(wanted)
    assert {(start, end): total for start, end, total in found} == pytest.approx(wanted)
    assert [total for *_, total in found] == sorted((total for *_, total in found), reverse=True)
    assert shown(page) == edges(circuit.mask)  # only the picture knows of groups
    page.run(f"explorer.store.set({{node: {nodes['some'][1]}}})")
    page.settle()
    text = page.run("document.querySelector('.details').innerText")
    assert "some, a group of 3 nodes" in text and "a0.h1, a1.h0, m1" in text


def test_pinned_nodes_are_grouped_and_opened_by_keyboard_and_in_the_address(page: Browser, tmp_path: Path) -> None:
    circuit = opened(page, tmp_path, scored(GRAPHS["kv"]))
    pins = sorted(GRAPHS["kv"].senders.index(name) for name in circuit.nodes[1:4])
    page.run(f"explorer.store.set({{pins: {[*pins, 0]}}}); explorer.graph.element.focus()")
    page.key("g")
    state = "JSON.stringify(explorer.store.state)"
    grouped = json.loads(page.run(state))
    assert grouped["groups"] == [{"name": "3 nodes", "nodes": pins}]
    assert grouped["node"] == pins[0] and grouped["pins"] == [0]
    page.run("explorer.store.set({groups: [{...explorer.store.state.groups[0], name: 'a # & <b>'}]})")
    page.settle()
    page.run("explorer.store.save()")
    before, hash = page.run(state), page.run("location.hash.slice(1)")
    page.open(tmp_path / "r.html", hash)
    assert page.run(state) == before and page.errors == []
    page.run("explorer.graph.element.focus()")
    page.key("g")
    assert json.loads(page.run(state))["groups"] == []
    assert sorted(json.loads(page.run(state))["pins"]) == [0, *pins]
    for damaged in ('[["x","a0.h0"]]', '[["x","a0.h0","none"]]', '[[1,"a0.h0","a0.h1"]]', "{}", "[", "7"):
        page.open(tmp_path / "r.html", f"groups={damaged}")
        assert page.errors == [] and json.loads(page.run(state))["groups"] == []


def test_the_curve_and_the_slider_bring_measured_circuits(page: Browser, tmp_path: Path) -> None:
    scores = scored(GRAPHS["kv"])
    curve = measured(scores)
    opened(page, tmp_path, scores, curve=curve)
    assert page.run("explorer.data.curve.n_edges") == list(curve.n_edges)
    assert page.run("explorer.sizes.line.getBoundingClientRect().height") > 100
    for i, circuit in enumerate(curve.circuits):
        page.run(f"explorer.sizes.previewing(explorer.data.curve.circuits[{i}])")
        assert shown(page) == edges(circuit.mask)
    page.run("explorer.sizes.previewing(-1)")
    size = int(curve.fractions[1] * scores.graph.n_edges)
    page.run(
        f"const s = explorer.sizes; s.slider.value = s.position({size}); s.slider.dispatchEvent(new Event('input'))"
    )
    assert shown(page) == edges(curve.circuits[1].mask)
    line = "new DOMMatrix(explorer.sizes.line.style.transform).e - explorer.sizes.drawn.valToPos(%d, 'x')"
    assert abs(page.run(line % curve.n_edges[1])) < 0.01
    assert "Faithfulness 0.6" in page.run("document.querySelector('#size-said').innerText")


def test_after_quick_changes_the_picture_is_whole(page: Browser, tmp_path: Path) -> None:
    opened(page, tmp_path, scored(Graph((6,) * 6, (6,) * 6, 8)))
    page.run(
        "new Promise(done => { let n = 0; const step = () => { explorer.store.set({circuit: null, size: 200 * ++n});"
        " n < 8 ? requestAnimationFrame(step) : setTimeout(done, 400); }; step(); })"
    )
    page.settle()
    pictures = "explorer.graph.canvases.map(canvas => canvas.toDataURL())"
    drawn = page.run(pictures)
    page.run("explorer.graph.draw()")
    page.settle()
    assert page.run(pictures) == drawn


def test_the_table_sorts_and_finds_all_edges_and_makes_few_rows(page: Browser, tmp_path: Path) -> None:
    graph = Graph((6,) * 6, (6,) * 6, 8)
    scores = scored(graph)
    opened(page, tmp_path, scores)
    page.run("explorer.table.update()")
    ordered = [(u, v) for u, v, _ in scores.top_edges(3)]
    rows = "[...document.querySelectorAll('tr[data-edge]')].map(r => [r.cells[1].innerText, r.cells[2].innerText])"
    assert list(map(tuple, page.run(rows)))[:3] == ordered
    assert len(page.run(rows)) < 60 < graph.n_edges
    page.run("explorer.table.sortBy(explorer.table.columns.find(c => c.key === 'score'))")
    u, v = divmod(int(scores.values.argmax()), graph.n_receivers)
    assert page.run(rows)[0] == [graph.senders[u], graph.receivers[v]]
    page.run("const t = explorer.table; t.search.value = 'a1.h2 -> logits'; t.search.dispatchEvent(new Event('input'))")
    assert page.run(rows) == [["a1.h2", "logits"]]


def test_two_circuits_are_told_apart(page: Browser, tmp_path: Path) -> None:
    graph = GRAPHS["kv"]
    scores, other = scored(graph, task="ioi"), scored(graph, 1, task="greater-than")
    circuit = opened(page, tmp_path, scores, against=other)
    second = other.select(circuit.n_edges, exactly=True)
    for part, mask in (
        ("all", circuit.mask | second.mask),
        ("first", circuit.mask & ~second.mask),
        ("both", circuit.mask & second.mask),
        ("second", second.mask & ~circuit.mask),
    ):
        page.run(f"explorer.store.set({{part: '{part}'}})")
        assert shown(page) == edges(mask)
    text = page.run("document.querySelector('.overlap').innerText")
    assert "only ioi" in text and "only greater-than" in text
    for name, found in (("edges", eap.edge_overlap(circuit, second)), ("nodes", eap.node_overlap(circuit, second))):
        row = re.search(rf"{name}\s+(\d+)\s+(\d+)\s+(\d+)", text)
        numbers = [found.n_first - found.n_shared, found.n_shared, found.n_second - found.n_shared]
        assert row and list(map(int, row.groups())) == numbers
    page.run("explorer.store.set({circuit: null, size: 20, part: 'all'})")
    assert shown(page) == edges(scores.select(20).mask | other.select(20).mask)


def test_hostile_texts_run_nothing_and_the_page_asks_for_nothing(
    page: Browser, tmp_path: Path, make_pairs: Any
) -> None:
    scores = scored(
        GRAPHS["kv"], task="</script><script>alert(1)</script>", model=f"<img src=x onerror=alert(2)>{EVIL}"
    )
    kept = EdgeScores(scores.graph, scores.values, scores.info, per_example=scores.values.repeat(4, 1, 1))
    data = replace(make_pairs(n=4), prompts=((EVIL, EVIL),) * 4)
    for hash in (
        "node=m0",
        "edge=0-0",
        "names=%7B%22m0%22%3A%22%3Cimg%20src%3Dx%20onerror%3Dalert(3)%3E%22%7D&node=m0",
        "groups=%5B%5B%22%3Cimg%20src%3Dx%20onerror%3Dalert(4)%3E%22%2C%22m0%22%2C%22m1%22%5D%5D&node=m0",
    ):
        opened(page, tmp_path, kept, hash=hash, against=scored(scores.graph, 1, task=EVIL), data=data)
        assert page.errors == []
        assert {url.split("#")[0] for url in page.requests} <= {"about:blank", (tmp_path / "r.html").as_uri()}
        assert page.run("document.querySelectorAll('script').length") == 2


def test_inside_a_notebook_it_is_a_frame_that_reaches_nothing(page: Browser, tmp_path: Path) -> None:
    scores = scored(GRAPHS["kv"], task=EVIL)
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset='utf-8'><body>{scores._repr_html_()}", "utf-8")
    page.open(path)
    with page.frame():
        page.settle()
        assert shown(page) == edges(scores.select(100).mask)
        assert page.run("[...document.querySelectorAll('button')].some(b => b.innerText === 'Link')") is False
        page.run("explorer.store.set({node: 1}); explorer.store.flush(); explorer.store.save()")
        outside = "(() => { try { return parent.document.title } catch (error) { return error.name } })()"
        assert page.run(outside) == "SecurityError"
        assert page.run("fetch('https://example.com').then(() => 'loaded', () => 'refused')") == "refused"
        # The wheel belongs to the notebook until the graph has been clicked.
        wheel = "explorer.graph.element.dispatchEvent(new WheelEvent('wheel', {deltaY: -50, cancelable: true}))"
        assert page.run(wheel) is True
        page.run("explorer.graph.element.focus()")
        assert page.run(wheel) is False
    seen = "(() => { const i = document.querySelector('img'); return i.complete && i.clientWidth * i.clientHeight })()"
    page.run("document.querySelector('iframe').remove()")
    assert page.run(seen) > 10_000
    assert {url.split(":")[0] for url in page.requests} <= {"about", "file", "data", "https"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_phone_and_print(page: Browser, tmp_path: Path, scheme: str) -> None:
    page.media(scheme)
    scores = scored(GRAPHS["kv"])
    opened(page, tmp_path, scores, curve=measured(scores))
    style = "getComputedStyle(document.documentElement).getPropertyValue('--%s').trim()"
    background = page.run(style % "paper")
    alpha = page.run("explorer.ALPHA")
    for name in ("ink", "muted", "accent"):
        assert contrast(page.run(style % name), background) >= 4.5, name
    for name in ("positive", "negative", "both", "query", "key", "value"):
        assert contrast(page.run(style % name), background, alpha) >= 3, name
    unnamed = """[...document.querySelectorAll('#explorer :is(button, input, select)')].filter(x =>
      !(x.innerText || x.ariaLabel || x.labels?.length || x.placeholder)).length"""
    assert page.run(unnamed) == 0
    page.size(390, 844, phone=True)
    page.settle()
    assert page.run("document.documentElement.scrollWidth") == 390
    page.size(1280, 900)
    page.media("light")
    assert page.pdf().startswith(b"%PDF")


def test_a_phone_cuts_no_number_of_a_table_with_all_columns(page: Browser, tmp_path: Path) -> None:
    scores = scored(GRAPHS["kv"])
    scores = replace(scores, values=0.1 + scores.values / 9, variance=scores.values.abs() / 7 + 0.1)
    opened(page, tmp_path, scores, against=scored(GRAPHS["kv"], 1))
    page.size(390, 844, phone=True)
    page.settle()
    numbers = "[...document.querySelectorAll('.rows td.number')]"
    assert page.run(f"{numbers}.length") > 0
    assert page.run(f"{numbers}.filter(x => x.scrollWidth > x.clientWidth).map(x => x.innerText)") == []
    page.size(1280, 900)


def contrast(colour: str, background: str, alpha: float = 1.0) -> float:
    """WCAG's contrast of two colours #rrggbb, the first drawn with this opacity."""
    back, front = ([int(x[i : i + 2], 16) / 255 for i in (1, 3, 5)] for x in (background, colour))
    mixed = [alpha * f + (1 - alpha) * b for f, b in zip(front, back)]

    def luminance(channels: list[float]) -> float:
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear))

    light, dark = sorted((luminance(mixed), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
