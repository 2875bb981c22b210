"""eap evaluate and eap curve: run circuits."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .. import options, session
from ..console import check_outputs, check_suffix, conclude, progress, say, show_json, show_table, write_with_report
from ..options import default, option


def evaluate(
    model: options.Model,
    circuit: Annotated[Path, typer.Argument(help="A circuit: .json, .pt or .safetensors.")],
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    ablation: options.Ablation = "patching",
    ablation_data: options.AblationData = None,
    batch_size: options.BatchSize = None,
    memory: options.Memory = None,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Run a circuit with every other edge ablated, and measure how much of the model's behaviour it keeps.

    Faithfulness is 1 if the circuit scores like the whole model, and 0 if it scores like the model with all edges
    ablated: under patching, like the model on the corrupted prompts.

    Examples:

      eap evaluate smollm2 circuit.json --task ioi

      eap evaluate gpt2 circuit.json --data held-out.csv --json
    """
    import eap_circuits as eap

    from ...report.tables import result_table

    check_outputs(checkpoint)
    prompts = session.Prompts(task, data, n, seed, align, ablation_data, ablation)
    prompts.check(metric)
    kept = eap.Circuit.load(circuit)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    pairs = prompts.load(loaded, tokenizer)
    with progress("Running the circuit") as bar:
        result = eap.evaluate(
            loaded,
            kept,
            pairs,
            metric=metric,
            ablation=ablation,
            batch_size=batch_size,
            memory=memory,
            checkpoint=checkpoint,
            progress=bar,
            ablation_data=prompts.load_ablation(loaded, tokenizer),
        )
    if as_json:
        names = ("faithfulness", "mean", "clean", "corrupted", "values")
        numbers = {name: getattr(result, name) for name in names}
        asked = {"metric": metric or pairs.metric, "ablation": ablation}
        show_json({"n_edges": kept.n_edges, **asked, "n_examples": len(pairs), **numbers, "info": result.info})
    else:
        show_table(result_table(result, kept))


def curve(
    model: options.Model,
    scores: Annotated[Path, typer.Argument(help="Scores that eap attribute -o saved.")],
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    metric: options.Metric = None,
    fractions: Annotated[
        str | None,
        option("Circuit", "Shares of all edges, separated by commas.  " + default("ten from 0.001 to 1")),
    ] = None,
    how: options.How = "top",
    signed: options.Signed = False,
    confidence: options.Confidence = None,
    baselines: options.Baselines = "random,complement",
    draws: options.Draws = 3,
    ablation: options.Ablation = "patching",
    ablation_data: options.AblationData = None,
    batch_size: options.BatchSize = None,
    memory: options.Memory = None,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[Path | None, option("Output", "Save the curve (.json).", "--out", "-o")] = None,
    html: Annotated[Path | None, option("Output", "Write a report (.html).")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure faithfulness by circuit size.

    Circuits of growing size are chosen by the scores and run on the prompts. CPR is the area under faithfulness over
    the share of edges, CMD the area between it and 1 (Mechanistic Interpretability Benchmark). For comparison, random
    circuits of the same sizes and each circuit's complement are run too.

    Examples:

      eap curve smollm2 scores.safetensors --task ioi -o curve.json --html report.html

      eap curve gpt2 scores.safetensors --data held-out.csv --fractions 0.001,0.01,0.1
    """
    import eap_circuits as eap

    from ...report import save_curve, smallest_faithful
    from ...report.tables import areas_line, curve_table

    check_outputs(out, html, checkpoint)
    check_suffix(out, ".json")
    check_suffix(html, ".html", ".htm")
    sizes = session.parse_fractions(fractions)
    beside = session.parse_baselines(baselines)
    prompts = session.Prompts(task, data, n, seed, align, ablation_data, ablation)
    prompts.check(metric)
    loaded_scores = eap.EdgeScores.load(scores)
    among = None if confidence is None else loaded_scores.confidence() >= confidence

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    pairs = prompts.load(loaded, tokenizer)
    with progress("Running circuits") as bar:
        measured = eap.faithfulness_curve(
            loaded,
            loaded_scores,
            pairs,
            sizes,
            metric=metric,
            how=how,
            signed=signed,
            ablation=ablation,
            ablation_data=prompts.load_ablation(loaded, tokenizer),
            batch_size=batch_size,
            memory=memory,
            checkpoint=checkpoint,
            progress=bar,
            baselines=beside,
            seeds=range(draws),
            among=among,
        )
    # What was measured is saved first, and shown before an error ends the command.
    files: dict[str, str] = {}

    def page(path: Path) -> None:
        from ...report import write_report

        chosen = measured.circuits[smallest_faithful(measured)]
        write_report(path, loaded_scores, chosen, measured, pairs, files={"scores": scores.name}, tokenizer=tokenizer)

    wrong = write_with_report(files, "curve", partial(save_curve, curve=measured), out, page, html)
    if as_json:
        show_json({**measured.to_dict(), "files": files})
    else:
        show_table(curve_table(measured))
        say(areas_line(measured))
    conclude(files, wrong, as_json)
