"""eap prune: rank edges by pruning a circuit, each time scored where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options, session
from ..console import check_outputs, check_suffix, progress, say, show_json, show_table, write
from ..options import default, option

_PANEL = "Pruning"


def prune(
    model: options.Model,
    scores: Annotated[Path, typer.Argument(help="Scores to start from, such as eap attribute -o saved.")],
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    keep: Annotated[float, option(_PANEL, "The share of its edges that a circuit keeps in a round.")] = 0.75,
    smallest: Annotated[
        int | None, option(_PANEL, "The size at which pruning ends.  " + default("0.05 % of all edges"), min=1)
    ] = None,
    largest: Annotated[
        int | None, option(_PANEL, "The size at which it begins.  " + default("20 % of all edges"), min=1)
    ] = None,
    ablation: options.Ablation = "patching",
    ablation_data: options.AblationData = None,
    memory: options.Memory = None,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[
        Path | None,
        option("Output", "Save the ranking (.safetensors, or EAP-IG's .json, .pt).", "--out", "-o"),
    ] = None,
    top: options.Top = 20,
    as_json: options.Json = False,
) -> None:
    """Rank all edges by pruning a circuit a share at a time, each time scored where the circuit then runs.

    Pruning starts from scores. In each round the circuit runs on all prompts, and those of its edges go that matter
    least by the gradient of its mask. -o saves the ranking; eap curve measures it, best on other prompts.

    Examples:

      eap prune smollm2 scores.safetensors --task ioi -n 16 -o pruned.safetensors

      eap prune gpt2 scores.safetensors --data pairs.csv --keep 0.9 --checkpoint pruning.safetensors
    """
    import eap_circuits as eap

    from ...errors import InputError, expected
    from ...formats import SUFFIXES, check_savable
    from ...report.tables import edge_table

    check_outputs(out, checkpoint)
    check_suffix(out, *SUFFIXES)
    prompts = session.Prompts(task, data, n, seed, align, ablation_data)
    prompts.check(metric, gradient=True)
    if (smallest is None) != (largest is None):
        raise expected("--smallest, --largest", "both or neither", "one of them")
    start = eap.EdgeScores.load(scores)
    if out is not None:
        check_savable(out, start.graph)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    pairs = prompts.load(tokenizer)
    with progress("Pruning") as bar:
        pruned = eap.prune_gradually(
            loaded,
            pairs,
            metric,
            start=start,
            keep=keep,
            n_edges=None if smallest is None or largest is None else (smallest, largest),
            ablation=ablation,
            ablation_data=prompts.load_ablation(tokenizer),
            memory=memory,
            progress=bar,
            checkpoint=checkpoint,
        )
    files: dict[str, str] = {}
    wrong = write(files, "scores", pruned.save, out)
    table = edge_table(pruned, None, top)
    if as_json:
        show_json({"info": pruned.info, "graph": pruned.graph.to_dict(), "edges": table.records(), "files": files})
    else:
        show_table(table)
        for file in files.values():
            say(f"Wrote {file}.")
    if wrong:
        raise InputError(" ".join(wrong))
