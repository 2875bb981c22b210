"""The command that writes a report from saved files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import options
from ..console import check_outputs, check_suffix, say
from ..options import option


def report(
    scores: Annotated[Path, typer.Argument(help="Scores that eap attribute -o saved.")],
    circuit: Annotated[Path | None, option("Circuit", "The circuit to show.")] = None,
    edges: Annotated[int, option("Circuit", "Without --circuit: show one of exactly this many edges.", min=1)] = 200,
    how: options.How = "top",
    signed: options.Signed = False,
    curve: Annotated[Path | None, typer.Option(help="Faithfulness by size that eap curve -o saved (.json).")] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Scores, or a circuit, to compare with; of scores, a circuit of as many edges."),
    ] = None,
    title: Annotated[str | None, typer.Option(help="The page's title.")] = None,
    out: Annotated[Path, option("Output", "The page to write (.html).", "--out", "-o")] = Path("report.html"),
) -> None:
    """Write a report of saved scores as one HTML page, without the model.

    The page is an explorer of the circuit and of the strongest 200,000 edges, with faithfulness by size (--curve) and
    with what two circuits share (--against). It loads nothing else, so it can be sent or archived as it is.

    Examples:

      eap report scores.safetensors -o report.html

      eap report scores.safetensors --circuit circuit.json --curve curve.json -o report.html

      eap report base.safetensors --against tuned.safetensors -o compared.html
    """
    import eap_circuits as eap

    from ...report import load_curve, write_report

    check_outputs(out)
    check_suffix(out, ".html", ".htm")
    loaded = eap.EdgeScores.load(scores)
    files = {"scores": scores.name}
    if circuit is not None:
        chosen = eap.Circuit.load(circuit)
        files["circuit"] = circuit.name
    else:
        chosen = loaded.select(min(edges, loaded.graph.n_edges), how, signed, exactly=True)
    measured = None if curve is None else load_curve(curve)
    second = None if against is None else _either(against)
    write_report(out, loaded, chosen, measured, title=title, files=files, against=second)
    say(f"Wrote {out}.")


def _either(path: Path) -> Any:
    """The circuit of a file or, if it has none, its scores; EAP-IG's formats have room for both."""
    import eap_circuits as eap

    from ... import formats

    _, tensors, _ = formats.load(path)
    if "values" in tensors and not ("mask" in tensors and tensors["mask"].any()):
        return eap.EdgeScores.load(path)
    return eap.Circuit.load(path)
