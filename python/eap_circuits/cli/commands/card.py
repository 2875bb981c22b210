"""eap card: what there is to know of a circuit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options, session
from ..console import check_outputs, check_suffix, conclude, progress, say, show_json, show_table, write_with_report
from ..options import option


def card(
    model: options.Model,
    circuit: Annotated[Path, typer.Argument(help="A circuit: .json, .pt or .safetensors.")],
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    other: Annotated[
        list[Path] | None,
        option("Prompts", "A file of other prompts, such as another template; may be given several times."),
    ] = None,
    metric: options.Metric = None,
    scores: Annotated[
        Path | None,
        option("Circuit", "The scores that chose the circuit, saved with --keep examples, to choose it again by."),
    ] = None,
    resamples: Annotated[int, option("Circuit", "Resamples of the pairs that were scored.", min=1)] = 10,
    draws: options.Draws = 3,
    most_edges: Annotated[int, option("Circuit", "Edges to leave out, one at a time.", min=0)] = 100,
    ablation: options.Ablation = "patching",
    ablation_data: options.AblationData = None,
    batch_size: options.BatchSize = None,
    memory: options.Memory = None,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[Path | None, option("Output", "Save the card (.json).", "--out", "-o")] = None,
    html: Annotated[Path | None, option("Output", "Write a report with the card (.html).")] = None,
    as_json: options.Json = False,
) -> None:
    """Say what there is to know of a circuit before it is believed.

    Faithfulness on these prompts and on others; of circuits that resamples of the scored pairs choose, of random
    circuits and of all other edges; and what the circuit loses without each of its edges. Measure on other prompts than
    the circuit was chosen by.

    Examples:

      eap card smollm2 circuit.json --task ioi --seed 1 --scores scores.safetensors

      eap card gpt2 circuit.json --data held-out.csv --other template.csv --html card.html
    """
    import eap_circuits as eap

    from ...cards import check_chosen
    from ...errors import expected
    from ...files import write_json
    from ...report.curves import jsonable
    from ...report.tables import card_line, card_table, cost_table

    check_outputs(out, html, checkpoint)
    check_suffix(out, ".json")
    check_suffix(html, ".html", ".htm")
    # --align may be meant for the other prompts.
    prompts = session.Prompts(task, data, n, seed, align and not (other and data is None), ablation_data, ablation)
    prompts.check(metric)
    elsewhere = {path.stem: session.Prompts(None, path, align=align) for path in other or ()}
    if len(elsewhere) < len(other or ()):
        raise expected("--other", "files of different names", ", ".join(str(path) for path in other or ()))
    for each in elsewhere.values():
        each.check()
    kept = eap.Circuit.load(circuit)
    chosen_by = None if scores is None else eap.EdgeScores.load(scores)
    if chosen_by is not None:
        check_chosen(kept, chosen_by)
    shown = chosen_by
    if shown is None and kept.values is not None:
        shown = eap.EdgeScores(kept.graph, kept.values, kept.info)
    if html is not None and shown is None:
        raise expected("--html", "--scores with it, as the circuit's file has none", "none")

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    pairs = prompts.load(loaded, tokenizer)
    with progress("Running circuits") as bar:
        found = eap.faithfulness_card(
            loaded,
            kept,
            pairs,
            chosen_by,
            others={name: each.load(loaded, tokenizer) for name, each in elsewhere.items()},
            metric=metric,
            ablation=ablation,
            ablation_data=prompts.load_ablation(loaded, tokenizer),
            resamples=resamples,
            seeds=range(draws),
            most_edges=most_edges,
            batch_size=batch_size,
            memory=memory,
            progress=bar,
            checkpoint=checkpoint,
        )
    files: dict[str, str] = {}

    def save(path: Path) -> None:
        write_json(path, jsonable(found.to_dict()), indent=2)

    def page(path: Path) -> None:
        from ...report import write_report

        assert shown is not None
        named = {"scores": (scores or circuit).name, "circuit": circuit.name}
        write_report(path, shown, kept, None, pairs, files=named, tokenizer=tokenizer, card=found)

    wrong = write_with_report(files, "card", save, out, page, html)
    if as_json:
        show_json({**found.to_dict(), "files": files})
    else:
        show_table(card_table(found))
        if found.cost:
            show_table(cost_table(found))
        say(card_line(found))
    conclude(files, wrong, as_json)
