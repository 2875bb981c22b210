"""eap data: what prompt pairs hold, and what a model makes of them."""

from __future__ import annotations

from dataclasses import asdict

from .. import options, session
from ..console import progress, show_json, show_table


def data(
    model: options.Model,
    task: options.Task = None,
    data: options.Data = None,
    align: options.Align = False,
    n: options.Number = 64,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    memory: options.Memory = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Show what prompt pairs hold: lengths, repeats, and the probabilities that the model gives to their answers.

    Both prompts of each pair run once, and nothing is scored. Look at this first if the pairs are your own.

    Examples:

      eap data smollm2 --task gender-bias -n 500

      eap data gpt2 --data pairs.csv
    """
    from ...evaluation import summarise
    from ...report.tables import Column, Table

    prompts = session.Prompts(task, data, n, seed, align)
    prompts.check()
    loaded, tokenizer = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    pairs = prompts.load(loaded, tokenizer)
    with progress("Running prompts") as bar:
        found = summarise(loaded, pairs, batch_size=batch_size, memory=memory, progress=bar)
    if as_json:
        show_json(asdict(found))
        return
    rows: tuple[tuple[str, str], ...] = (
        ("pairs", str(found.pairs)),
        ("different pairs", str(found.different)),
        ("corrupted prompt is the clean one", str(found.equal)),
        ("tokens of clean prompts", " to ".join(map(str, found.tokens))),
        ("tokens of corrupted prompts", " to ".join(map(str, found.corrupted_tokens))),
    )
    if found.good is not None:
        rows += (
            ("P(good) after clean prompts", f"{found.good:.3g}"),
            ("P(bad) after clean prompts", f"{found.bad:.3g}"),
            ("P(good) after corrupted prompts", f"{found.corrupted_good:.3g}"),
            ("P(bad) after corrupted prompts", f"{found.corrupted_bad:.3g}"),
            ("model prefers the bad answer", str(found.prefers_bad)),
            ("corrupted prompt hardly changes the odds", str(found.alike)),
        )
    show_table(Table(f"{found.name} with {model}", (Column("what", ""), Column("found", "", numeric=True)), rows))
