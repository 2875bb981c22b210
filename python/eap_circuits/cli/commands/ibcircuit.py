"""eap ibcircuit: learn how much of each edge a circuit needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from .. import options, session
from ..console import check_outputs, check_suffix, give_scores, progress
from ..options import option

_PANEL = "Learning"


def ibcircuit(
    model: options.Model,
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    beta: Annotated[float, option(_PANEL, "What a nat of information costs: more closes more edges.", min=0.0)] = 30.0,
    steps: Annotated[int, option(_PANEL, "Steps of learning.", min=1)] = 200,
    rate: Annotated[float, option(_PANEL, "Adam's learning rate.")] = 0.05,
    examples: Annotated[int, option(_PANEL, "Prompts in each step.", min=1)] = 4,
    draw: Annotated[int, option(_PANEL, "Another number draws other noise.", min=0)] = 0,
    heads: options.Heads = "kv",
    memory: options.Memory = None,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[
        Path | None, option("Output", "Save the weights (.safetensors, or EAP-IG's .json, .pt).", "--out", "-o")
    ] = None,
    top: options.Top = 20,
    as_json: options.Json = False,
) -> None:
    """Learn how much of each edge a circuit needs, by IBCircuit: noise takes the place of the rest.

    Corrupted prompts are not used. -o saves the weights of the edges, from 0 to 1; eap curve measures their circuits.

    Examples:

      eap ibcircuit smollm2 --task ioi -n 16 --metric kl_divergence -o weights.safetensors

      eap ibcircuit gpt2 --data pairs.csv --steps 1300 --checkpoint learning.safetensors
    """
    import eap_circuits as eap

    from ...adapters import bind
    from ...formats import SUFFIXES, check_savable

    check_outputs(out, checkpoint)
    check_suffix(out, *SUFFIXES)
    prompts = session.Prompts(task, data, n, seed, align)
    prompts.check(metric, gradient=True)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    if out is not None:
        check_savable(out, bind(loaded).graph(heads))  # type: ignore[arg-type]
    pairs = prompts.load(tokenizer)
    with progress("Learning") as bar:
        weights = eap.ibcircuit(
            loaded,
            pairs,
            metric,
            beta=beta,
            steps=steps,
            rate=rate,
            examples=examples,
            heads=heads,  # type: ignore[arg-type]
            seed=draw,
            memory=memory,
            progress=bar,
            checkpoint=checkpoint,
        )
    give_scores(weights, out, top, as_json)
