"""`eap attribute`: its options do what the library's arguments do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import eap_circuits as eap
from eap_circuits.cli import session
from tests.circuits.cli.conftest import run


def numbers(text: str) -> list[str]:
    return text.replace(",", "").split()


def test_unequal_lengths_are_taken_with_align(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_model: Any) -> None:
    words = {word: i for i, word in enumerate(["<unk>", "Ann", "Bob", "Cy", "met", "and", "gave"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    model = make_model("llama", torch.float32)
    monkeypatch.setattr(session, "load_model", lambda *_, **__: (model, tokenizer))
    path = tmp_path / "names.csv"
    path.write_text("clean,corrupted,answer,wrong_answer\nAnn and Bob met Bob,Ann and Bob Cy met Ann,Ann,Bob\n")
    command = ("attribute", "tiny", "--data", path, "--steps", 2)
    assert "--align takes others too), found 5 and 6." in " ".join(run(*command, code=2).stderr.split())
    run(*command, "--align", "-o", tmp_path / "s.safetensors")
    pairs = eap.PairedDataset.from_csv(path, tokenizer, align=True)
    right = eap.attribute(model, pairs, steps=2)
    assert torch.equal(eap.EdgeScores.load(tmp_path / "s.safetensors").values, right.values)
    right.select(30).save(tmp_path / "c.json")
    found = json.loads(run("evaluate", "tiny", tmp_path / "c.json", "--data", path, "--align", "--json").stdout)
    assert found["mean"] == pytest.approx(eap.evaluate(model, right.select(30), pairs).mean)
    run("curve", "tiny", tmp_path / "s.safetensors", "--data", path, "--align", "--fractions", "0.5", "--draws", 1)
    assert "--align: expected --data" in run("attribute", "tiny", "--task", "ioi", "--align", code=2).stderr


def test_attribute_shows_and_saves_what_the_library_computes(
    tmp_path: Path, loads: list[str], pairs: Path, make_model: Any, make_pairs: Any
) -> None:
    out, circuit = tmp_path / "s.safetensors", tmp_path / "c.json"
    arguments = ("--method", "eap", "--heads", "query", "--edges", 30, "--circuit", circuit, "--top", 4)
    result = run("attribute", "tiny", "--data", pairs, "-o", out, *arguments)
    scores = eap.attribute(make_model("llama", torch.float32), make_pairs(), method="eap", heads="query")
    assert loads == ["tiny"]
    assert torch.equal(eap.EdgeScores.load(out).values, scores.values)
    assert eap.Circuit.load(circuit) == scores.select(n_edges=30, exactly=True)
    for sender, receiver, score in scores.top_edges(4):
        assert sender in result.stdout
        assert receiver in result.stdout
        assert any(float(word) == pytest.approx(score, rel=1e-2) for word in numbers(result.stdout) if word[0] in "+-")
    assert result.stderr == ""


def test_attribute_json(loads: list[str], pairs: Path) -> None:
    found = json.loads(run("attribute", "tiny", "--data", pairs, "--top", 3, "--edges", 9, "--json").stdout)
    assert len(found["edges"]) == 3
    assert found["info"]["method"] == "eap-ig-inputs"
    assert found["circuit"]["n_edges"] == 9
    assert found["files"] == {}


def test_backward_rules(loads: list[str], pairs: Path, tmp_path: Path, make_model: Any, make_pairs: Any) -> None:
    run("attribute", "tiny", "--data", pairs, "--method", "eap", "--rules", "gim", "-o", tmp_path / "s.safetensors")
    found = eap.EdgeScores.load(tmp_path / "s.safetensors")
    right = eap.attribute(make_model("llama", torch.float32), make_pairs(), method="eap", rules="gim")
    assert torch.equal(found.values, right.values) and found.info["rules"] == "gim"
    plan = eap.plan(make_model("llama", torch.float32), make_pairs(), rules="gim")
    shown = run("attribute", "tiny", "--data", pairs, "--rules", "gim", "--dry-run", "--json").stdout
    assert json.loads(shown)["bytes"] == plan.bytes


def test_exact_scores_of_a_saved_circuit_go_on_from_their_checkpoint(
    tmp_path: Path, loads: list[str], pairs: Path, make_model: Any, make_pairs: Any
) -> None:
    model, data = make_model("llama", torch.float32), make_pairs()
    circuit = eap.attribute(model, data).select(12)
    circuit.save(tmp_path / "c.json")
    right = eap.attribute(model, data, method="exact", edges=circuit)
    files = (
        "--only",
        tmp_path / "c.json",
        "--checkpoint",
        tmp_path / "k.safetensors",
        "-o",
        tmp_path / "s.safetensors",
    )
    for _ in range(2):
        run("attribute", "tiny", "--data", pairs, "--method", "exact", *files)
        assert torch.equal(eap.EdgeScores.load(tmp_path / "s.safetensors").values, right.values)
    assert (tmp_path / "k.safetensors").exists()
    run("attribute", "tiny", "--data", pairs, "--method", "eap", "--only", tmp_path / "c.json", code=2)


def test_dry_run_shows_the_plan_and_scores_nothing(
    loads: list[str], pairs: Path, make_model: Any, make_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = eap.plan(make_model("llama", torch.float32), make_pairs(), memory=10**6)
    monkeypatch.setattr(eap, "attribute", None)
    arguments = ("attribute", "tiny", "--data", pairs, "--dry-run", "--memory", "1MB")
    found = json.loads(run(*arguments, "--json").stdout)
    assert found == {**found, "tokens": plan.tokens, "bytes": plan.bytes, "budget": 10**6}
    assert sum(examples for examples, _, _ in found["batches"]) == len(make_pairs())
    shown = run(*arguments).stdout
    assert "steps at once" in shown and "0.00 GiB allowed" in shown


def test_statistics_are_saved_and_used_to_choose(
    tmp_path: Path, loads: list[str], pairs: Path, make_model: Any, make_pairs: Any
) -> None:
    out, circuit = tmp_path / "s.safetensors", tmp_path / "c.json"
    model, data = make_model("llama", torch.float32), make_pairs()
    arguments = ("attribute", "tiny", "--data", pairs, "--edges", 30, "--circuit", circuit, "--confidence", 0.9)
    for keep in ((), ("--keep", "examples,neurons")):
        run(*arguments, "-o", out, *keep)
        right = eap.attribute(model, data, keep=("examples", "neurons") if keep else "variance")
        found = eap.EdgeScores.load(out)
        assert found.statistics().keys() == right.statistics().keys()
        assert eap.Circuit.load(circuit) == right.select(30, among=right.confidence() >= 0.9, exactly=True)
    shown = json.loads(
        run(
            "curve", "tiny", out, "--data", pairs, "--confidence", 0.9, "--fractions", "0.5,1", "--draws", 1, "--json"
        ).stdout
    )
    sure = int((right.confidence() >= 0.9).sum())
    assert shown["n_edges"][-1] == right.select(sure, among=right.confidence() >= 0.9).n_edges <= sure
    run("attribute", "tiny", "--data", pairs, "--keep", "everything", code=2)
    run("attribute", "tiny", "--data", pairs, "--confidence", 0.9, code=2)
    run("attribute", "tiny", "--data", pairs, "-o", out)
    run("curve", "tiny", out, "--data", pairs, "--confidence", 0.9, code=2)


def test_metric_is_the_datas_own_unless_given(
    tmp_path: Path, loads: list[str], make_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_pairs()
    own = eap.PairedDataset(data.clean, data.corrupted, data.lengths, data.answers, None, "d", "prob_diff")
    own.save(tmp_path / "own.safetensors")
    asked = []
    attribute = eap.attribute

    def spy(*args: Any, **kwargs: Any) -> Any:
        scores = attribute(*args, **kwargs)
        asked.append(scores.info["metric"])
        return scores

    monkeypatch.setattr(eap, "attribute", spy)
    run("attribute", "tiny", "--data", tmp_path / "own.safetensors")
    run("attribute", "tiny", "--data", tmp_path / "own.safetensors", "--metric", "logit_diff")
    assert asked == ["prob_diff", "logit_diff"]
