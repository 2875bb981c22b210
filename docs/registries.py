"""Write what the docs and the help texts tell of the registries: the tables of pages, and the command line's choices.

python docs/registries.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from eap_circuits.cli import choices
from eap_circuits.methods import METHODS
from eap_circuits.metrics import METRICS
from eap_circuits.recording import ABLATIONS, RULES

DOCS = Path(__file__).parent
Rows = Iterable[tuple[object, ...]]


def _mark(value: bool) -> str:
    return "✓" if value else "–"


def tables() -> dict[str, tuple[str, Rows]]:
    """The head of the table and its rows, by page."""
    return {
        "methods.md": (
            "| method | what | cost | steps | quadrature | memory | tier |",
            (
                (f"`{m.name}`", m.description, m.passes, *map(_mark, (m.stepped, m.grids, m.planned)), m.tier)
                for m in METHODS.values()
            ),
        ),
        "metrics.md": (
            "| metric | what it is | scores edges |",
            ((f"`{m.name}`", m.description.replace("|", "\\|"), _mark(m.differentiable)) for m in METRICS.values()),
        ),
        "ablations.md": (
            "| `ablation=` | c'_u(t) | made from `ablation_data` |",
            ((f'`"{a.name}"`', a.description, _mark(a.from_data)) for a in ABLATIONS.values()),
        ),
        "rules.md": ("| rules | what it is |", ((f"`{r.name}`", r.description) for r in RULES.values())),
    }


def files() -> dict[Path, str]:
    """What each file should hold: pages as they are, with the tables of the registries."""
    found = {choices.FILE: choices.content()}
    for name, (head, rows) in tables().items():
        lines = [head, "|" + "---|" * (head.count("|") - 1), *(f"| {' | '.join(map(str, row))} |" for row in rows)]
        page, table = (DOCS / name).read_text(encoding="utf-8"), "\n".join(lines) + "\n"
        written, n = re.subn(re.escape(head) + r"\n(\|.*\n)*", lambda _, table=table: table, page)
        assert n == 1, f"{name} has {n} tables with the head {head}"
        found[DOCS / name] = written
    return found


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
