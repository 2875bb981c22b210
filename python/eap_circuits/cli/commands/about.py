"""The commands that show what is there, and what it can do: tasks, check, tune, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .. import options, session
from ..choices import described, registries
from ..console import check_outputs, check_suffix, say, show_json, show_table, working


def tasks(
    name: Annotated[str | None, typer.Argument(help="Show prompts of this task.")] = None,
    tokenizer: Annotated[str, typer.Option(help="Make the prompts for this model's tokenizer.")] = "smollm2",
    n: Annotated[int, typer.Option("-n", help="Prompt pairs.", min=1)] = 5,
    seed: Annotated[int, typer.Option(help="Another seed gives other prompts.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Save the prompt pairs as tokens (.safetensors).")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List the tasks that come with the package, or show and save the prompts of one task.

    A task makes pairs of a clean and a corrupted prompt of equal length, with the answers that its metric compares.

    Examples:

      eap tasks

      eap tasks ioi --tokenizer gpt2 -n 64 -o ioi.safetensors
    """
    from ...errors import expected, one_of
    from ...report.table import Column, Table
    from ...tasks import TASKS

    check_outputs(out)
    check_suffix(out, ".safetensors")
    if name is None:
        if out is not None:
            raise expected("--out", "a task whose prompts to save", "no task")
        columns: tuple[Column, ...] = (
            Column("name", "task"),
            Column("metric", "metric"),
            Column("description", "description"),
        )
        rows = tuple((task.name, task.metric, task.description) for task in TASKS.values())
        table = Table("Tasks", columns, rows)
    else:
        one_of("task", name, TASKS)
        from ...adapters import pretrained

        loaded = pretrained.load_tokenizer(tokenizer)
        pairs = session.Prompts(name, None, n, seed).load(None, loaded)
        if out is not None:
            pairs.save(out)
        columns = (
            Column("clean", "clean"),
            Column("corrupted", "corrupted"),
            Column("good", "good", _few),
            Column("bad", "bad", _few),
        )
        prompts = zip(pairs.prompts or (), pairs.answers.tolist(), strict=False)
        shown = tuple((*texts, *(_decoded(loaded, ids) for ids in answers)) for texts, answers in prompts)
        table = Table(f"{name}: {len(pairs)} prompt pairs", columns, shown)
    if as_json:
        show_json(table.records())
        return
    show_table(table)
    if out is not None:
        say(f"Wrote {out}.")


def _decoded(tokenizer: Any, ids: int | list[int]) -> list[str]:
    """The texts of an answer, or of a set of answers padded with -1."""
    return [tokenizer.decode([token]) for token in (ids if isinstance(ids, list) else [ids]) if token >= 0]


def _few(texts: list[str]) -> str:
    """At most three texts, quoted so that their spaces show."""
    shown = ", ".join(map(repr, texts[:3]))
    return shown if len(texts) <= 3 else f"{shown} … ({len(texts)})"


def check(
    model: options.Model,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Check that the package reads a model correctly: contributions add up, and circuits agree with the model.

    Run it once for a new architecture. The exit code is 1 if a check fails.

    Examples:

      eap check smollm2

      eap check meta-llama/Llama-3.2-1B --dtype bfloat16
    """
    from ...report.table import Column, Table
    from ...selfcheck import check_model

    loaded, _ = session.load_model(model, dtype, device, trust_remote_code=trust_remote_code)
    with working("Checking …"):
        checks = check_model(loaded)
    columns = (
        Column("passed", "", lambda passed: "✓" if passed else "✗"),
        Column("name", "check"),
        Column("detail", "found"),
    )
    table = Table(f"Checks of {model}", columns, tuple((c.passed, c.name, c.detail) for c in checks))
    failed = sum(not c.passed for c in checks)
    if as_json:
        show_json(table.records())
    else:
        show_table(table)
        say(f"{failed} of {len(checks)} checks failed." if failed else f"All {len(checks)} checks passed.")
    if failed:
        raise typer.Exit(1)


def tune(
    device: options.Device = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what is stored.")] = False,
) -> None:
    """Measure which kernels are right and fastest on this machine, and store the choice for all later runs.

    On a GPU the first run does the same for its own dtype. By default every kind of GPU is measured, or the CPU where
    there is none; on a CPU only bfloat16, since the choice in float32 is known. Kernels run in a process of their own,
    and one that is wrong, hangs or crashes is left out. EAP_CACHE names another folder for the choice.

    Examples:

      eap tune

      EAP_CACHE=/shared/cache eap tune --device cuda:0
    """
    from eap_kernels.tune.devices import tune as measured

    from ...errors import InputError

    try:
        with working("Measuring …"):
            lines = list(measured([] if device is None else [device], again))
    except RuntimeError as error:
        raise InputError(str(error)) from error
    for line in lines:
        say(line)


def info() -> None:
    """Show what a bug report needs: versions, compiled backends, what is missing, and the choices.

    Examples:

      eap info

      eap info > info.txt
    """
    from eap_kernels.info import facts

    from ...report.tables import installed

    pairs = {**facts(), **{name: installed(name) for name in ("transformers", "matplotlib", "gguf")}}
    pairs |= {kind: ", ".join(described(kind)) for kind in registries()}
    width = max(map(len, pairs))
    for name, value in pairs.items():
        say(f"{name:<{width}}  {value}")
