"""The command that compares what circuits the methods find, and at what cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ... import options, session
from ...console import progress, say
from ...options import default, option


def leaderboard(
    model: options.Model = "smollm2",
    tasks: Annotated[
        str | None,
        option(
            "Prompts", "Tasks of [bold]eap tasks[/bold], separated by commas.  " + default("all, or none with --data")
        ),
    ] = None,
    data: Annotated[
        list[Path] | None, option("Prompts", "A file of your own prompt pairs, as one more task; can be repeated.")
    ] = None,
    align: options.Align = False,
    scored: Annotated[int, option("Prompts", "Pairs of each task to rank edges on.", min=1)] = 16,
    n: Annotated[int, option("Prompts", "Other pairs to run circuits on.", "-n", min=1)] = 24,
    seeds: Annotated[int, option("Prompts", "Seeds of the pairs and of learning: 0, 1, and so on.", min=1)] = 3,
    methods: Annotated[
        str | None,
        option(
            "Scoring",
            "Methods of [bold]eap attribute[/bold], [bold]learned[/bold], [bold]pruned[/bold], "
            "[bold]pruned-learned[/bold], [bold]ibcircuit[/bold]; commas between.  "
            + default("all but exact, eap-conductance and ibcircuit"),
        ),
    ] = None,
    steps: Annotated[int, option("Scoring", "Steps of learning.", min=1)] = 200,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    out: Annotated[Path, option("Output", "Where to write; made if missing.", metavar="DIR")] = Path("."),
) -> None:
    """Rank methods by the circuits that they find on tasks: size at a faithfulness, CPR, CMD, and cost.

    Edges are ranked on some pairs of a task, and circuits run on others, for several seeds. Finished work is kept in
    DIR/leaderboard, and the same command continues from there, also with other tasks, methods or seeds. It writes
    leaderboard.md and, in DIR/leaderboard, figures (.png, .pdf) and leaderboard.json. All tasks take hours on a few
    cores.

    Examples:

      eap leaderboard --out results

      eap leaderboard gpt2 --tasks ioi --methods eap,learned --seeds 1
    """
    from ....errors import one_of
    from ....leaderboard import RANKINGS, Settings, of_pairs, of_task, write_page
    from ....leaderboard import leaderboard as measure

    names, files = session.tasks_and_files(tasks, data, align)
    rankings = {"rankings": methods.split(",")} if methods else {}
    for name in rankings.get("rankings", ()):
        one_of("--methods", name, RANKINGS)
    settings = Settings(scored=scored, pairs=n, seeds=tuple(range(seeds)), steps=steps)
    folder = out / "leaderboard"
    folder.mkdir(parents=True, exist_ok=True)

    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    pairs = {name: of_task(name, tokenizer, settings) for name in names}
    for name, prompts in files.items():
        pairs[name] = of_pairs(name, prompts.load(loaded, tokenizer), settings)
    results = measure(loaded, pairs, folder, settings=settings, watch=progress, **rankings)
    for path in write_page(results, out):
        say(f"Wrote {path}.")
