"""What the commands refuse and how they fail: one line, an exit code, files left as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import eap_circuits as eap
from eap_circuits.cli import app, session
from tests.circuits.cli.conftest import run


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
