"""How fast the report's explorer is in a headless browser: `python -m bench.explorer REPORT.html ...`.

Prints when the page and its graph are first painted, and how long frames take while the graph is dragged, zoomed, and
while the slider moves; all edges of the file are shown.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

from tests.circuits.report.browser import Browser, browser

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


def measure(page: Browser, path: Path) -> dict[str, str]:
    page.open(path)
    paint = page.run("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    found = {"first paint": f"{paint:.0f} ms", "graph": f"{page.run('explorer.graph.first'):.0f} ms"}
    everything = "explorer.store.set({circuit: null, size: explorer.data.n})"
    for name, action in (("drag", DRAG), ("zoom", WHEEL), ("slider", SLIDE)):
        page.run(everything)
        page.settle()
        times = sorted(json.loads(page.run(FRAMES % action)))
        late = sum(t > 20 for t in times)
        found[name] = (
            f"{statistics.median(times):.1f} ms a frame, {times[-1]:.0f} at most, {late} of {len(times)} above 20"
        )
    edges = "[explorer.scene.shown.length, explorer.data.n, explorer.data.total].join(' shown of ')"
    page.run(everything)
    page.settle()
    return {"edges": page.run(edges), **found}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as page:
        for name in sys.argv[1:]:
            print(name)
            for key, value in measure(page, Path(name).resolve()).items():
                print(f"  {key:12} {value}")
