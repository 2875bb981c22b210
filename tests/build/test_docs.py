"""README and docs say what the committed results say."""

import importlib.util
import json
from pathlib import Path

import pytest

from bench import tables
from eap_circuits.reproduction.page import page as page_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", tables.PAGES)
def test_tables_are_those_of_the_committed_results(name):
    page = (ROOT / name).read_text()
    assert tables.filled(name, page, tables.committed(ROOT / "bench" / "results")) == page


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


def script(name):
    """The module docs/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_models_is_that_of_the_committed_checks_and_has_every_family():
    models = script("models")
    assert models.page() == models.PAGE.read_text()
    from tests.circuits.conftest import CONFIGS

    rows = json.loads(models.RESULTS.read_text())["models"]
    assert set(rows) == set(CONFIGS)
    assert all(passed for row in rows.values() for _, passed, _ in row["checks"])
    tests = {test for tests in models.TESTS.values() for test in tests}
    assert all(set(row["tests"]) == tests and all(row["tests"].values()) for row in rows.values())
    columns = {check for checks in models.CHECKS.values() for check in checks}
    assert columns | {"architecture"} == {name for row in rows.values() for name, *_ in row["checks"]}


def test_the_registries_tables_and_help_texts_are_written_anew():
    for path, text in script("registries").files().items():
        assert path.read_text(encoding="utf-8") == text, f"python docs/registries.py writes {path.name}"


def test_the_page_of_the_comparison_says_what_its_results_say():
    results = json.loads((ROOT / "docs" / "reproduction" / "results.json").read_text())
    assert page_of(results) == (ROOT / "docs" / "reproduction.md").read_text()
