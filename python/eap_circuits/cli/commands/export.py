"""eap export: the model without the heads and MLPs that a circuit does not use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options, session
from ..console import say, show_json, working
from ..options import option


def export(
    model: options.Model,
    circuit: Annotated[Path, typer.Argument(help="A circuit: .json, .pt or .safetensors.")],
    out: Annotated[Path, option("Output", "A new or an empty folder for the checkpoint.", "--out", "-o")],
    dtype: options.Dtype = None,
    device: options.Device = None,
    as_json: options.Json = False,
) -> None:
    """Write a Hugging Face checkpoint without the heads and MLPs that a circuit does not use.

    from_pretrained loads it. It computes what the model does if these write zero and all others read and write as ever:
    that is more than the circuit, as it has every edge among the circuit's nodes. Layers, heads and MLPs are left out
    where the architecture's configuration can say so; what has to stay has weights of zero.

    Examples:

      eap export smollm2 circuit.json -o smaller
    """
    import eap_circuits as eap

    from ...adapters import bind
    from ...files import check_folder
    from ...request import check_no_spans

    check_folder(out)
    kept = eap.Circuit.load(circuit)
    check_no_spans("circuit", kept.graph)
    loaded, tokenizer = session.load_model(model, dtype, device)
    with working("Leaving out what the circuit does not use …"):
        small = eap.export_model(loaded, kept, out, tokenizer)
    weights, of = (sum(x.numel() for x in each.parameters()) for each in (small, loaded))
    heads, before = (bind(each).graph("kv").n_heads for each in (small, loaded))
    if as_json:
        show_json({"weights": weights, "of": of, "heads": heads, "heads_before": before, "files": {"model": str(out)}})
        return
    layers = f"{len(heads)} of {len(before)} layers, {sum(heads)} of {sum(before)} heads"
    say(f"{layers}, {weights:,} of {of:,} weights are left.")
    say(f"Wrote {out}.")
