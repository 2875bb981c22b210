"""eap attribute: score edges, and choose a circuit by the scores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from .. import options, session
from ..console import (
    check_outputs,
    check_suffix,
    conclude,
    keep_elsewhere,
    outlived,
    progress,
    say,
    show_json,
    show_table,
    write,
)
from ..options import option


def attribute(
    model: options.Model,
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    method: options.Method = "eap-ig-inputs",
    steps: options.Steps = 5,
    quadrature: options.Quadrature = "right",
    heads: options.Heads = "kv",
    ablation: options.ScoringAblation = "patching",
    ablation_data: options.AblationData = None,
    batch_size: options.BatchSize = None,
    memory: options.Memory = None,
    dry_run: options.DryRun = False,
    no_weights: options.NoWeights = False,
    gpus: options.Gpus = None,
    only: Annotated[Path | None, option("Scoring", "With exact: measure only this circuit's edges.")] = None,
    checkpoint: options.Checkpoint = None,
    keep: options.Keep = None,
    by_span: options.BySpan = False,
    rules: options.Rules = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[
        Path | None, option("Output", "Save the scores (.safetensors, or EAP-IG's .json, .pt).", "--out", "-o")
    ] = None,
    edges: Annotated[
        int | None,
        option("Circuit", "Choose a circuit of exactly this many edges, all on paths from input to logits.", min=1),
    ] = None,
    how: options.How = "top",
    signed: options.Signed = False,
    confidence: options.Confidence = None,
    circuit: Annotated[Path | None, option("Circuit", "Save the circuit (.json, .pt or .safetensors).")] = None,
    top: options.Top = 20,
    as_json: options.Json = False,
) -> None:
    """Score every edge of a model on a task, and choose a circuit by the scores.

    A score says how much the metric is expected to fall if the edge carries the corrupted prompt's value. The strongest
    edges are shown; -o saves the scores, --edges chooses a circuit of the strongest edges and --circuit saves it.

    Examples:

      eap attribute smollm2 --task ioi -o scores.safetensors

      eap attribute gpt2 --data pairs.csv --steps 10 --edges 200 --circuit circuit.json
    """
    import eap_circuits as eap

    from ...adapters import bind
    from ...errors import InputError, expected
    from ...formats import SUFFIXES, check_savable
    from ...methods import METHODS, check_method
    from ...report.tables import edge_table, plan_table

    check_outputs(out, circuit, checkpoint)
    for path in (out, circuit):
        check_suffix(path, *(SUFFIXES[:1] if by_span else SUFFIXES))
    for name, needs in (("--circuit", circuit is not None), ("--confidence", confidence is not None)):
        if needs and edges is None:
            raise expected(name, "--edges with it, the size of the circuit", "no --edges")
    for name, needs in (("--no-weights", no_weights), ("--gpus", bool(gpus))):
        if needs and not dry_run:
            raise expected(name, "--dry-run with it", "no --dry-run")
    kept = session.to_keep(keep, confidence, by_span)
    check_method(method, steps, quadrature, ablation, kept, rules, only is not None, dry_run)
    measured = None if only is None else eap.Circuit.load(only)
    prompts = session.Prompts(task, data, n, seed, align, ablation_data, ablation)
    prompts.check(metric, gradient=METHODS[method].backward)

    loaded, tokenizer = session.load_model(model, dtype, None if dry_run else device, not no_weights, trust_remote_code)
    if not dry_run:
        graph = bind(loaded).graph(heads)  # type: ignore[arg-type]
        if edges is not None and edges > graph.n_edges and not by_span:
            raise expected("--edges", f"1 to {graph.n_edges:,}, the edges that the model has", f"{edges:,}")
        for path in filter(None, (out, circuit)):
            check_savable(path, graph)
    pairs = prompts.load(loaded, tokenizer)
    asked: dict[str, Any] = {
        "metric": metric,
        "method": method,
        "steps": steps,
        "quadrature": quadrature,
        "heads": heads,
        "ablation": ablation,
        "ablation_data": prompts.load_ablation(loaded, tokenizer),
        "batch_size": batch_size,
        "memory": memory,
        "keep": kept,
        "rules": rules,
    }
    if dry_run:
        plan = eap.plan(loaded, pairs, **asked, device=device, gpus=gpus or 1)
        show_json(asdict(plan)) if as_json else show_table(plan_table(plan))
        return
    with progress("Scoring edges") as bar:
        scores = eap.attribute(loaded, pairs, progress=bar, edges=measured, checkpoint=checkpoint, **asked)
    scores = scores.by_span() if by_span else scores
    # What was scored is saved first, and shown before an error ends the command.
    files: dict[str, str] = {}
    wrong = write(files, "scores", scores.save, out)
    chosen = None
    try:
        if edges is not None:
            with outlived("scores", scores.save, out):
                among = None if confidence is None else scores.confidence() >= confidence
                chosen = scores.select(edges, how, signed, among=among, exactly=True)
            wrong += write(files, "circuit", chosen.save, circuit)
    except InputError as error:
        wrong += [str(error), *([] if out else keep_elsewhere("scores", scores.save))]
    table = edge_table(scores, chosen, top)
    if as_json:
        found: dict[str, Any] = {"info": scores.info, "graph": scores.graph.to_dict(), "edges": table.records()}
        if chosen is not None:
            found["circuit"] = {"n_edges": chosen.n_edges, "n_nodes": len(chosen.nodes)}
        show_json({**found, "files": files})
    else:
        show_table(table)
        if chosen is not None:
            say(f"Circuit: {chosen.n_edges:,} of {chosen.graph.n_edges:,} edges, {len(chosen.nodes):,} nodes.")
    conclude(files, wrong, as_json)
