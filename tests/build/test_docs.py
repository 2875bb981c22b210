"""README and docs say what the committed results say."""

import json
from pathlib import Path

import pytest

from bench import documents, tables
from docs import models, registries
from eap_circuits.reproduction.page import page as page_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", documents.ALL)
def test_a_document_says_what_the_committed_results_say(name):
    assert documents.written(ROOT, name, tables.committed(ROOT)) == (ROOT / name).read_text()


def test_readme_is_short_and_its_python_runs_as_far_as_names_go():
    import eap_circuits as eap

    page = (ROOT / "README.md").read_text()
    assert len(page.splitlines()) < 150
    for name in ("load_task", "attribute", "evaluate", "faithfulness_curve", "PairedDataset"):
        assert f"eap.{name}" in page and hasattr(eap, name)


def test_links_and_pictures_of_the_docs_exist():
    import re

    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_every_family_is_in_the_table_of_models_and_passed_every_check():
    from tests.circuits.conftest import CONFIGS

    rows = json.loads(models.RESULTS.read_text())["models"]
    assert set(rows) == set(CONFIGS)
    assert all(passed for row in rows.values() for _, passed, _ in row["checks"])
    tests = {test for tests in models.TESTS.values() for test in tests}
    assert all(set(row["tests"]) == tests and all(row["tests"].values()) for row in rows.values())
    columns = {check for checks in models.CHECKS.values() for check in checks}
    assert columns | {"architecture"} == {name for row in rows.values() for name, *_ in row["checks"]}


def test_the_registries_tables_and_help_texts_are_written_anew():
    for path, text in registries.files().items():
        assert path.read_text(encoding="utf-8") == text, f"python docs/registries.py writes {path.name}"


def test_the_page_of_the_comparison_says_what_its_results_say():
    results = json.loads((ROOT / "docs" / "reproduction" / "results.json").read_text())
    assert page_of(results) == (ROOT / "docs" / "reproduction.md").read_text()
