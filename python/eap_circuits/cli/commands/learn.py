"""eap learn: learn one ranking of edges for circuits of every size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options, session
from ..console import check_outputs, check_suffix, give_scores, progress
from ..options import default, option

_PANEL = "Learning"


def learn(
    model: options.Model,
    scores: Annotated[Path, typer.Argument(help="Scores to start from, such as eap attribute -o saved.")],
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    steps: Annotated[int, option(_PANEL, "Steps of learning.", min=1)] = 200,
    rate: Annotated[float, option(_PANEL, "Adam's learning rate.")] = 0.08,
    circuits: Annotated[int, option(_PANEL, "Circuits of different sizes in each step.", min=1)] = 2,
    examples: Annotated[int, option(_PANEL, "Prompt pairs in each step.", min=1)] = 4,
    smallest: Annotated[
        int | None,
        option(_PANEL, "The fewest edges a circuit has.  " + default("0.1 % of all"), min=1),
    ] = None,
    largest: Annotated[
        int | None,
        option(_PANEL, "The most.  " + default("20 % of all"), min=1),
    ] = None,
    draw: Annotated[int, option(_PANEL, "Another number draws other sizes and gates.", min=0)] = 0,
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
    """Learn one ranking of all edges such that its circuits of every size do best.

    Learning starts from scores. Each step runs circuits of random sizes and moves edges along the gradient of their
    masks, such that their metric comes nearer to the whole model's. -o saves the ranking; eap curve measures it, best
    on other prompts than it was learned from.

    Examples:

      eap learn smollm2 scores.safetensors --task ioi -n 16 -o learned.safetensors

      eap learn gpt2 scores.safetensors --data pairs.csv --steps 400 --checkpoint learning.safetensors
    """
    import eap_circuits as eap

    from ...errors import expected
    from ...formats import SUFFIXES, check_savable

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
    with progress("Learning") as bar:
        learned = eap.learn_mask(
            loaded,
            pairs,
            metric,
            start=start,
            steps=steps,
            rate=rate,
            circuits=circuits,
            examples=examples,
            n_edges=None if smallest is None or largest is None else (smallest, largest),
            seed=draw,
            ablation=ablation,
            ablation_data=prompts.load_ablation(tokenizer),
            memory=memory,
            progress=bar,
            checkpoint=checkpoint,
        )
    give_scores(learned, out, top, as_json)
