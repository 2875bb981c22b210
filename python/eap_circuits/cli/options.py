"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SEEDS, number, one_of, whole
from .choices import help_text, names


def option(panel: str, text: str, *names: str, **limits: Any) -> Any:
    """An option: the panel of the help page that it stands in, its help text, and its names if not the argument's."""
    return typer.Option(*names, help=text, rich_help_panel=panel, **limits)


def among(values: Mapping[str, str], listed: bool = False) -> dict[str, Any]:
    """Of an option that takes one of these values, or with `listed` several with commas between: shells complete them,
    and others are refused before anything slow is imported."""

    def check(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None and values and not context.resilient_parsing:
            for each in value.split(",") if listed else [value]:
                one_of(parameter.opts[0], each, values)
        return value

    def complete(incomplete: str) -> list[tuple[str, str]]:
        before, comma, begun = incomplete.rpartition(",") if listed else ("", "", incomplete)
        return [(before + comma + name, text) for name, text in values.items() if name.startswith(begun)]

    return {"callback": check, "autocompletion": complete}


def chosen(panel: str, kind: str, before: str, after: str = "", scores: bool = False, **limits: Any) -> Any:
    """An option for an entry of a registry, which its help lists; `scores`: only for those that edges are scored by."""
    return option(panel, help_text(kind, before, after, scores), **{**among(names(kind, scores)), **limits})


def refused_by(check: Callable[[str, Any], object]) -> dict[str, Any]:
    """Of an option whose value, if there is one, this check of the library refuses, given the option's name."""

    def refuse(parameter: typer.CallbackParam, value: Any) -> Any:
        if value is not None:
            check(parameter.opts[0], value)
        return value

    return {"callback": refuse}


def _memory(name: str, value: str) -> None:
    from ..request import parse_bytes

    parse_bytes(value, name)


def within(wanted: str, least: float, most: float) -> dict[str, Any]:
    """Of an option that takes numbers of a range, which its `wanted` says."""
    return refused_by(lambda name, value: number(name, value, wanted, least, most))


POSITIVE = within("a positive number", 5e-324, 1e308)
SEEDED = refused_by(lambda name, value: whole(name, value, *SEEDS))


def default(text: str) -> str:
    """What a help text says of a default that is not a plain value."""
    return f"[dim]\\[default: {text}][/dim]"


Model = Annotated[str, typer.Argument(help="A Hugging Face name or folder, or [bold]smollm2[/bold], the demo model.")]
Device = Annotated[str | None, option("Model", "cpu, cuda, cuda:1 …  " + default("CUDA if there is a GPU"))]
Dtype = Annotated[
    str | None,
    option(
        "Model",
        "float32, bfloat16 or float16.  " + default("as the model was saved"),
        **among(dict.fromkeys(("float32", "bfloat16", "float16", "float64"), "")),
    ),
]
TrustRemoteCode = Annotated[
    bool,
    option(
        "Model",
        "Run Python code that comes with the model; it can do anything that you can.",
        "--trust-remote-code",
    ),
]

Task = Annotated[
    str | None, option("Prompts", "A task of [bold]eap tasks[/bold], such as ioi.", **among(names("tasks")))
]
Data = Annotated[
    Path | None,
    option(
        "Prompts",
        "Take prompt pairs from a file instead: .csv, .json, .jsonl, .parquet (also rows of MIB's datasets), "
        ".safetensors or .pt.",
    ),
]
Align = Annotated[
    bool,
    option(
        "Prompts",
        "With --data: also take pairs with different numbers of tokens; the corrupted prompt is read at the positions "
        "that match the clean prompt's.",
        "--align",
    ),
]
Number = Annotated[int, option("Prompts", "Prompt pairs of the task.", "-n", min=1)]
Seed = Annotated[int, option("Prompts", "Another seed gives other prompts of the task.", **SEEDED)]
Metric = Annotated[str | None, chosen("Prompts", "metrics", "What is measured.", "\n\n" + default("the task's own"))]

Method = Annotated[str, chosen("Scoring", "methods", "How edges are scored; docs/methods.md.")]
Steps = Annotated[int, option("Scoring", "Steps of integrated gradients.", min=1)]
Quadrature = Annotated[str, chosen("Scoring", "quadratures", "The points of these M steps on the path.")]
Heads = Annotated[
    str,
    option(
        "Scoring",
        "Keys and values per key/value head (kv, as in the model) or per query head (query, as in EAP-IG).",
        **among({"kv": "keys and values per key/value head", "query": "keys and values per query head"}),
    ),
]
Keep = Annotated[
    str | None,
    option(
        "Scoring",
        "What else to save with the scores, separated by commas: variance, examples, positions or positions-from-end, "
        "spans, neurons, within-heads.",
    ),
]
BySpan = Annotated[
    bool, option("Scoring", "Score and choose every edge at each span of the data apart (docs/spans.md).", "--by-span")
]
Rules = Annotated[
    str | None,
    chosen("Scoring", "rules", "What takes the gradient's place.", "\n\n" + default("nothing")),
]
Ablation = Annotated[str, chosen("Ablation", "ablations", "What an ablated edge carries.")]
ScoringAblation = Annotated[str, chosen("Ablation", "ablations", "What an ablated edge carries.", scores=True)]
AblationData = Annotated[
    Path | None,
    option(
        "Ablation",
        "A file whose clean prompts are used to compute means or learn constants.  " + default("the same prompts"),
    ),
]
BatchSize = Annotated[
    int | None,
    option("Model", "Examples per batch; results do not depend on it.  " + default("by tokens"), min=1),
]
Memory = Annotated[
    str | None,
    option(
        "Model",
        "Memory for the run besides the model, such as 8GiB.  " + default("half of what is free"),
        **refused_by(_memory),
    ),
]
Checkpoint = Annotated[
    Path | None,
    option(
        "Output",
        "A .safetensors file that is written after every batch, from which the same command goes on after an "
        "interruption.",
    ),
]

DryRun = Annotated[
    bool,
    option(
        "Scoring",
        "Only show the batches, memory and time that the run would take; --device may be another machine's.",
        "--dry-run",
    ),
]
NoWeights = Annotated[
    bool, option("Scoring", "With --dry-run: load only the model's configuration, whatever its size.", "--no-weights")
]
Gpus = Annotated[
    int | None, option("Scoring", "With --dry-run: how many GPUs share the model, its weights and its work.", min=1)
]

How = Annotated[str, chosen("Circuit", "selections", "How the circuit's edges are chosen.")]
Signed = Annotated[bool, option("Circuit", "Rank by the score itself, not by its absolute value.", "--signed")]
Confidence = Annotated[
    float | None,
    option(
        "Circuit",
        "Keep only edges whose sign agrees in at least this share of resamples, such as 0.95; needs scores with "
        "--keep.",
        min=0.5,
        max=1.0,
    ),
]
Baselines = Annotated[
    str,
    chosen(
        "Circuit",
        "baselines",
        "What else to measure at each size, separated by commas; or none.",
        **among({**names("baselines"), "none": "nothing else"}, listed=True),
    ),
]
Draws = Annotated[int, option("Circuit", "Random circuits of each size.", min=1)]

Top = Annotated[int, option("Output", "Edges to show.", min=0)]
Json = Annotated[bool, option("Output", "Print results as JSON instead of tables.", "--json")]
