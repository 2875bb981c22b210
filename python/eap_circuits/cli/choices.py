"""What there is to choose from: the registries' entries, for help texts, `eap info` and tables in the docs.

The registries import torch, which help must not wait for: `python -m docs.documents` writes what it shows to
choices.json, and a test compares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
_IN_PYTHON, _TO_EVALUATE = " (in Python only)", " (to evaluate only)"


def registries() -> dict[str, dict[str, Any]]:
    """The registries by what their entries are; each entry has a name and a description."""
    from ..evaluation import BASELINES
    from ..graph import SELECTIONS
    from ..learning import GATES
    from ..methods import METHODS, QUADRATURES
    from ..metrics import METRICS
    from ..recording import ABLATIONS, RULES
    from ..tasks import TASKS

    return {
        "tasks": TASKS,
        "methods": METHODS,
        "quadratures": QUADRATURES,
        "rules": RULES,
        "metrics": METRICS,
        "ablations": ABLATIONS,
        "selections": SELECTIONS,
        "baselines": BASELINES,
        "gates": GATES,
    }


def described(kind: str) -> dict[str, str]:
    """Descriptions by name; the name says what an entry is not for, or that it may change."""
    return {f"{name}{_mark(kind, entry)}": entry.description for name, entry in registries()[kind].items()}


def _mark(kind: str, entry: Any) -> str:
    if kind == "methods" and entry.tier != "stable":
        return f" ({entry.tier})"
    if (kind == "metrics" and not entry.differentiable) or (kind == "ablations" and entry.learned):
        return _TO_EVALUATE
    return _IN_PYTHON if kind == "selections" and entry.choose is None else ""


def content() -> str:
    """What choices.json holds."""
    return json.dumps({kind: described(kind) for kind in registries()}, indent=1, ensure_ascii=False) + "\n"


def written(kind: str, scores: bool = False) -> dict[str, str]:
    """What choices.json says; nothing of a new kind, which is not yet in it. `scores`: only of what edges are scored
    by, too."""
    entries: dict[str, str] = json.loads(FILE.read_text(encoding="utf-8")).get(kind, {})
    return {name: text for name, text in entries.items() if not (scores and name.endswith(_TO_EVALUATE))}


def names(kind: str, scores: bool = False) -> dict[str, str]:
    """Descriptions by the names that an option takes."""
    return {name.split(" (")[0]: text for name, text in written(kind, scores).items() if not name.endswith(_IN_PYTHON)}


def help_text(kind: str, before: str, after: str = "", scores: bool = False) -> str:
    """A help text with a line for each entry."""
    entries = written(kind, scores)
    return "\n\n".join([before, *(f"[bold]{name}[/bold]: {text}" for name, text in entries.items())]) + after
