"""Every document that says what a registry or a committed result says.

python -m docs.documents     # writes all of them anew; measures nothing

Most of a page is written by hand. What is made from a source stands between two markers, the first of which names the
source; a few files are made whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from bench import explorer, tables
from docs import (
    agreement,
    counts,
    elsewhere,
    fewer,
    fifth,
    gallery,
    heads,
    learning,
    models,
    registries,
    scale,
    shared,
    verdicts,
)

BEGIN, END = "<!-- python -m docs.documents writes this from {} -->\n", "<!-- end -->"
MEASURED, PERFORMANCE, MODELS = "bench/results", "docs/results/performance.json", "docs/results/models.json"
VERDICTS = "docs/results/verdicts.json"
AGREEMENT = "docs/results/agreement.json"
FUZZ, LEARNING = "docs/results/fuzz.json", "docs/results/learning.json"
EXPLORER = "docs/results/explorer.json"
ELSEWHERE, FIFTH = "docs/results/elsewhere.json", "docs/results/fifth.json"
FEWER, SHARED, HEADS = "docs/results/fewer.json", "docs/results/shared.json", "docs/results/heads.json"
LEADERBOARD = "docs/leaderboard/leaderboard.json"
COUNTS = "docs/results/counts.json"
SCALE, LARGE = "docs/results/scale.json", "docs/results/large.json"
# What stands between the markers, by document and source.
TABLES: dict[tuple[str, str], Callable[[tables.Results], str]] = {
    ("README.md", MEASURED): tables.readme,
    ("docs/performance.md", PERFORMANCE): tables.shares,
    ("docs/performance.md", MEASURED): tables.model_shapes,
    ("docs/performance.md", COUNTS): counts.calls,
    ("docs/performance.md", f"{COUNTS}, operators"): counts.operators,
    ("docs/performance.md", f"{COUNTS}, batches"): counts.batches,
    ("docs/ops/edge_scores.md", MEASURED): tables.edge_scores,
    ("docs/ops/masked_read.md", MEASURED): tables.masked_read,
    ("docs/ops/head_space_scores.md", MEASURED): tables.head_space_scores,
    ("docs/integrations.md", MEASURED): tables.integrations,
    ("docs/reliability.md", FUZZ): tables.fuzzing,
    ("docs/learning.md", LEARNING): learning.table,
    ("docs/learning.md", f"{LEARNING}, divergence"): learning.divergences,
    ("docs/learning.md", f"{LEARNING}, cost"): learning.costs,
    ("docs/learning.md", f"{LEARNING}, control"): learning.controls,
    ("docs/leaderboard.md", LEADERBOARD): lambda _: _page("leaderboard", LEADERBOARD),
    ("docs/leaderboard.md", FIFTH): fifth.table,
    ("docs/report.md", EXPLORER): explorer.table,
    ("docs/learning.md", f"{LEARNING}, pruning"): learning.prunings,
    ("docs/learning.md", ELSEWHERE): elsewhere.table,
    ("docs/learning.md", SHARED): shared.table,
    ("docs/learning.md", HEADS): heads.table,
    ("docs/learning.md", f"{HEADS}, attention"): heads.classes,
    ("docs/learning.md", FEWER): fewer.table,
    ("docs/scale.md", SCALE): scale.predictions,
    ("docs/scale.md", f"{SCALE}, projections"): scale.projections,
    ("docs/scale.md", LARGE): scale.measured,
    ("docs/models.md", f"{MODELS}, checks"): lambda _: models.checks(),
    ("docs/models.md", f"{MODELS}, tests"): lambda _: models.tests(),
    ("docs/models.md", VERDICTS): lambda _: verdicts.table(),
    ("docs/models.md", f"{VERDICTS}, masked"): lambda _: verdicts.table(verdicts.MASKED),
    ("docs/models.md", f"{VERDICTS}, seq2seq"): lambda _: verdicts.table(verdicts.SEQ2SEQ),
    ("docs/methods.md", "METHODS"): lambda _: registries.methods(),
    ("docs/methods.md", AGREEMENT): agreement.table,
    ("docs/methods.md", "QUADRATURES"): lambda _: registries.quadratures(),
    ("docs/metrics.md", "METRICS"): lambda _: registries.metrics(),
    ("docs/metrics.md", "BASELINES"): lambda _: registries.baselines(),
    ("docs/ablations.md", "ABLATIONS"): lambda _: registries.ablations(),
    ("docs/rules.md", "RULES"): lambda _: registries.rules(),
}
WHOLE: dict[str, Callable[[], str]] = {
    "docs/reproduction.md": lambda: _page("reproduction", "docs/reproduction/results.json"),
    "docs/sixteen/leaderboard.md": lambda: _page("leaderboard", "docs/sixteen/leaderboard/leaderboard.json"),
    "docs/gallery.md": gallery.page,
    "python/eap_circuits/cli/choices.json": registries.choices,
}
# A bench writes only these: the others need all of eap_circuits.
OF_BENCHES = tuple(dict.fromkeys(name for name, source in TABLES if source in (MEASURED, PERFORMANCE)))
ALL = tuple(dict.fromkeys((*(name for name, _ in TABLES), *WHOLE)))


def replaced(text: str, source: str, table: str) -> str:
    """A document's text with another table between the source's markers."""
    begin = BEGIN.format(source)
    head, rest = text.split(begin)
    return head + begin + table + END + rest.split(END, 1)[1]


def written(root: Path, name: str, results: tables.Results) -> str:
    """The document's text as its sources say it."""
    if name in WHOLE:
        return WHOLE[name]()
    text = (root / name).read_text(encoding="utf-8")
    for (document, source), table in TABLES.items():
        if document == name:
            text = replaced(text, source, table(results))
    return text


def write(root: Path, names: Iterable[str] = OF_BENCHES) -> None:
    results = tables.committed(root)
    for name in names:
        (root / name).write_text(written(root, name, results), encoding="utf-8")


def _page(comparison: str, results: str) -> str:
    """What a comparison of eap_circuits writes from its committed results."""
    content = json.loads((models.DOCS.parent / results).read_text(encoding="utf-8"))
    page: Callable[[object], str] = import_module(f"eap_circuits.{comparison}.page").page
    return page(content)


if __name__ == "__main__":
    write(models.DOCS.parent, ALL)
