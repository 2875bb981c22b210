"""What a command has computed outlives its errors: saved first, else elsewhere, and shown before the command ends."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import eap_circuits as eap
from eap_circuits import report
from eap_circuits.cli import session
from eap_circuits.files import InputError
from tests.circuits.cli.conftest import run


def fail(*args: Any, **kwargs: Any) -> None:
    raise InputError("it: expected room, found none.")


@pytest.fixture
def spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "spare"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def elsewhere(result: Any, name: str) -> Path:
    """The file that the one line of the error names."""
    line = result.stderr
    assert line.startswith("eap: error: ") and line.count("\n") == 1
    found = re.search(rf"The file with the {name} is (\S+) instead\.", line)
    assert found, line
    return Path(found[1])


def right(make_model: Any, make_pairs: Any) -> eap.EdgeScores:
    return eap.attribute(make_model("llama", torch.float32), make_pairs(), method="eap")


@pytest.mark.parametrize("edges", [10**5, 10**9])
def test_more_edges_than_there_are_are_refused_before_scoring(
    edges: int, loads: list[str], pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eap, "attribute", lambda *_, **__: pytest.fail("scored"))
    result = run("attribute", "tiny", "--data", pairs, "--edges", edges, "-o", tmp_path / "s.json", code=2)
    assert f"the edges that the model has, found {edges:,}" in result.stderr


def test_formats_without_a_place_for_the_model_are_refused_before_scoring(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: list[str]
) -> None:
    from eap_circuits.adapters.architecture import Architecture

    monkeypatch.setattr(eap, "attribute", lambda *_, **__: pytest.fail("scored"))
    monkeypatch.setattr(Architecture, "graph", lambda *_: eap.Graph((4, 2), (2, 2), 16))
    for name in ("s.json", "s.pt", "S.PT"):
        result = run("attribute", "tiny", "--data", pairs, "-o", tmp_path / name, code=2)
        assert "EAP-IG's formats: expected the same number of heads" in result.stderr


@pytest.mark.parametrize("saving", [True, False])
def test_scores_outlive_a_failed_choice(
    saving: bool, loads: list[str], pairs: Path, tmp_path: Path, spare: Path, monkeypatch: pytest.MonkeyPatch,
    make_model: Any, make_pairs: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(eap.EdgeScores, "select", fail)
    out = ("-o", tmp_path / "s.safetensors") if saving else ()
    result = run("attribute", "tiny", "--data", pairs, "--method", "eap", "--edges", 9, *out, code=2)
    kept = tmp_path / "s.safetensors" if saving else elsewhere(result, "scores")
    assert torch.equal(eap.EdgeScores.load(kept).values, right(make_model, make_pairs).values)
    assert "it: expected room, found none." in result.stderr and "sender" in result.stdout
    assert list(spare.iterdir()) == ([] if saving else [kept])


def test_scores_and_circuit_outlive_a_full_disk(
    loads: list[str], pairs: Path, tmp_path: Path, spare: Path, monkeypatch: pytest.MonkeyPatch,
    make_model: Any, make_pairs: Any,
) -> None:  # fmt: skip
    import os

    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).parent == tmp_path:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("eap_circuits.files.os.replace", full)
    files = ("-o", tmp_path / "s.json", "--circuit", tmp_path / "c.json")
    result = run("attribute", "tiny", "--data", pairs, "--method", "eap", "--edges", 9, *files, "--json", code=2)
    scores, circuit = (elsewhere(result, name) for name in ("scores", "circuit"))
    wanted = right(make_model, make_pairs)
    assert torch.equal(eap.EdgeScores.load(scores).values, wanted.values)
    assert eap.Circuit.load(circuit) == wanted.select(9, exactly=True)
    assert "No space left on device" in result.stderr and json.loads(result.stdout)["files"] == {}
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.safetensors", "spare"}


@pytest.mark.parametrize("error", [InputError("no."), RuntimeError("no such font"), ImportError("no matplotlib")])
def test_a_curve_outlives_its_page(
    error: Exception, saved: Path, pairs: Path, tmp_path: Path, spare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    import eap_circuits.report.html

    monkeypatch.setattr(eap_circuits.report.html, "write_report", broken)
    call = ("curve", "tiny", saved, "--data", pairs, "--fractions", "0.5,1", "--html", tmp_path / "r.html")
    result = run(*call, code=2)
    assert report.load_curve(elsewhere(result, "curve")).fractions == (0.5, 1.0)
    assert str(error) in result.stderr and "CPR" in result.stdout
    result = run(*call, "-o", tmp_path / "c.json", code=2)
    assert report.load_curve(tmp_path / "c.json").fractions == (0.5, 1.0)


def test_results_outlive_an_interruption_of_what_follows(
    saved: Path, spare: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    def left(*command: Any) -> str:
        result = run(*command, "--data", pairs, code=130)
        found = re.search(r"^The file with the \w+ is (\S+) instead\.$", result.stderr, re.M)
        assert found and result.stderr.endswith("eap: error: interrupted\n")
        return found[1]

    circuit = tmp_path / "c.safetensors"
    eap.EdgeScores.load(saved).select(9).save(circuit)
    monkeypatch.setattr(report, "write_report", stop)
    page = ("--html", tmp_path / "page.html", "--draws", 1)
    assert report.load_curve(left("curve", "tiny", saved, *page, "--fractions", "0.5,1")).fractions == (0.5, 1)
    assert json.loads(Path(left("card", "tiny", circuit, *page, "--most-edges", 0)).read_text())["n_edges"]
    monkeypatch.setattr(eap.EdgeScores, "select", stop)
    scores = eap.EdgeScores.load(left("attribute", "tiny", "--edges", 9, "--steps", 2))
    assert torch.equal(scores.values, eap.EdgeScores.load(saved).values)


def test_the_demo_s_results_outlive_its_page(
    loads: list[str], tmp_path: Path, spare: Path, monkeypatch: pytest.MonkeyPatch, make_pairs: Any
) -> None:
    import eap_circuits.report.html

    monkeypatch.setattr(session.Prompts, "load", lambda *given: make_pairs())
    monkeypatch.setattr(eap_circuits.report.html, "write_report", fail)
    result = run("demo", "--out", tmp_path, code=2)
    assert "expected room" in result.stderr and "CPR" in result.stdout
    assert (
        eap.Circuit.load(tmp_path / "circuit.json").graph == eap.EdgeScores.load(tmp_path / "scores.safetensors").graph
    )


def test_results_of_a_command_name_it(saved: Path, pairs: Path, tmp_path: Path) -> None:
    info = eap.EdgeScores.load(saved).info
    assert info["call"] == f"eap attribute tiny --data {pairs.name} -o {saved.name} --steps 2"
    run("curve", "tiny", saved, "--data", pairs, "--fractions", "1", "-o", tmp_path / "c.json")
    curve = report.load_curve(tmp_path / "c.json")
    assert curve.info["call"].startswith("eap curve tiny scores.safetensors --data") and curve.info["scores"] == info
    circuit = tmp_path / "c.json"
    eap.EdgeScores.load(saved).select(9).save(circuit)
    found = json.loads(run("evaluate", "tiny", circuit, "--data", pairs, "--json").stdout)
    assert found["info"]["call"] == f"eap evaluate tiny c.json --data {pairs.name} --json"
