"""Draw the pictures of the README, the report's and the notebooks' pages: run the example, then draw docs/img from it.

python -m docs.pictures [--draw-only]     # needs chromium
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import eap_circuits as eap
from eap_circuits.report import write_report
from eap_circuits.report.curves import load_curve, save_curve
from eap_circuits.report.figures import draw_circuit, draw_curve
from tests.circuits.report.browser import Browser, browser

DOCS = Path(__file__).parent
RESULTS = DOCS / "results"
SHOWN = 60
# What the explorer's picture shows: a circuit of the curve, and the head of it that matters most to the logits.
SHARE, HEAD = 0.01, "a23.h3"
GROUPS = [["early MLPs", "m0", "m1", "m2", "m3"], ["into the logits", "a23.h3", "a24.h4", "a29.h1"]]


def run() -> None:

    from eap_circuits.adapters import load_model

    model, tokenizer = load_model("smollm2", device="cpu")
    data = eap.load_task("ioi", tokenizer, n=64, seed=0)
    scores = eap.attribute(model, data)
    curve = eap.faithfulness_curve(model, scores, data, how="greedy")
    scores.save(RESULTS / "smollm2-ioi.safetensors")
    save_curve(RESULTS / "smollm2-ioi-curve.json", curve)


def draw() -> None:
    scores = eap.EdgeScores.load(RESULTS / "smollm2-ioi.safetensors")
    curve = load_curve(RESULTS / "smollm2-ioi-curve.json")
    beside(DOCS / "img" / "smollm2-ioi.png", draw_circuit(scores.select(SHOWN, how="greedy")), draw_curve(curve))


def beside(picture: Path, *figures: Any) -> None:
    """One picture of several figures, side by side."""
    from PIL import Image

    parts = []
    for figure in figures:
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=110, facecolor="white", bbox_inches="tight")
        parts.append(Image.open(drawn).convert("RGB"))
    height = max(part.height for part in parts)
    page = Image.new("RGB", (sum(part.width for part in parts) + 40 * (len(parts) - 1), height), "white")
    left = 0
    for part in parts:
        page.paste(part, (left, (height - part.height) // 2))
        left += part.width + 40
    save(page, picture)


def draw_explorer() -> None:
    """Of the report with a head selected, with groups, and of a notebook's output."""
    scores = eap.EdgeScores.load(RESULTS / "smollm2-ioi.safetensors")
    curve = load_curve(RESULTS / "smollm2-ioi-curve.json")
    circuit = scores.select(int(SHARE * scores.graph.n_edges), how="greedy")
    with tempfile.TemporaryDirectory() as folder, browser(Path(folder)) as page:
        report, output = (Path(folder) / f"{name}.html" for name in ("report", "output"))
        write_report(report, scores, circuit, curve)
        page.size(1184, 860)
        for name, view in (("explorer", f"node={HEAD}"), ("groups", f"groups={quote(json.dumps(GROUPS))}&node={HEAD}")):
            page.open(report, view)
            page.run("document.querySelector('#explorer details').open = true")
            page.run("document.querySelector('#explorer').scrollIntoView()")
            page.settle()
            shoot(page, name)
        output.write_text(f"<!doctype html><meta charset='utf-8'><body>{scores._repr_html_()}", "utf-8")
        page.open(output)
        with page.frame():
            page.settle()
        shoot(page, "output")


def shoot(page: Browser, name: str) -> None:
    from PIL import Image

    picture = DOCS / "img" / f"{name}.png"
    page.shot(picture)
    save(Image.open(picture).convert("RGB"), picture)


def save(image: Any, picture: Path) -> None:
    """With few colours, and none of them mixed from others."""
    from PIL import Image

    image.quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    if "--draw-only" not in sys.argv:
        run()
    draw()
    draw_explorer()
