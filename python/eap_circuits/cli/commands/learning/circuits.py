"""eap acdc, eap refine: remove or swap edges as long as the circuit does not get worse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ... import options, session
from ...console import check_outputs, check_suffix, conclude, progress, say, show_json, write
from ...options import POSITIVE, option

if TYPE_CHECKING:
    from ....graph import Circuit

_Out = Annotated[
    Path | None, option("Output", "Save the circuit (.safetensors, or EAP-IG's .json, .pt).", "--out", "-o")
]


def acdc(
    model: options.Model,
    threshold: Annotated[
        float, typer.Argument(help="How much an edge must matter to stay, in units of the metric.", **POSITIVE)
    ],
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    heads: options.Heads = "kv",
    ablation: options.ScoringAblation = "patching",
    ablation_data: options.AblationData = None,
    memory: options.Memory = None,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: _Out = None,
    as_json: options.Json = False,
) -> None:
    """Find the circuit of ACDC: edges go, from the last to the first, if the circuit is hardly worse without them.

    Each edge costs a run of a circuit on all prompts, so few prompts and a checkpoint are a good start.

    Examples:

      eap acdc smollm2 0.01 --task ioi -n 8 --metric kl_divergence -o circuit.json --checkpoint acdc.safetensors

      eap acdc gpt2 0.05 --data pairs.csv -o circuit.json
    """
    import eap_circuits as eap

    from ....adapters import bind
    from ....formats import SUFFIXES, check_savable

    check_outputs(out, checkpoint)
    check_suffix(out, *SUFFIXES)
    prompts = session.Prompts(task, data, n, seed, align, ablation_data, ablation)
    prompts.check(metric)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    if out is not None:
        check_savable(out, bind(loaded).graph(heads))  # type: ignore[arg-type]
    pairs = prompts.load(loaded, tokenizer)
    with progress("Deciding on edges") as bar:
        found = eap.acdc(
            loaded,
            pairs,
            threshold,
            metric,
            heads=heads,  # type: ignore[arg-type]
            ablation=ablation,
            ablation_data=prompts.load_ablation(loaded, tokenizer),
            memory=memory,
            progress=bar,
            checkpoint=checkpoint,
        )
    ran = found.info["acdc"]
    _show(found, f"({ran['circuits']} circuits in {ran['passes']} passes)", out, as_json)


def refine(
    model: options.Model,
    circuit: Annotated[Path, typer.Argument(help="A circuit, such as eap attribute --circuit saved.")],
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    rounds: Annotated[int, option("Refining", "Rounds at most.", min=1)] = 10,
    candidates: Annotated[int, option("Refining", "Edges of either kind that run alone.", min=1)] = 16,
    ablation: options.ScoringAblation = "patching",
    ablation_data: options.AblationData = None,
    memory: options.Memory = None,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: _Out = None,
    as_json: options.Json = False,
) -> None:
    """Swap edges of a circuit for others as long as its metric comes nearer to the model's; its size stays.

    The gradient of the circuit's mask proposes swaps, and runs of the circuits decide. eap evaluate measures the
    circuit, best on other prompts.

    Examples:

      eap refine smollm2 circuit.json --task ioi -n 16 -o refined.json

      eap refine gpt2 circuit.json --data pairs.csv --rounds 20 -o refined.json
    """
    import eap_circuits as eap

    from ....formats import SUFFIXES, check_savable
    from ....request import check_no_spans

    check_outputs(out, checkpoint)
    check_suffix(out, *SUFFIXES)
    prompts = session.Prompts(task, data, n, seed, align, ablation_data, ablation)
    prompts.check(metric, gradient=True)
    start = eap.Circuit.load(circuit)
    check_no_spans("circuit", start.graph)
    if out is not None:
        check_savable(out, start.graph)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    pairs = prompts.load(loaded, tokenizer)
    with progress("Refining") as bar:
        found = eap.refine(
            loaded,
            start,
            pairs,
            metric,
            rounds=rounds,
            candidates=candidates,
            ablation=ablation,
            ablation_data=prompts.load_ablation(loaded, tokenizer),
            memory=memory,
            progress=bar,
            checkpoint=checkpoint,
        )
    ran = found.info["refining"]
    nearer = f"{ran['before']:.4g} from the model before, {ran['after']:.4g} now"
    _show(found, f"({nearer}; {ran['circuits']} circuits ran)", out, as_json)


def _show(circuit: Circuit, said: str, out: Path | None, as_json: bool) -> None:
    """Save a circuit, and say how large it is, and more of it."""

    files: dict[str, str] = {}
    wrong = write(files, "circuit", circuit.save, out)
    if as_json:
        edges = [list(edge) for edge in circuit.edges]
        show_json({"n_edges": circuit.n_edges, "edges": edges, "info": circuit.info, "files": files})
    else:
        say(f"{circuit.n_edges} of {circuit.graph.n_edges} edges are left {said}.")
    conclude(files, wrong, as_json)
