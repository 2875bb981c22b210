"""eap mib: a submission to the leaderboard of the Mechanistic Interpretability Benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ... import options, session
from ...console import check_outputs, check_suffix, keep_elsewhere, progress, say, show_json, show_table, write
from ...options import among, option

_FILE = "rows of the benchmark: .json, .jsonl or .parquet"
_LEVELS = {
    "edge": "edges, with keys and values of each query head; .json",
    "node": "heads and MLPs; .json",
    "neuron": "dimensions of what each head and MLP writes to the residual stream; .pt, and not measured here",
}


def mib(
    model: options.Model,
    entry: Annotated[str, typer.Argument(help="What the benchmark calls task and model, such as ioi_gpt2.")],
    data: Annotated[Path, option("Prompts", f"Score edges on these {_FILE}.")],
    validation: Annotated[Path, option("Prompts", f"Run circuits on these {_FILE}.")],
    n: Annotated[int, option("Prompts", "Pairs to score edges on, the first ones.", "-n", min=1)] = 100,
    level: Annotated[str, option("Scoring", "What is scored: edge, node or neuron.", **among(_LEVELS))] = "edge",
    method: options.Method = "eap-ig-inputs",
    steps: options.Steps = 5,
    quadrature: options.Quadrature = "right",
    ablation: options.ScoringAblation = "patching",
    batch_size: options.BatchSize = None,
    memory: options.Memory = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[Path, option("Output", "Where the submission is made.", metavar="DIR")] = Path("circuits"),
    as_json: options.Json = False,
) -> None:
    """Score a model for the circuit track of MIB (arXiv 2504.13151), write its submission, and measure CPR and CMD.

    It writes DIR/METHOD_ABLATION_LEVEL/ENTRY/importances.json, which the benchmark's run_evaluation.py reads with
    --circuit-dir DIR, and its leaderboard in a repository of the hub: DIR/METHOD_ABLATION_LEVEL is what to upload, with
    two tasks and two models or more in it. Scores are of edges, with keys and values of each query head; of nodes; or
    of neurons, in importances.pt, which that script reads with --circuit-files, and only it measures.

    CPR takes the highest scores first, CMD the highest absolute scores, both under patching, as the benchmark does. It
    keeps edges that lead nowhere, so that its counts of edges are a little higher; what circuits do is the same.

    Examples:

      eap mib gpt2 ioi_gpt2 --data train.parquet --validation validation.parquet --level node
    """
    import eap_circuits as eap

    from ....adapters import bind
    from ....errors import InputError, expected, one_of
    from ....files import check_file
    from ....formats import check_savable
    from ....methods import METHODS, check_method
    from ....report.tables import curve_table
    from ....tasks import MIB_ENTRIES, MIB_MODELS, mib_tasks, read_file

    one_of("ENTRY", entry, MIB_ENTRIES)
    task, name = entry.split("_")
    rows = []
    for label, path in (("--data", data), ("--validation", validation)):
        check_file(path, f"{label} {path}")
        check_suffix(path, ".json", ".jsonl", ".parquet")
        rows.append(read_file(path))
        if task not in (found := mib_tasks(rows[-1])):
            raise expected(f"{label} {path}", f"rows of {task}", f"rows of {' or '.join(found)}")
    keep = "neurons" if level == "neuron" else None
    check_method(method, steps, quadrature, ablation, keep, None)
    if level != "edge" and not METHODS[method].backward:
        raise expected("--method", f"a gradient method with --level {level}, whose edges add up to nodes", method)
    file = out / f"{method}_{ablation}_{level}" / entry / ("importances.pt" if keep else "importances.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    check_outputs(file)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    graph = bind(loaded).graph("query")
    layers, heads = MIB_MODELS[name]
    if graph.n_heads != (heads,) * layers:
        number = " or ".join(map(str, sorted({*graph.n_heads})))
        wanted = f"{name} of the benchmark, {layers} layers of {heads} heads"
        raise expected(model, wanted, f"{graph.n_layers} layers of {number}")
    check_savable(file, graph)
    scored, held_out = (eap.PairedDataset.from_mib(each, tokenizer) for each in rows)
    asked: dict[str, Any] = {"batch_size": batch_size, "memory": memory}
    with progress("Scoring edges") as bar:
        scores = eap.attribute(
            loaded,
            scored[:n],
            method=method,
            steps=steps,
            quadrature=quadrature,
            heads="query",
            ablation=ablation,
            keep=keep,
            progress=bar,
            **asked,
        )
    files: dict[str, str] = {}
    ranked = scores if level == "edge" else scores.node_scores()
    wrong = write(files, "scores", ranked.save, file)
    if wrong:
        raise InputError(" ".join([*wrong, *keep_elsewhere("scores", scores.save)]))
    if level == "neuron":
        if as_json:
            show_json({"entry": entry, "files": files})
        else:
            say(f"Wrote {file}.")
        return
    with progress("Running circuits") as bar:
        signed, absolute = (
            eap.faithfulness_curve(loaded, ranked, held_out, signed=signed, progress=bar, **asked)
            for signed in (True, False)
        )
    if as_json:
        curves = {"signed": signed.to_dict(), "absolute": absolute.to_dict()}
        show_json({"entry": entry, "cpr": signed.cpr, "cmd": absolute.cmd, "curves": curves, "files": files})
        return
    for curve in (signed, absolute):
        show_table(curve_table(curve))
    say(f"CPR {signed.cpr:.4f} (first table, by the score), CMD {absolute.cmd:.4f} (second, by its absolute value).")
    say(f"Wrote {file}.")
