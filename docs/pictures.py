"""Draw the pictures of the README and of docs/report.md: run the example into docs/results, then draw docs/img from it.

python -m docs.pictures [--draw-only]     # needs chromium
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import eap_circuits as eap
from eap_circuits.report import write_report
from eap_circuits.report.curves import load_curve, save_curve
from eap_circuits.report.figures import draw_circuit, draw_curve
from tests.circuits.report.browser import browser

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
SHOWN = 60
# What the explorer's picture shows: a circuit of the curve, and the head of it that matters most to the logits.
SHARE, HEAD = 0.01, "a23.h3"


def run() -> None:

    from eap_circuits.adapters import load_model

    model, tokenizer = load_model("smollm2", device="cpu")
    data = eap.load_task("ioi", tokenizer, n=64, seed=0)
    scores = eap.attribute(model, data)
    curve = eap.faithfulness_curve(model, scores, data, how="greedy")
    scores.save(RESULTS / "smollm2-ioi.safetensors")
    save_curve(RESULTS / "smollm2-ioi-curve.json", curve)


def draw() -> None:
    from PIL import Image

    scores = eap.EdgeScores.load(RESULTS / "smollm2-ioi.safetensors")
    curve = load_curve(RESULTS / "smollm2-ioi-curve.json")
    parts = []
    for name, figure in (("circuit", draw_circuit(scores.select(SHOWN, how="greedy"))), ("curve", draw_curve(curve))):
        path = DOCS / "img" / f"{name}.png"
        figure.savefig(path, dpi=110, facecolor="white", bbox_inches="tight")
        parts.append(Image.open(path).convert("RGB"))
        path.unlink()
    height = max(part.height for part in parts)
    page = Image.new("RGB", (sum(part.width for part in parts) + 40, height), "white")
    left = 0
    for part in parts:
        page.paste(part, (left, (height - part.height) // 2))
        left += part.width + 40
    page.quantize(64).save(DOCS / "img" / "smollm2-ioi.png", optimize=True)


def draw_explorer() -> None:
    scores = eap.EdgeScores.load(RESULTS / "smollm2-ioi.safetensors")
    curve = load_curve(RESULTS / "smollm2-ioi-curve.json")
    circuit = scores.select(int(SHARE * scores.graph.n_edges), how="greedy")
    picture = DOCS / "img" / "explorer.png"
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as page:
        report = Path(folder) / "report.html"
        write_report(report, scores, circuit, curve)
        page.size(1184, 860)
        page.open(report, f"node={HEAD}")
        page.run("document.querySelector('#explorer details').open = true")
        page.run("document.querySelector('#explorer').scrollIntoView()")
        page.settle()
        page.shot(picture)


if __name__ == "__main__":
    if "--draw-only" not in sys.argv:
        run()
    draw()
    draw_explorer()
