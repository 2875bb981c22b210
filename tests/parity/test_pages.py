"""Every example of README and docs that has prompts, on SmolLM2's tokenizer and a small random model."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import eap_circuits as eap
from eap_circuits.adapters.pretrained import load_tokenizer
from eap_circuits.cli import app, session
from eap_circuits.errors import InputWarning
from eap_circuits.tasks import TASKS

ROOT = Path(__file__).parents[2]
FILES = (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
BLOCK = re.compile(r"```(python|text|bash)\n(.*?)```", re.S)
PROMPTS = r"load_task|from_records|from_tokens|from_file"
WITH_PROMPTS = [name for name, page in PAGES.items() if any(re.search(PROMPTS, x) for _, x in BLOCK.findall(page))]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", WITH_PROMPTS)
def test_a_pages_examples_run_one_after_another(name, model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, found in (("AutoModelForCausalLM", model), ("AutoTokenizer", tokenizer)):
        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", lambda *_, found=found, **__: found)
    space = {"eap": eap, "tokenizer": tokenizer, "model": model}
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        warnings.filterwarnings("ignore", ".*changes the odds", InputWarning)  # of a random model
        for kind, block in BLOCK.findall(PAGES[name]):
            if kind == "text" and block.startswith("clean,"):
                Path("pairs.csv").write_text(block)
            elif kind == "python" and "eap." in block and "image_pairs" not in block:  # which need another model
                exec(block.replace("n=64", "n=2"), space)


def test_readme_leads_from_a_table_to_an_explorer(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "load_model", lambda *_, **__: (model, tokenizer))
    blocks = [block for _, block in BLOCK.findall(PAGES["README.md"])]
    table = next(i for i, block in enumerate(blocks) if block.startswith("clean,"))
    Path("pairs.csv").write_text(blocks[table])
    for line in blocks[table + 1].splitlines():
        program, *typed = shlex.split(line, comments=True)
        assert program == "eap"
        done = CliRunner().invoke(app, typed)
        assert done.exit_code == 0, (line, done.output, done.exception)
    page = Path("report.html").read_text()
    assert 'id="explorer-data"' in page and "The opposite of hot is" in page


def test_the_pages_are_found():
    assert {"README.md", "docs/data.md", "docs/ablations.md"} <= set(WITH_PROMPTS)


def test_every_table_and_record_means_the_words_it_writes(tokenizer, tmp_path):
    """docs/data.md: of each answer the text that is written there, behind a space."""
    table = re.search(r"```text\n(clean,.*?)```", PAGES["docs/data.md"], re.S)
    (tmp_path / "pairs.csv").write_text(table[1])
    data = eap.PairedDataset.from_file(tmp_path / "pairs.csv", tokenizer)
    words = [tokenizer.decode([token]) for token in data.answers.flatten().tolist() if token >= 0]
    assert words == [" Mary", " John", " Tom", " Kate", " Mary"]


@pytest.mark.parametrize("name", TASKS)
def test_a_description_of_a_task_is_one_of_the_tokenizers_own_pairs(name, tokenizer):
    found = re.match(r".*?'(?P<prompt>[^']+)' -> '(?P<answer> \w+)'", TASKS[name].description)
    if found is None:  # answers that are described, not named
        assert "->" in TASKS[name].description
        return
    record = {"clean": found["prompt"], "corrupted": found["prompt"], "answers": [found["answer"], " it"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        data = eap.PairedDataset.from_records([record], tokenizer)
    assert tokenizer.decode(data.answers[0, :1]) == found["answer"]
