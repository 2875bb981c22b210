"""README, docs and help texts say what the registries and the committed results say."""

import json
import re

import pytest

from bench import tables
from docs import documents, models
from tests.build.building import ROOT


@pytest.mark.parametrize("name", documents.ALL)
def test_a_document_says_what_its_sources_say(name):
    """`python -m docs.documents` writes it anew."""
    assert documents.written(ROOT, name, tables.committed(ROOT)) == (ROOT / name).read_text(encoding="utf-8")


def test_what_is_marked_is_written():
    """No marker is left of a source that nothing is written from."""
    marker = documents.BEGIN.partition("{")[0]
    pages = {str(page.relative_to(ROOT)): page.read_text() for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))}
    marked = {(name, line) for name, text in pages.items() for line in text.splitlines(True) if marker in line}
    assert marked == {(name, documents.BEGIN.format(source)) for name, source in documents.TABLES}


def test_readme_is_short_and_its_python_runs_as_far_as_names_go():
    import eap_circuits as eap

    page = (ROOT / "README.md").read_text()
    assert len(page.splitlines()) < 150
    for name in ("load_task", "attribute", "evaluate", "faithfulness_curve", "PairedDataset"):
        assert f"eap.{name}" in page and hasattr(eap, name)


def test_links_and_pictures_of_the_docs_exist():
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)


def test_tests_that_pages_name_exist():
    code = "".join(path.read_text() for path in ROOT.glob("tests/**/test_*.py"))
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for path in re.findall(r"`(tests/[\w/.-]+)`", page.read_text()):
            assert (ROOT / path).exists(), (page.name, path)
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in code, (page.name, name)


def test_each_feature_compared_is_shown_by_a_test_or_a_picture():
    tables = (
        (ROOT / "docs/comparison.md")
        .read_text()
        .split("| feature | here; what shows it | elsewhere |\n|---|---|---|\n")[1:]
    )
    rows = [row.split(" | ") for table in tables for row in table.partition("\n\n")[0].splitlines()]
    assert len(rows) > 25
    for feature, here, _ in rows:
        assert re.search(r"`tests/[\w/]+\.py`|`test_\w+`|\[picture\]\(img/", here), feature


def test_tutorials_are_committed_without_outputs():
    """`make docs` runs them: outputs in the repository would be a second copy, which grows old."""
    pages = sorted(ROOT.glob("docs/tutorials/*.ipynb"))
    assert len(pages) == 8
    for page in pages:
        cells = [cell for cell in json.loads(page.read_text())["cells"] if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), page.name
        assert f"tutorials/{page.stem}" in (ROOT / "docs/index.md").read_text()


def test_every_family_is_in_the_table_of_models_and_passed_every_check():
    from tests.circuits.conftest import CONFIGS

    rows = json.loads(models.RESULTS.read_text())["models"]
    assert set(rows) == set(CONFIGS)
    assert all(passed for row in rows.values() for _, passed, _ in row["checks"])
    tests = {test for tests in models.TESTS.values() for test in tests}
    assert all(set(row["tests"]) == tests and all(row["tests"].values()) for row in rows.values())
    columns = {check for checks in models.CHECKS.values() for check in checks}
    assert columns | {"architecture"} == {name for row in rows.values() for name, *_ in row["checks"]}
