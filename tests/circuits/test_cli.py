"""The commands, in this process, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import eap_circuits as eap
from eap_circuits.cli import app, session
from eap_circuits.evaluation import Check


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, make_model: Any) -> list[str]:
    """The tiny model in place of every other; the names that were asked for."""
    asked: list[str] = []

    def load(name: str, dtype: Any = None, device: Any = None) -> tuple[Any, None]:
        asked.append(name)
        return make_model("llama", torch.float32), None

    monkeypatch.setattr(session, "load_model", load)
    return asked


@pytest.fixture
def pairs(tmp_path: Path, make_pairs: Any) -> Path:
    path = tmp_path / "pairs.safetensors"
    make_pairs().save(path)
    return path


@pytest.fixture
def saved(tmp_path: Path, loads: list[str], pairs: Path) -> Path:
    path = tmp_path / "scores.safetensors"
    run("attribute", "tiny", "--data", pairs, "-o", path, "--steps", 2)
    loads.clear()
    return path


def run(*args: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def numbers(text: str) -> list[str]:
    return text.replace(",", "").split()


def test_attribute_shows_and_saves_what_the_library_computes(
    tmp_path: Path, loads: list[str], pairs: Path, make_model: Any, make_pairs: Any
) -> None:
    out, circuit = tmp_path / "s.safetensors", tmp_path / "c.json"
    arguments = ("--method", "eap", "--heads", "query", "--edges", 30, "--circuit", circuit, "--top", 4)
    result = run("attribute", "tiny", "--data", pairs, "-o", out, *arguments)
    scores = eap.attribute(make_model("llama", torch.float32), make_pairs(), method="eap", heads="query")
    assert loads == ["tiny"]
    assert torch.equal(eap.EdgeScores.load(out).values, scores.values)
    assert eap.Circuit.load(circuit) == scores.select(n_edges=30)
    for sender, receiver, score in scores.top_edges(4):
        assert sender in result.stdout
        assert receiver in result.stdout
        assert any(float(word) == pytest.approx(score, rel=1e-2) for word in numbers(result.stdout) if word[0] in "+-")
    assert result.stderr == ""


def test_attribute_json(loads: list[str], pairs: Path) -> None:
    found = json.loads(run("attribute", "tiny", "--data", pairs, "--top", 3, "--edges", 9, "--json").stdout)
    assert len(found["edges"]) == 3
    assert found["info"]["method"] == "eap-ig-inputs"
    assert found["circuit"]["n_edges"] <= 9
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
        assert eap.Circuit.load(circuit) == right.select(30, among=right.confidence() >= 0.9)
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
        asked.append(kwargs["metric"])
        return attribute(*args, **kwargs)

    monkeypatch.setattr(eap, "attribute", spy)
    run("attribute", "tiny", "--data", tmp_path / "own.safetensors")
    run("attribute", "tiny", "--data", tmp_path / "own.safetensors", "--metric", "logit_diff")
    assert asked == ["prob_diff", "logit_diff"]


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
    circuit = scores.select(n_edges=200)
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
    assert {**found, "files": None} == {**content, "files": None}


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
    assert loads == []


def test_demo_writes_its_three_files(
    tmp_path: Path, loads: list[str], make_pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.Prompts, "load", lambda self, tokenizer: make_pairs())
    out = tmp_path / "new" / "folder"
    result = run("demo", "--out", out, "-n", 7)
    assert loads == ["smollm2"]
    assert {path.name for path in out.iterdir()} == {"scores.safetensors", "circuit.json", "report.html"}
    scores, circuit = eap.EdgeScores.load(out / "scores.safetensors"), eap.Circuit.load(out / "circuit.json")
    assert circuit.graph == scores.graph
    assert 0 < circuit.n_edges < scores.graph.n_edges
    assert f"{circuit.n_edges:,} edges" in result.stdout
    run("demo", "--out", out, "--edges", 50)
    assert eap.Circuit.load(out / "circuit.json") == eap.EdgeScores.load(out / "scores.safetensors").select(50)


def test_tasks_lists_every_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_pairs: Any) -> None:
    from eap_circuits.tasks import TASKS

    listed = json.loads(run("tasks", "--json").stdout)
    assert [(row["name"], row["metric"]) for row in listed] == [(t.name, t.metric) for t in TASKS.values()]
    shown = run("tasks").stdout
    assert all(name in shown for name in TASKS)

    monkeypatch.setattr("eap_circuits.adapters.pretrained.load_tokenizer", lambda name: None)
    monkeypatch.setattr(session.Prompts, "load", lambda self, tokenizer: make_pairs(n=self.n))
    run("tasks", "ioi", "-n", 3, "-o", tmp_path / "t.safetensors")
    assert len(eap.PairedDataset.from_file(tmp_path / "t.safetensors", None)) == 3
    run("tasks", "-o", tmp_path / "t.safetensors", code=2)
    run("tasks", "nonsense", code=2)


@pytest.mark.parametrize("passed", [True, False])
def test_check_exits_1_when_a_check_fails(monkeypatch: pytest.MonkeyPatch, loads: list[str], passed: bool) -> None:
    from eap_circuits import evaluation

    checks = [Check("first", True, "fine"), Check("second", passed, "error [0.5]")]
    monkeypatch.setattr(evaluation, "check_model", lambda model: checks)
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
    assert "methods, experimental" in shown and all(name in shown for name in METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attribute", "tiny"], "--task, --data: expected one of them"),
        (["attribute", "tiny", "--task", "ioi", "--data", "x.csv"], "found both"),
        (["attribute", "tiny", "--task", "nonsense"], "--task: expected one of"),
        (["attribute", "tiny", "--task", "ioi", "--metric", "nonsense"], "--metric: expected one of"),
        (["attribute", "tiny", "--task", "ioi", "--metric", "rank"], "--metric: expected one of 'js_divergence'"),
        (["attribute", "tiny", "--task", "ioi", "--method", "nonsense"], "--method: expected one of"),
        (["attribute", "tiny", "--task", "ioi", "--ablation", "nonsense"], "--ablation: expected one of"),
        (["attribute", "tiny", "--task", "ioi", "--ablation-data", "x.csv"], "--ablation-data x.csv: expected a file"),
        (["attribute", "tiny", "--task", "ioi", "--quadrature", "nonsense"], "--quadrature: expected one of"),
        (["attribute", "tiny", "--task", "ioi", "--heads", "nonsense"], "--heads: expected one of"),
        (["attribute", "tiny", "--task", "ioi", "--rules", "nonsense"], "--rules: expected one of 'gim'"),
        (["attribute", "tiny", "--task", "ioi", "--how", "nonsense"], "--how: expected one of"),
        (["attribute", "tiny", "--task", "ioi", "--circuit", "c.json"], "--circuit: expected --edges"),
        (["attribute", "tiny", "--task", "ioi", "-o", "scores.csv"], "scores.csv: expected a name ending"),
        (["attribute", "tiny", "--data", "none.csv"], "--data none.csv: expected a file"),
        (["evaluate", "tiny", "none.json", "--task", "ioi"], "none.json: expected a file"),
        (["curve", "tiny", "none.safetensors", "--task", "ioi"], "none.safetensors: expected a file"),
        (["curve", "tiny", "s.pt", "--task", "ioi", "--fractions", "a,b"], "--fractions: expected numbers"),
        (["curve", "tiny", "s.pt", "--task", "ioi", "--baselines", "random,x"], "--baselines: expected one of"),
        (["curve", "tiny", "s.pt", "--task", "ioi", "-o", "curve.csv"], "curve.csv: expected a name ending"),
        (["report", "none.safetensors"], "none.safetensors: expected a file"),
        (["report", "none.safetensors", "-o", "r.pdf"], "r.pdf: expected a name ending"),
    ],
)
def test_bad_input_is_one_line_before_any_model(
    arguments: list[str], message: str, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, code=2)
    assert message in result.stderr
    assert result.stderr.startswith("eap: error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert loads == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["attribute", "tiny", "--task", "ioi", "-o", "none/s.safetensors"],
        ["attribute", "tiny", "--task", "ioi", "--edges", "9", "--circuit", "none/c.json"],
        ["curve", "tiny", "s.safetensors", "--task", "ioi", "-o", "none/c.json"],
        ["curve", "tiny", "s.safetensors", "--task", "ioi", "--html", "none/r.html"],
        ["report", "s.safetensors", "-o", "none/r.html"],
        ["tasks", "ioi", "-o", "none/t.safetensors"],
        ["demo", "--out", "a-file/folder"],
    ],
)
def test_output_that_cannot_be_written_is_refused_before_any_work(
    arguments: list[str], loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").write_text("")
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, code=2)
    assert result.stderr.startswith("eap: error: ")
    assert loads == []


def test_two_outputs_in_one_file_are_refused(loads: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    result = run("attribute", "tiny", "--task", "ioi", "-o", path, "--edges", 3, "--circuit", path, code=2)
    assert "a file for each" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (FileNotFoundError(2, "No such file", "x"), 2, "No such file"),
        (ImportError("no package", name="gguf"), 2, "no package"),
        (eap.InputError("model: two\nlines."), 2, "eap: error: model: two lines.\n"),
        (torch.OutOfMemoryError("out of memory"), 2, "--batch-size"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_the_work(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    pairs: Path,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(session, "load_model", fail)
    result = run("attribute", "tiny", "--data", pairs, code=code)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    if isinstance(error, Exception):
        with pytest.raises(type(error)):
            CliRunner().invoke(app, ["attribute", "tiny", "--data", str(pairs), "--debug"], catch_exceptions=False)


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch, pairs: Path) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(session, "load_model", fail)
    result = CliRunner().invoke(app, ["attribute", "tiny", "--data", str(pairs)])
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_error_leaves_the_files_as_they_were(
    tmp_path: Path, loads: list[str], pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.safetensors"
    out.write_bytes(b"before")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise eap.InputError("no.")

    monkeypatch.setattr(eap, "attribute", fail)
    run("attribute", "tiny", "--data", pairs, "-o", out, code=2)
    assert out.read_bytes() == b"before"
