"""Every document that says what committed results say; `python -m bench.record` writes all of them anew.

A table stands between two markers; the first one names the script that measures its figures. A page that is written
whole is the text of a script in docs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from bench import tables

BEGIN, END = "<!-- measured: written by {} -->\n", "<!-- end -->"
RECORD, PERFORMANCE = "bench/record.py", "docs/performance.py"
TABLES: dict[tuple[str, str], Callable[[tables.Results], str]] = {
    ("README.md", RECORD): tables.readme,
    ("docs/performance.md", PERFORMANCE): tables.shares,
    ("docs/performance.md", RECORD): tables.model_shapes,
    ("docs/ops/edge_scores.md", RECORD): tables.edge_scores,
    ("docs/ops/masked_read.md", RECORD): tables.masked_read,
    ("docs/ops/head_space_scores.md", RECORD): tables.head_space_scores,
    ("docs/integrations.md", RECORD): tables.integrations,
}
WITH_TABLES = tuple(dict.fromkeys(name for name, _ in TABLES))
# Not imported where only tables are written: these need all of eap_circuits.
PAGES = {"docs/models.md": "docs.models"}
ALL = (*WITH_TABLES, *PAGES)


def replaced(text: str, script: str, table: str) -> str:
    """A document's text with another table between the script's markers."""
    begin = BEGIN.format(script)
    head, rest = text.split(begin)
    return head + begin + table + END + rest.split(END, 1)[1]


def written(root: Path, name: str, results: tables.Results) -> str:
    """The document's text as the results say it."""
    if name in PAGES:
        return import_module(PAGES[name]).page()
    text = (root / name).read_text()
    for (document, script), table in TABLES.items():
        if document == name:
            text = replaced(text, script, table(results))
    return text


def write(root: Path, names: Iterable[str] = WITH_TABLES) -> None:
    results = tables.committed(root)
    for name in names:
        (root / name).write_text(written(root, name, results))
