"""The commands after `eap attribute` and beside it: evaluate, curve, report, demo, tasks, check, tune, info."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import eap_circuits as eap
from eap_circuits.cli import session
from eap_circuits.cli.console import say, show_table
from eap_circuits.evaluation import circuit_values
from eap_circuits.report.table import Column, Table
from eap_circuits.selfcheck import Check
from tests.circuits.cli.conftest import run


def test_evaluate(tmp_path: Path, saved: Path, pairs: Path, make_model: Any, make_pairs: Any) -> None:
    scores = eap.EdgeScores.load(saved)
    scores.select(n_edges=200).save(tmp_path / "c.json")
    wanted = eap.evaluate(make_model("llama", torch.float32), scores.select(n_edges=200), make_pairs())
    found = json.loads(run("evaluate", "tiny", tmp_path / "c.json", "--data", pairs, "--json").stdout)
    assert found["faithfulness"] == pytest.approx(wanted.faithfulness)
    assert found["values"] == pytest.approx(wanted.values.tolist())
    shown = run("evaluate", "tiny", tmp_path / "c.json", "--data", pairs).stdout
    assert f"{wanted.faithfulness:.3f}" in shown
    assert f"{wanted.clean:.3f}" in shown


def test_memory_bounds_evaluate_and_curve(
    tmp_path: Path, saved: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eap.EdgeScores.load(saved).select(n_edges=200).save(tmp_path / "c.json")
    asked = []
    original = circuit_values.tokens_within

    def within(*given: Any, **more: Any) -> int:
        asked.append(given[0].memory)
        return original(*given, **more)

    monkeypatch.setattr(circuit_values, "tokens_within", within)
    run("evaluate", "tiny", tmp_path / "c.json", "--data", pairs, "--memory", "7MB")
    run("curve", "tiny", saved, "--data", pairs, "--fractions", "0.5", "--baselines", "none", "--memory", "8MB")
    assert asked == [7_000_000, 8_000_000]


def _undated(text: str) -> str:
    return re.sub(r'"date": "[^"]*"', "", text)


def test_evaluate_and_curve_go_on_from_their_checkpoints(
    tmp_path: Path, saved: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eap.EdgeScores.load(saved).select(n_edges=200).save(tmp_path / "c.json")
    original = circuit_values.CircuitValues.run
    options = ("--data", pairs, "--json", "--checkpoint")
    commands = [
        ("evaluate", "tiny", tmp_path / "c.json", *options, tmp_path / "e.safetensors"),
        ("curve", "tiny", saved, "--fractions", "0.5", "--baselines", "none", *options, tmp_path / "k.safetensors"),
    ]
    for command in commands:
        monkeypatch.setattr(circuit_values.CircuitValues, "run", original)
        first = _undated(run(*command).stdout)
        monkeypatch.setattr(circuit_values.CircuitValues, "run", lambda *_: pytest.fail("what is done is done again"))
        assert _undated(run(*command).stdout) == first
    run("evaluate", "tiny", tmp_path / "c.json", *options, tmp_path / "k.safetensors", code=2)


def test_ablations(
    tmp_path: Path, saved: Path, pairs: Path, loads: list[str], make_model: Any, make_pairs: Any
) -> None:
    model, data, other = make_model("llama", torch.float32), make_pairs(), make_pairs(seed=8)
    other = eap.PairedDataset.from_tokens(other.clean, other.corrupted, torch.full((7,), 11), other.answers)
    other.save(tmp_path / "other.safetensors")
    given = ("--ablation", "mean-positional", "--ablation-data", tmp_path / "other.safetensors")
    wanted = {"ablation": "mean-positional", "ablation_data": other}
    out, file = tmp_path / "s.safetensors", tmp_path / "c.json"
    run("attribute", "tiny", "--data", pairs, "-o", out, "--edges", 200, "--circuit", file, *given)
    scores = eap.attribute(model, data, **wanted)
    assert torch.equal(eap.EdgeScores.load(out).values, scores.values)
    circuit = scores.select(n_edges=200, exactly=True)
    found = json.loads(run("evaluate", "tiny", file, "--data", pairs, "--json", *given).stdout)
    result = eap.evaluate(model, circuit, data, **wanted)
    assert found["values"] == pytest.approx(result.values.tolist()) and found["ablation"] == "mean-positional"
    assert found["corrupted"] == pytest.approx(result.corrupted)
    sizes = ("--fractions", "0.2,0.5", "--baselines", "none", "--json")
    found = json.loads(run("curve", "tiny", out, "--data", pairs, *sizes, *given).stdout)
    curve = eap.faithfulness_curve(model, scores, data, (0.2, 0.5), **wanted)
    assert found["faithfulness"] == pytest.approx(curve.faithfulness, abs=1e-5)
    plan = json.loads(run("attribute", "tiny", "--data", pairs, "--dry-run", "--json", "--ablation", "zero").stdout)
    assert plan["bytes"] > json.loads(run("attribute", "tiny", "--data", pairs, "--dry-run", "--json").stdout)["bytes"]


def test_curve_saves_json_and_report(tmp_path: Path, saved: Path, pairs: Path) -> None:
    out, page = tmp_path / "curve.json", tmp_path / "curve.html"
    arguments = ("curve", "tiny", saved, "--data", pairs, "--fractions", "0.2,0.5,1", "--draws", 2)
    shown = run(*arguments, "-o", out, "--html", page).stdout
    content = json.loads(out.read_text())
    assert content["fractions"] == [0.2, 0.5, 1.0]
    assert content["faithfulness"][-1] == pytest.approx(1, abs=1e-4)
    for value in (*content["faithfulness"], content["cpr"], content["cmd"]):
        assert f"{value:.3f}" in shown
    assert {name: len(entry["draws"]) for name, entry in content["baselines"].items()} == {
        "random": 2,
        "complement": 1,
    }
    for value in content["baselines"]["random"]["faithfulness"]:
        assert f"{value:.3f}" in shown
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text and "random circuits" in text and "all other edges" in text
    alone = json.loads(run(*arguments, "--baselines", "none", "--json").stdout)
    assert alone["baselines"] == {}
    assert alone["faithfulness"] == pytest.approx(content["faithfulness"], abs=1e-5)
    found = json.loads(run(*arguments, "--json").stdout)
    own = {"files", "info", "sha256"}  # of each call
    assert {k: v for k, v in found.items() if k not in own} == {k: v for k, v in content.items() if k not in own}


def test_report_needs_no_model(tmp_path: Path, saved: Path, pairs: Path, loads: list[str]) -> None:
    curve, circuit, out = tmp_path / "curve.json", tmp_path / "c.json", tmp_path / "r.html"
    run("curve", "tiny", saved, "--data", pairs, "--fractions", "0.3,1", "-o", curve)
    loads.clear()
    run("report", saved, "-o", out)
    assert "CPR" not in out.read_text(encoding="utf-8")
    eap.EdgeScores.load(saved).select(n_edges=40).save(circuit)
    run("report", saved, "--circuit", circuit, "--curve", curve, "--title", "Mine & <yours>", "-o", out)
    page = out.read_text(encoding="utf-8")
    assert "Mine &amp; &lt;yours&gt;" in page
    assert "CPR" in page
    for other, suffix in ((circuit, ""), (saved, ""), (saved, ".json")):
        if suffix:  # a file of EAP-IG's with scores has a circuit without edges
            eap.EdgeScores.load(saved).save(tmp_path / "s.json")
            other = tmp_path / "s.json"
        run("report", saved, "--against", other, "-o", out)
        data = re.search('id="explorer-data">(.*?)</script>', out.read_text(encoding="utf-8"))
        assert data and json.loads(data.group(1))["other"]["score"]
    assert loads == []


def test_what_is_shown_is_neither_cut_nor_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    columns = Column("name", "name"), Column("n", "n", numeric=True), Column("m", "m", numeric=True)
    show_table(Table("All", columns, ((":cat:", "1,234,567,890", "-0.125"), ("[b]", "1", "2"))))
    say("Wrote :cat:.json [b].")
    shown = capsys.readouterr().out
    assert all(text in shown for text in (":cat: ", "1,234,567,890", "-0.125", "[b] ", "Wrote :cat:.json [b].\n"))


def test_demo_writes_its_three_files(
    tmp_path: Path, loads: list[str], make_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.Prompts, "load", lambda self, *_: make_pairs())
    out = tmp_path / "new" / "folder"
    result = run("demo", "--out", out, "-n", 7)
    assert loads == ["smollm2"]
    assert {path.name for path in out.iterdir()} == {"scores.safetensors", "circuit.json", "report.html"}
    scores, circuit = eap.EdgeScores.load(out / "scores.safetensors"), eap.Circuit.load(out / "circuit.json")
    assert circuit.graph == scores.graph
    assert 0 < circuit.n_edges < scores.graph.n_edges
    assert f"{circuit.n_edges:,} edges" in result.stdout
    run("demo", "--out", out, "--edges", 50)
    assert eap.Circuit.load(out / "circuit.json") == eap.EdgeScores.load(out / "scores.safetensors").select(
        50, exactly=True
    )


def test_tasks_lists_every_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_pairs: Any) -> None:
    from eap_circuits.tasks import TASKS

    listed = json.loads(run("tasks", "--json").stdout)
    assert [(row["name"], row["metric"]) for row in listed] == [(t.name, t.metric) for t in TASKS.values()]
    shown = run("tasks").stdout
    assert all(name in shown for name in TASKS)

    monkeypatch.setattr("eap_circuits.adapters.pretrained.load_tokenizer", lambda name: None)
    monkeypatch.setattr(session.Prompts, "load", lambda self, *_: make_pairs(n=self.n))
    run("tasks", "ioi", "-n", 3, "-o", tmp_path / "t.safetensors")
    assert len(eap.PairedDataset.from_file(tmp_path / "t.safetensors", None)) == 3
    run("tasks", "-o", tmp_path / "t.safetensors", code=2)

    words = ["<unk>", " Ann", " Bob", " Cy", "Dan", " Eve"]
    monkeypatch.setattr(
        "eap_circuits.adapters.pretrained.load_tokenizer",
        lambda name: SimpleNamespace(decode=lambda ids: words[ids[0]]),
    )
    ids, answers = torch.ones(2, 3, dtype=torch.int64), torch.tensor([[[1, 2, 3, 5], [4, -1, -1, -1]]] * 2)
    pairs = eap.PairedDataset(ids, ids, torch.tensor([3, 3]), answers, (("Ann or", "Dan or"),) * 2)
    monkeypatch.setattr(session.Prompts, "load", lambda self, *_: pairs)
    row = {"clean": "Ann or", "corrupted": "Dan or", "good": [" Ann", " Bob", " Cy", " Eve"], "bad": ["Dan"]}
    assert json.loads(run("tasks", "ioi", "--json").stdout) == [row, row]
    shown = run("tasks", "ioi").stdout
    assert "' Ann', ' Bob', ' Cy' … (4)" in shown and "'Dan'" in shown
    run("tasks", "nonsense", code=2)


@pytest.mark.parametrize("passed", [True, False])
def test_check_exits_1_when_a_check_fails(monkeypatch: pytest.MonkeyPatch, loads: list[str], passed: bool) -> None:
    from eap_circuits import selfcheck

    checks = [Check("first", True, "fine"), Check("second", passed, "error [0.5]")]
    monkeypatch.setattr(selfcheck, "check_model", lambda model: checks)
    result = run("check", "tiny", code=0 if passed else 1)
    assert "error [0.5]" in result.stdout
    found = json.loads(run("check", "tiny", "--json", code=0 if passed else 1).stdout)
    assert [row["passed"] for row in found] == [True, passed]


def test_info_tells_versions_and_backends() -> None:
    import eap_kernels
    from eap_circuits.methods import METHODS

    shown = run("info").stdout
    assert torch.__version__ in shown
    assert all(backend in shown for backend in eap_kernels.backends())
    assert "eap-conductance (experimental)" in shown and all(name in shown for name in METHODS)


def test_tune_says_what_was_found_or_in_one_sentence_why_nothing_was(monkeypatch: pytest.MonkeyPatch) -> None:
    from eap_kernels.tune import devices

    asked = []
    monkeypatch.setattr(devices, "tune", lambda named, again: asked.append((named, again)) or iter(["a [b]", "stored"]))
    assert run("tune").stdout.splitlines() == ["a [b]", "stored"]
    run("tune", "--device", "cpu", "--again")
    assert asked == [([], False), (["cpu"], True)]

    def fails(named: list[str], again: bool) -> None:
        warnings.warn_explicit("left out", UserWarning, "choices.py", 1, module="eap_kernels.tune.choices")
        raise RuntimeError("the folder cannot be written")

    monkeypatch.setattr(devices, "tune", fails)
    said = run("tune", code=2).stderr
    assert "eap: warning: left out" in said and "eap: error: the folder cannot be written" in said


@pytest.mark.parametrize("trusted", [False, True])
def test_code_that_comes_with_a_model_is_trusted_only_on_request(trusted, pairs, make_model, monkeypatch):
    from eap_circuits.adapters import pretrained

    given = []

    def load(name, **settings):
        given.append(settings["trust_remote_code"])
        return make_model("llama", torch.float32), None

    monkeypatch.setattr(pretrained, "load_model", load)
    flag = ["--trust-remote-code"] if trusted else []
    run("attribute", "theirs", "--data", pairs, "--dry-run", *flag)
    run("check", "theirs", *flag)
    assert given == [trusted, trusted]
