"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .choices import help_text

MODEL_HELP = "A Hugging Face name or folder, or [bold]smollm2[/bold], the demo model."

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 …  [dim]\\[default: CUDA if there is a GPU][/dim]", rich_help_panel="Model"),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16.  [dim]\\[default: as the model was saved][/dim]",
        rich_help_panel="Model",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model; it can do anything that you can.",
        rich_help_panel="Model",
    ),
]

Task = Annotated[
    str | None, typer.Option(help="A task of [bold]eap tasks[/bold], such as ioi.", rich_help_panel="Prompts")
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Take prompt pairs from a file instead: .csv, .json, .jsonl, .parquet (also rows of MIB's datasets), "
        ".safetensors or .pt.",
        rich_help_panel="Prompts",
    ),
]
Align = Annotated[
    bool,
    typer.Option(
        "--align",
        help="With --data: also take pairs with different numbers of tokens; the corrupted prompt is read at the "
        "positions that match the clean prompt's.",
        rich_help_panel="Prompts",
    ),
]
Number = Annotated[int, typer.Option("-n", help="Prompt pairs of the task.", min=1, rich_help_panel="Prompts")]
Seed = Annotated[int, typer.Option(help="Another seed gives other prompts of the task.", rich_help_panel="Prompts")]
Metric = Annotated[
    str | None,
    typer.Option(
        help=help_text("metrics", "What is measured.", "\n\n[dim]\\[default: the task's own][/dim]"),
        rich_help_panel="Prompts",
    ),
]

Method = Annotated[
    str,
    typer.Option(
        help=help_text("methods", "How edges are scored; docs/methods.md."),
        rich_help_panel="Scoring",
    ),
]
Steps = Annotated[int, typer.Option(help="Steps of integrated gradients.", min=1, rich_help_panel="Scoring")]
Quadrature = Annotated[
    str,
    typer.Option(
        help=help_text("quadratures", "The points of these M steps on the path."),
        rich_help_panel="Scoring",
    ),
]
Heads = Annotated[
    str,
    typer.Option(
        help="Keys and values per key/value head (kv, as in the model) or per query head (query, as in EAP-IG).",
        rich_help_panel="Scoring",
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(
        help="What else to save with the scores, separated by commas: variance, examples, positions or "
        "positions-from-end, neurons.",
        rich_help_panel="Scoring",
    ),
]
Rules = Annotated[
    str | None,
    typer.Option(
        help=help_text("rules", "What takes the gradient's place.", "\n\n[dim]\\[default: nothing][/dim]"),
        rich_help_panel="Scoring",
    ),
]
Ablation = Annotated[
    str,
    typer.Option(
        help=help_text("ablations", "What an ablated edge carries."),
        rich_help_panel="Ablation",
    ),
]
AblationData = Annotated[
    Path | None,
    typer.Option(
        help="A file whose clean prompts are used to compute means or learn constants.  "
        "[dim]\\[default: the same prompts][/dim]",
        rich_help_panel="Ablation",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        help="Examples per batch; results do not depend on it.  [dim]\\[default: by tokens][/dim]",
        min=1,
        rich_help_panel="Model",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory for the run besides the model, such as 8GiB.  [dim]\\[default: half of what is free][/dim]",
        rich_help_panel="Model",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        help="A .safetensors file that is written after every batch, from which the same command goes on after an "
        "interruption.",
        rich_help_panel="Output",
    ),
]

How = Annotated[
    str,
    typer.Option(
        help=help_text("selections", "How the circuit's edges are chosen."),
        rich_help_panel="Circuit",
    ),
]
Signed = Annotated[
    bool,
    typer.Option("--signed", help="Rank by the score itself, not by its absolute value.", rich_help_panel="Circuit"),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        help="Keep only edges whose sign agrees in at least this share of resamples, such as 0.95; needs scores with "
        "--keep.",
        min=0.5,
        max=1.0,
        rich_help_panel="Circuit",
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print results as JSON instead of tables.", rich_help_panel="Output"),
]
Top = Annotated[int, typer.Option(help="Edges to show.", min=0, rich_help_panel="Output")]

Baselines = Annotated[
    str,
    typer.Option(
        help=help_text("baselines", "What else to measure at each size, separated by commas; or none."),
        rich_help_panel="Circuit",
    ),
]
Draws = Annotated[int, typer.Option(help="Random circuits of each size.", min=1, rich_help_panel="Circuit")]
