"""The command that writes a report from saved files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options, session
from ..console import check_outputs, check_suffix, say
from ..options import option


def report(
    scores: Annotated[Path, typer.Argument(help="Scores that eap attribute -o saved.")],
    circuit: Annotated[Path | None, option("Circuit", "The circuit to show.")] = None,
    edges: Annotated[int, option("Circuit", "Without --circuit: show one of exactly this many edges.", min=1)] = 200,
    how: options.How = "top",
    signed: options.Signed = False,
    curve: Annotated[Path | None, typer.Option(help="Faithfulness by size that eap curve -o saved (.json).")] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
    out: Annotated[Path, option("Output", "The page to write (.html).", "--out", "-o")] = Path("report.html"),
) -> None:
    """Write a report of saved scores as one HTML page, without the model.

    The page shows the circuit, the strongest edges and, with --curve, faithfulness by size. It loads nothing else, so
    it can be sent or archived as it is.

    Examples:

      eap report scores.safetensors -o report.html

      eap report scores.safetensors --circuit circuit.json --curve curve.json -o report.html
    """
    import eap_circuits as eap

    from ...report import load_curve, write_report

    check_outputs(out)
    check_suffix(out, ".html", ".htm")
    session.check_how(how)
    loaded = eap.EdgeScores.load(scores)
    files = {"scores": scores.name}
    if circuit is not None:
        chosen = eap.Circuit.load(circuit)
        files["circuit"] = circuit.name
    else:
        chosen = loaded.select(min(edges, loaded.graph.n_edges), how, signed, exactly=True)
    measured = None if curve is None else load_curve(curve)
    write_report(out, loaded, chosen, measured, title=title, files=files)
    say(f"Wrote {out}.")
