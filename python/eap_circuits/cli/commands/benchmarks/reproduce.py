"""The command that repeats the comparison of the EAP-IG paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ... import options, session
from ...console import check_outputs, progress, say
from ...options import default, option


def reproduce(
    model: options.Model = "smollm2",
    tasks: Annotated[
        str | None,
        option(
            "Prompts",
            "Tasks of [bold]eap tasks[/bold], separated by commas.  " + default("all, or none with --data"),
        ),
    ] = None,
    data: Annotated[
        list[Path] | None, option("Prompts", "A file of your own prompt pairs, as one more task; can be repeated.")
    ] = None,
    align: options.Align = False,
    scored: Annotated[
        int, option("Prompts", "Pairs of each task to score edges on; the time grows with them.", min=1)
    ] = 4,
    n: Annotated[int, option("Prompts", "Other pairs to run circuits on.", "-n", min=1)] = 32,
    seed: options.Seed = 0,
    steps: Annotated[int, option("Scoring", "Steps of EAP-IG.", min=1)] = 5,
    draws: options.Draws = 3,
    checkpoint: options.Checkpoint = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[Path, option("Output", "Where to write; made if missing.", metavar="DIR")] = Path("."),
) -> None:
    """Compare EAP, EAP-IG and exact patching on a model: agreement, faithfulness, steps, and circuits across tasks.

    This repeats the comparison of Hanna et al. 2024 (arXiv 2403.17806). Exact patching runs the model once for every
    edge, which takes hours on a few cores and minutes on a GPU. Finished work is kept in DIR/reproduction, and the same
    command continues from there. It writes reproduction.md and, in DIR/reproduction, figures (.png, .pdf), tables
    (.csv) and results.json.

    Examples:

      eap reproduce --out results

      eap reproduce gpt2 --data pairs.csv --scored 8
    """
    from ....reproduction import Experiment, Settings, write_page
    from ....reproduction import reproduce as measure

    names, files = session.tasks_and_files(tasks, data, align)
    check_outputs(checkpoint)
    settings = Settings(scored=scored, pairs=n, seed=seed, steps=steps, draws=draws)
    folder = out / "reproduction"
    folder.mkdir(parents=True, exist_ok=True)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    experiments = [Experiment.from_task(name, tokenizer, settings) for name in names]
    experiments += [
        Experiment.from_data(name, prompts.load(loaded, tokenizer), settings) for name, prompts in files.items()
    ]
    results = measure(loaded, experiments, folder, settings, progress, checkpoint)
    for path in write_page(results, out):
        say(f"Wrote {path}.")
