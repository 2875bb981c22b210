"""eap acdc: remove edges one after another as long as the circuit does not get worse."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options, session
from ..console import check_outputs, check_suffix, progress, say, show_json, write
from ..options import option


def acdc(
    model: options.Model,
    threshold: Annotated[float, typer.Argument(help="How much an edge must matter to stay, in units of the metric.")],
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    heads: options.Heads = "kv",
    ablation: options.Ablation = "patching",
    ablation_data: options.AblationData = None,
    memory: options.Memory = None,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[
        Path | None, option("Output", "Save the circuit (.safetensors, or EAP-IG's .json, .pt).", "--out", "-o")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Find the circuit of ACDC: edges go, from the last to the first, if the circuit is hardly worse without them.

    Each edge costs a run of a circuit on all prompts, so few prompts and a checkpoint are a good start.

    Examples:

      eap acdc smollm2 0.01 --task ioi -n 8 --metric kl_divergence -o circuit.json --checkpoint acdc.safetensors

      eap acdc gpt2 0.05 --data pairs.csv -o circuit.json
    """
    import eap_circuits as eap

    from ...adapters import bind
    from ...errors import InputError
    from ...formats import SUFFIXES, check_savable

    check_outputs(out, checkpoint)
    check_suffix(out, *SUFFIXES)
    prompts = session.Prompts(task, data, n, seed, align, ablation_data)
    prompts.check(metric)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    if out is not None:
        check_savable(out, bind(loaded).graph(heads))  # type: ignore[arg-type]
    pairs = prompts.load(tokenizer)
    with progress("Deciding on edges") as bar:
        found = eap.acdc(
            loaded,
            pairs,
            threshold,
            metric,
            heads=heads,  # type: ignore[arg-type]
            ablation=ablation,
            ablation_data=prompts.load_ablation(tokenizer),
            memory=memory,
            progress=bar,
            checkpoint=checkpoint,
        )
    files: dict[str, str] = {}
    wrong = write(files, "circuit", found.save, out)
    if as_json:
        edges = [list(edge) for edge in found.edges]
        show_json({"n_edges": found.n_edges, "edges": edges, "info": found.info, "files": files})
    else:
        ran = found.info["acdc"]
        left = f"{found.n_edges} of {found.graph.n_edges} edges are left"
        say(f"{left} ({ran['circuits']} circuits in {ran['passes']} passes).")
        for file in files.values():
            say(f"Wrote {file}.")
    if wrong:
        raise InputError(" ".join(wrong))
