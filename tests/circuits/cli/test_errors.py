"""What the commands refuse and how they fail: one line, an exit code, files left as they were."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import eap_circuits as eap
from eap_circuits.cli import app, session
from eap_circuits.tasks import loading
from tests.circuits.cli.conftest import run
from tests.circuits.generated.generated_tasks import TOKENIZERS


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
        *(
            (
                ["curve", "tiny", "s.pt", "--task", "ioi", "--fractions", given],
                "--fractions: expected growing numbers in",
            )
            for given in ("a,b", "0.5,0.1", "0.1,0.1", "0,0.5", "0.5,2", "nan", "")
        ),
        (["attribute", "tiny", "--task", "ioi", "--ablation", "optimal"], "--ablation: expected one of"),
        (["attribute", "tiny", "--task", "ioi", "--keep", "variance,all"], "keep: expected one of"),
        (
            ["attribute", "tiny", "--task", "ioi", "--method", "exact", "--keep", "neurons"],
            "keep: expected",
        ),
        (["attribute", "tiny", "--task", "ioi", "--method", "exact", "--rules", "relp"], "rules: expected None"),
        (["attribute", "tiny", "--task", "ioi", "--method", "exact", "--dry-run"], "method: expected one whose memory"),
        (["attribute", "tiny", "--task", "ioi", "--steps", "99999"], "steps: expected a whole number from 1"),
        (["attribute", "tiny", "--task", "ioi", "--memory", "much"], "--memory: expected bytes"),
        (["attribute", "tiny", "--task", "ioi", "--seed", str(2**70)], "--seed: expected a whole number from"),
        (["acdc", "tiny", "0", "--task", "ioi"], "threshold: expected a positive number"),
        (["acdc", "tiny", "0.1", "--task", "ioi", "--ablation", "optimal"], "--ablation: expected one of"),
        (["learn", "tiny", "s.pt", "--task", "ioi", "--rate", "0"], "--rate: expected a positive number"),
        (["prune", "tiny", "s.pt", "--task", "ioi", "--keep", "1"], "--keep: expected a share between 0 and 1"),
        (["ibcircuit", "tiny", "--task", "ioi", "--beta", "inf"], "--beta: expected a number of at least 0"),
        (["curve", "tiny", "s.pt", "--task", "ioi", "--baselines", "random,x"], "--baselines: expected one of"),
        (["curve", "tiny", "s.pt", "--task", "ioi", "-o", "curve.csv"], "curve.csv: expected a name ending"),
        (["report", "none.safetensors"], "none.safetensors: expected a file"),
        (
            ["leaderboard", "--data", "a/x.csv", "--data", "b/x.csv"],
            "--tasks, --data: expected tasks and files of differ",
        ),
        (["reproduce", "--tasks", "ioi", "--data", "ioi.csv"], "of different names, found ioi, ioi.csv."),
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


def test_files_are_read_once_and_refused_before_any_model(
    loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.csv").write_text("prompt,answer\n")
    (tmp_path / "cut.jsonl").write_text('{"clean": "a')
    for name, message in {"empty.csv": "row 1: expected columns", "cut.jsonl": "line 1: expected a JSON obj"}.items():
        assert f"{name}: {message}" in run("attribute", "tiny", "--data", tmp_path / name, code=2).stderr
    given = ("--ablation", "mean", "--ablation-data", tmp_path / "cut.jsonl")
    assert "cut.jsonl" in run("evaluate", "tiny", "c.json", "--task", "ioi", *given, code=2).stderr
    assert "--ablation: expected" in run("evaluate", "tiny", "c.json", "--task", "ioi", *given[2:], code=2).stderr
    assert loads == []


def test_records_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"clean": "Ann met", "corrupted": "Ann met", "answers": [3, 4]}) + "\n")
    parsed, parse = list[str](), loading.parse_json
    monkeypatch.setattr(loading, "parse_json", lambda text: parsed.append(text) or parse(text))
    prompts = session.Prompts(None, file, ablation_data=file, ablation="mean")
    prompts.check()
    assert len(prompts.load(None, TOKENIZERS["single digits"]())) == 1 and len(parsed) == 2  # one for each file


def test_what_scores_and_circuits_do_not_allow_is_refused_before_any_model(
    saved: Path, pairs: Path, loads: list[str], make_model: Any, make_pairs: Any, tmp_path: Path
) -> None:
    n, data = eap.EdgeScores.load(saved).graph.n_edges, ("--data", pairs)
    for sizes, message in {(9, 3): "expected the smaller number first", (1, n + 1): f"from 1 to {n:,}"}.items():
        asked = ("--smallest", sizes[0], "--largest", sizes[1])
        for command in ("learn", "prune"):
            assert message in run(command, "tiny", saved, *data, *asked, code=2).stderr
    spanned = make_pairs()
    spanned = dataclasses.replace(spanned, spans=torch.zeros_like(spanned.clean), span_names=("all",))
    by_span = eap.attribute(make_model("llama"), spanned, method="eap", keep="spans").by_span()
    scores, circuit = (tmp_path / f"{name}.safetensors" for name in ("by_span", "circuit"))
    by_span.save(scores)
    by_span.select(9).save(circuit)
    assert "start: expected one without spans" in run("learn", "tiny", scores, *data, code=2).stderr
    assert "circuit: expected one without spans" in run("refine", "tiny", circuit, *data, code=2).stderr
    folder = tmp_path / "small"
    assert "circuit: expected one without spans" in run("export", "tiny", circuit, "-o", folder, code=2).stderr
    assert "scores: expected those of" in run("card", "tiny", circuit, *data, "--scores", saved, code=2).stderr
    assert loads == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor-parallel", "2", "attribute", "tiny"], "tensor_parallel: expected a divisor of 1"),
        (["attribute", "tiny", "--tensor-parallel=2"], "tensor_parallel: expected a divisor of 1"),
        (
            ["attribute", "tiny", "--tensor-parallel", "2", "--no-weights", "--dry-run"],
            "--tensor-parallel: expected a model with",
        ),
    ],
)
def test_a_model_is_divided_among_the_processes_that_there_are(arguments: list[str], message: str, pairs: Path) -> None:
    assert message in run(*arguments, "--data", pairs, code=2).stderr


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
