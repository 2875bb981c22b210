"""The README says what the committed results say."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_table_is_that_of_the_committed_results():
    spec = importlib.util.spec_from_file_location("record", ROOT / "bench" / "record.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    page = (ROOT / "README.md").read_text()
    result = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    assert record.readme(page, result) == page


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
