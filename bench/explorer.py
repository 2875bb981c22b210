"""How fast the report's explorer is in a headless browser: `python -m bench.explorer [REPORT.html ...]`.

For each page: when it and its graph are first painted, and how long frames take while the graph is dragged, zoomed, and
while the slider moves; all edges of the file are shown at first. Before them comes an empty page with a canvas as large
as the graph, drawn on in every frame: as many slow frames as there are not the explorer's. Without names the pages are
those of docs/report.md, and the results are written to docs/results/explorer.json.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.tables import Results
    from tests.circuits.report.browser import Browser

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RESULT = RESULTS / "explorer.json"
SLOW = 20  # milliseconds; at 60 frames a second one takes 16.7
FRAMES = """new Promise(done => { const times = []; let last = performance.now(), i = 0;
  const step = now => { times.push(now - last); last = now; if (++i > 90) return done(JSON.stringify(times.slice(1)));
    (%s)(i); requestAnimationFrame(step); };
  requestAnimationFrame(now => { last = now; requestAnimationFrame(step); }); })"""
WHEEL = """i => explorer.graph.element.dispatchEvent(new WheelEvent('wheel',
  {clientX: 400, clientY: 400, deltaY: i % 40 < 20 ? -20 : 20, bubbles: true, cancelable: true}))"""
DRAG = """i => {
  const at = {clientX: 300 + 3 * (i % 60), clientY: 300 + i, bubbles: true, cancelable: true, view: window};
  const to = i === 1 ? explorer.graph.element : window;
  to.dispatchEvent(new MouseEvent(i === 1 ? 'mousedown' : i === 90 ? 'mouseup' : 'mousemove', at)); }"""
SLIDE = """i => { const s = explorer.sizes.slider; s.value = 300 + 7 * i; s.dispatchEvent(new Event('input')); }"""
EMPTY = "<!doctype html><canvas width=860 height=756></canvas>"
DOT = """i => { const c = document.querySelector('canvas').getContext('2d');
  c.clearRect(0, 0, 860, 756); c.fillRect(3 * i, i, 50, 50); }"""


def frames(page: Browser, action: str) -> list[float]:
    """The median in milliseconds, the longest, and how many of how many were slow."""
    times = sorted(json.loads(page.run(FRAMES % action)))
    return [round(statistics.median(times), 1), round(times[-1]), sum(t > SLOW for t in times), len(times)]


def measure(page: Browser, path: Path) -> dict[str, Any]:
    """Milliseconds, and of each movement its frames."""
    page.open(path)
    paint = page.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    found: dict[str, Any] = {"first paint": round(paint), "graph": round(page.run("explorer.graph.first"))}
    everything = "explorer.store.set({circuit: null, size: explorer.data.n})"
    for name, action in (("drag", DRAG), ("zoom", WHEEL), ("slider", SLIDE)):
        page.run(everything)
        page.settle()
        found[name] = frames(page, action)
    page.run(everything)
    page.settle()
    edges = page.run("[explorer.scene.shown.length, explorer.data.n, explorer.data.total]")
    return {"edges": edges, "megabytes": round(path.stat().st_size / 1e6, 1), **found}


def pages(folder: Path) -> Iterator[tuple[str, Path]]:
    """Reports of SmolLM2's committed scores, and of random ones of Llama-3.1-8B's graph."""
    import torch

    import eap_circuits as eap
    from eap_circuits.report import load_curve, write_report

    small = eap.EdgeScores.load(RESULTS / "smollm2-ioi.safetensors")
    graph = eap.Graph((32,) * 32, (8,) * 32, 4096, heads="query")
    values = torch.randn(graph.n_senders, graph.n_receivers, generator=torch.Generator().manual_seed(0)).pow(3)
    large = eap.EdgeScores(graph, values * graph.edge_mask)
    curve = load_curve(RESULTS / "smollm2-ioi-curve.json")
    for name, scores, measured in (
        ("SmolLM2-135M, IOI", small, curve),
        ("Llama-3.1-8B's graph, random scores", large, None),
    ):
        path = folder / f"{scores.graph.n_edges}.html"
        write_report(path, scores, scores.select(n_edges=700), measured)
        yield name, path


def table(_: Results) -> str:
    """The table of docs/report.md."""
    from bench.tables import markdown

    found = json.loads(RESULT.read_text(encoding="utf-8"))
    columns = ["page", "edges", "file", "first paint", "graph drawn", "drag", "zoom", "slider"]

    def said(median: float, longest: float, slow: int, n: int) -> str:
        return f"{median:.1f} ms; {slow} of {n} above {SLOW}, longest {longest}"

    rows = [
        [
            name,
            f"{one['edges'][1]:,} of {one['edges'][2]:,}",
            f"{one['megabytes']:.1f} MB",
            *(f"{one[key]} ms" for key in ("first paint", "graph")),
            *(said(*one[key]) for key in ("drag", "zoom", "slider")),
        ]
        for name, one in found["pages"].items()
    ]
    about = (
        f"An empty page with a canvas that is drawn on in every frame: {said(*found['empty'])}. {found['machine']}, "
        f"load before the run {found['load']}; {found['browser']}, headless, without a GPU; {found['date']}."
    )
    return f"{markdown(columns, rows)}\n{about}\n"


if __name__ == "__main__":
    from tests.circuits.report.browser import browser

    with tempfile.TemporaryDirectory() as temporary, browser(Path(temporary)) as opened:
        folder = Path(temporary)
        asked = [(name, Path(name).resolve()) for name in sys.argv[1:]]
        load = round(os.getloadavg()[0], 1)  # before anything runs here
        blank = folder / "empty.html"
        blank.write_text(EMPTY, encoding="utf-8")
        opened.open(blank)
        empty = frames(opened, DOT)
        results = {name: measure(opened, path) for name, path in asked or pages(folder)}
        version = opened.call("Browser.getVersion")["product"]
    print(f"load {load}; an empty page {empty}")
    for name, result in results.items():
        print(name)
        for key, value in result.items():
            print(f"  {key:12} {value}")
    if not asked:
        import datetime

        from bench.measure import machine
        from bench.tables import machine as named

        about = {"machine": named({"machine": machine()}), "browser": version, "date": f"{datetime.date.today()}"}
        about |= {"load": load, "empty": empty}
        RESULT.write_text(json.dumps({**about, "pages": results}, indent=1) + "\n", encoding="utf-8")
