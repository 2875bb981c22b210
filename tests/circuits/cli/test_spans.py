"""From a file with spans and answers of several tokens to a circuit, its curve and its report, as with any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eap_circuits as eap
from eap_circuits.cli import session
from tests.circuits.cli.conftest import run
from tests.circuits.tasks.test_dataset import word_tokenizer

LINES = [
    ("Mary and John gave a book to", "Mary and Tom gave a book to", [9, 13]),
    ("Tom and Kate gave a book to", "Tom and John gave a book to", [8, 12]),
]


@pytest.fixture
def pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Any) -> Path:
    tokenizer, model = word_tokenizer(), make_model("llama", torch.float32)
    monkeypatch.setattr(session, "load_model", lambda *_, **__: (model, tokenizer))
    path = tmp_path / "pairs.jsonl"
    records = [
        {"clean": clean, "corrupted": corrupted, "answers": [" Mary gave a", " John"]}
        | {"spans": {"giver": giver}, "span_tokens": {"end": [-1]}}
        for clean, corrupted, giver in LINES
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_the_same_commands_go_from_a_file_to_a_report(tmp_path: Path, pairs: Path) -> None:
    files = scores, circuit, curve, page = [
        tmp_path / name for name in ("s.safetensors", "c.safetensors", "curve.json", "report.html")
    ]
    data = ("--data", pairs, "--metric", "sequence_logprob_diff")
    chosen = ("--edges", 12, "--circuit", circuit)
    shown = run("attribute", "tiny", *data, "--by-span", "--method", "eap", "-o", scores, *chosen).stdout
    assert "@giver" in shown or "@end" in shown
    loaded = eap.EdgeScores.load(scores)
    assert eap.Circuit.load(circuit) == loaded.select(12, exactly=True)
    assert loaded.graph.spans is not None
    assert loaded.graph.spans.names == ("giver", "end", "rest")
    found = json.loads(run("evaluate", "tiny", circuit, *data, "--json").stdout)
    model, tokenizer = session.load_model("tiny")
    read = eap.PairedDataset.from_file(pairs, tokenizer)
    right = eap.evaluate(model, eap.Circuit.load(circuit), read, "sequence_logprob_diff")
    assert found["mean"] == pytest.approx(right.mean)
    run("curve", "tiny", scores, *data, "--fractions", "0.1,1", "--draws", 1, "-o", curve, "--html", page)
    first = page.read_text()
    run("report", scores, "--circuit", circuit, "--curve", curve, "-o", page)
    for text in (first, page.read_text()):
        sender, receiver, _ = loaded.top_edges(1)[0]
        assert sender in text
        assert receiver.replace("<", "&lt;").replace(">", "&gt;") in text
        assert '"title":"By span: this edge\'s score","labels":["giver","end","rest"]' in text
    assert all(file.exists() for file in files)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--keep", "variance"), "--by-span: expected neither --keep nor --confidence beside it, found --keep"),
        (("--confidence", 0.9, "--edges", 3), "neither --keep nor --confidence beside it, found --confidence"),
        (("-o", "scores.json"), "a name ending in .safetensors"),
        (("--method", "exact"), "keep: expected 'variance' or 'examples' for method 'exact'"),
    ],
)
def test_what_does_not_go_by_span_is_refused(more: tuple[Any, ...], message: str, pairs: Path) -> None:
    options = ("--data", pairs, "--metric", "sequence_logprob_diff", "--by-span", *more)
    assert message in " ".join(run("attribute", "tiny", *options, code=2).stderr.split())
