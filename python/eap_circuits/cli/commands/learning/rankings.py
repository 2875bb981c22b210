"""eap learn, eap prune, eap ibcircuit: one ranking of edges for circuits of every size, from what circuits do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ... import options, session
from ...console import check_outputs, check_suffix, conclude, progress, show_json, show_table, write
from ...options import POSITIVE, SEEDED, chosen, default, option, within

if TYPE_CHECKING:
    from ....graph import EdgeScores

_PANEL = "Learning"
_KEPT, _NOT_NEGATIVE = within("a share between 0 and 1", 5e-324, 1 - 2**-53), within("a number of at least 0", 0, 1e308)
_Out = Annotated[
    Path | None, option("Output", "Save the ranking (.safetensors, or EAP-IG's .json, .pt).", "--out", "-o")
]


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
    rate: Annotated[float, option(_PANEL, "Adam's learning rate.", **POSITIVE)] = 0.08,
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
    gates: Annotated[str, chosen(_PANEL, "gates", "How open edges are in a step.")] = "hard-concrete",
    draw: Annotated[int, option(_PANEL, "Another number draws other sizes and gates.", min=0, **SEEDED)] = 0,
    ablation: options.ScoringAblation = "patching",
    ablation_data: options.AblationData = None,
    memory: options.Memory = None,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: _Out = None,
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

    prompts = session.Prompts(task, data, n, seed, align, ablation_data, ablation)
    start, sizes = _start(scores, prompts, metric, (smallest, largest), out, checkpoint)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    pairs = prompts.load(loaded, tokenizer)
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
            n_edges=sizes,
            gates=gates,
            seed=draw,
            ablation=ablation,
            ablation_data=prompts.load_ablation(loaded, tokenizer),
            memory=memory,
            progress=bar,
            checkpoint=checkpoint,
        )
    _show(learned, out, top, as_json)


def prune(
    model: options.Model,
    scores: Annotated[Path, typer.Argument(help="Scores to start from, such as eap attribute -o saved.")],
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    keep: Annotated[
        float, option("Pruning", "The share of its edges that a circuit keeps in a round.", **_KEPT)
    ] = 0.75,
    smallest: Annotated[
        int | None, option("Pruning", "The size at which pruning ends.  " + default("0.05 % of all edges"), min=1)
    ] = None,
    largest: Annotated[
        int | None, option("Pruning", "The size at which it begins.  " + default("20 % of all edges"), min=1)
    ] = None,
    ablation: options.ScoringAblation = "patching",
    ablation_data: options.AblationData = None,
    memory: options.Memory = None,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: _Out = None,
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

    prompts = session.Prompts(task, data, n, seed, align, ablation_data, ablation)
    start, sizes = _start(scores, prompts, metric, (smallest, largest), out, checkpoint)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    pairs = prompts.load(loaded, tokenizer)
    with progress("Pruning") as bar:
        pruned = eap.prune_gradually(
            loaded,
            pairs,
            metric,
            start=start,
            keep=keep,
            n_edges=sizes,
            ablation=ablation,
            ablation_data=prompts.load_ablation(loaded, tokenizer),
            memory=memory,
            progress=bar,
            checkpoint=checkpoint,
        )
    _show(pruned, out, top, as_json)


def ibcircuit(
    model: options.Model,
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    beta: Annotated[
        float, option(_PANEL, "What a nat of information costs: more closes more edges.", **_NOT_NEGATIVE)
    ] = 30.0,
    steps: Annotated[int, option(_PANEL, "Steps of learning.", min=1)] = 200,
    rate: Annotated[float, option(_PANEL, "Adam's learning rate.", **POSITIVE)] = 0.05,
    examples: Annotated[int, option(_PANEL, "Prompts in each step.", min=1)] = 4,
    draw: Annotated[int, option(_PANEL, "Another number draws other noise.", min=0, **SEEDED)] = 0,
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

    from ....adapters import bind
    from ....formats import SUFFIXES, check_savable

    check_outputs(out, checkpoint)
    check_suffix(out, *SUFFIXES)
    prompts = session.Prompts(task, data, n, seed, align)
    prompts.check(metric, gradient=True)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    if out is not None:
        check_savable(out, bind(loaded).graph(heads))  # type: ignore[arg-type]
    pairs = prompts.load(loaded, tokenizer)
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
    _show(weights, out, top, as_json)


def _start(
    scores: Path,
    prompts: session.Prompts,
    metric: str | None,
    sizes: tuple[int | None, int | None],
    out: Path | None,
    checkpoint: Path | None,
) -> tuple[EdgeScores, tuple[int, int] | None]:
    """The scores to start from, and the sizes if they are given; what is wrong is said before a model is loaded."""
    import eap_circuits as eap

    from ....errors import expected
    from ....formats import SUFFIXES, check_savable
    from ....learning import sizes_between
    from ....request import check_no_spans

    check_outputs(out, checkpoint)
    check_suffix(out, *SUFFIXES)
    prompts.check(metric, gradient=True)
    smallest, largest = sizes
    if (smallest is None) != (largest is None):
        raise expected("--smallest, --largest", "both or neither", "one of them")
    start = eap.EdgeScores.load(scores)
    check_no_spans("start", start.graph)
    if out is not None:
        check_savable(out, start.graph)
    if smallest is None or largest is None:
        return start, None
    return start, sizes_between((smallest, largest), start.graph.n_edges, "--smallest, --largest")


def _show(ranking: EdgeScores, out: Path | None, top: int, as_json: bool) -> None:
    """Save a ranking, and show its strongest edges."""
    from ....report.tables import edge_table

    files: dict[str, str] = {}
    wrong = write(files, "scores", ranking.save, out)
    table = edge_table(ranking, None, top)
    if as_json:
        show_json({"info": ranking.info, "graph": ranking.graph.to_dict(), "edges": table.records(), "files": files})
    else:
        show_table(table)
    conclude(files, wrong, as_json)
