"""eap card and eap acdc: they save and show what the library finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eap_circuits as eap
from eap_circuits.cli import session
from tests.fuzz import common as tiny

from .conftest import run


@pytest.fixture
def held_out(tmp_path: Path, make_pairs: Any) -> Path:
    path = tmp_path / "held-out.safetensors"
    make_pairs(seed=8, n=4).save(path)
    return path


def test_a_card(tmp_path: Path, loads: list[str], pairs: Path, held_out: Path, make_model: Any) -> None:
    scores, circuit, page = tmp_path / "s.safetensors", tmp_path / "c.safetensors", tmp_path / "card.html"
    run("attribute", "tiny", "--data", pairs, "--method", "eap", "--keep", "examples", "-o", scores,
        "--edges", 30, "--circuit", circuit)  # fmt: skip
    asked = ("--other", pairs, "--scores", scores, "--resamples", 2, "--draws", 1, "--most-edges", 4)
    found = run("card", "tiny", circuit, "--data", held_out, *asked, "-o", tmp_path / "card.json", "--html", page)
    right = eap.faithfulness_card(
        make_model("llama", torch.float32),
        eap.Circuit.load(circuit),
        eap.PairedDataset.from_file(held_out),
        eap.EdgeScores.load(scores),
        others={"pairs": eap.PairedDataset.from_file(pairs)},
        resamples=2,
        seeds=(0,),
        most_edges=4,
    )
    saved = json.loads((tmp_path / "card.json").read_text(encoding="utf-8"))
    assert saved["faithfulness"] == pytest.approx(right.faithfulness)
    assert saved["others"]["pairs"]["faithfulness"] == pytest.approx(right.others["pairs"].faithfulness)
    assert saved["shared"] == pytest.approx(right.shared) and set(saved["cost"]) == set(right.cost)
    assert f"{right.faithfulness:.3f}" in found.stdout and "Wrote" in found.stdout
    text = page.read_text(encoding="utf-8")
    assert "Faithfulness card" in text and f"{right.faithfulness:.3f}" in text


def test_a_card_s_report_spells_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "load_model", lambda *_, **__: (tiny.model(), tiny.tokenizer()))
    circuit, data, page = tmp_path / "c.safetensors", tmp_path / "pairs.csv", tmp_path / "card.html"
    tiny.circuit().save(circuit)
    data.write_text("clean,corrupted,good,bad\nAnn met Bob,Cy met Bob,Ann,Cy\n")
    tiny.scores().save(tmp_path / "s.safetensors")
    run("card", "tiny", circuit, "--data", data, "--draws", 1, "--most-edges", 0, "--html", page,
        "--scores", tmp_path / "s.safetensors", "--resamples", 1)  # fmt: skip
    assert "&#39;Ann&#39; rather than &#39;Cy&#39;" in page.read_text(encoding="utf-8")


def test_a_card_that_cannot_be_is_refused_before_any_model(
    tmp_path: Path, pairs: Path, loads: list[str], make_model: Any, make_pairs: Any
) -> None:
    graph = eap.attribute(make_model("llama", torch.float32), make_pairs(n=1), method="eap").graph
    eap.random_circuit(graph, 9).save(tmp_path / "c.safetensors")
    given = ("card", "tiny", tmp_path / "c.safetensors", "--data", pairs)
    for more, words in (
        (("--html", tmp_path / "p.html"), "--html: expected --scores with it"),
        (("--other", tmp_path / "none.csv"), "none.csv: expected a file"),
        (("--other", pairs, "--other", pairs), "--other: expected files of different names"),
    ):
        assert words in " ".join(run(*given, *more, code=2).stderr.split())
    assert not loads


def test_acdc(tmp_path: Path, loads: list[str], held_out: Path, make_model: Any) -> None:
    out = tmp_path / "circuit.safetensors"
    found = run("acdc", "tiny", 0.05, "--data", held_out, "-o", out)
    right = eap.acdc(make_model("llama", torch.float32), eap.PairedDataset.from_file(held_out), 0.05)
    circuit = eap.Circuit.load(out)
    assert circuit == right and circuit.info["acdc"] == right.info["acdc"]
    assert f"{right.n_edges} of {right.graph.n_edges} edges are left" in found.stdout
    loads.clear()
    result = run("acdc", "tiny", 0.05, "--data", held_out, "--heads", "all", code=2)
    assert "--heads: expected" in result.stderr and not loads
