"""The comparison of methods: its numbers from first principles, and what an interruption leaves."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import eap_circuits as eap
from eap_circuits.cli import app, session
from eap_circuits.errors import InputError
from eap_circuits.reproduction import Experiment, Settings, reproduce, write_page
from eap_circuits.reproduction.page import markdown

SETTINGS = Settings(scored=2, pairs=3, steps=2, draws=2, grid=(1, 2), reference=4, fractions=(0.1, 0.5, 1.0))


@pytest.fixture
def stats() -> Any:
    return pytest.importorskip("scipy.stats")


@pytest.fixture
def model(make_model: Any) -> Any:
    return make_model("gpt2")


@pytest.fixture
def experiments(make_pairs: Any) -> list[Experiment]:
    return [Experiment.from_data(name, make_pairs(seed), SETTINGS) for seed, name in enumerate(("first", "second"))]


def test_pairs_that_score_are_not_those_that_circuits_run_on(make_pairs: Any) -> None:
    pairs = make_pairs()
    found = Experiment.from_data("mine", pairs, Settings(scored=50, pairs=50))
    assert len(found.scored) == len(pairs) // 2
    together = torch.cat([found.scored.clean, found.held_out.clean])
    assert torch.equal(together, pairs.clean)
    with pytest.raises(InputError, match="at least 2 pairs"):
        Experiment.from_data("mine", pairs[:1], SETTINGS)


def test_agreement_is_that_of_scipy(stats: Any, model: Any, experiments: list[Experiment], tmp_path: Path) -> None:
    entry = reproduce(model, experiments[:1], tmp_path, SETTINGS)["tasks"]["first"]
    data = experiments[0].scored
    exact = eap.attribute(model, data, method="exact")
    edges = exact.graph.edge_mask
    for method in ("eap", "eap-ig-inputs"):
        values = eap.attribute(model, data, method=method, steps=2).values[edges].double()
        right = exact.values[edges].double()
        rest = right.abs().argsort(descending=True)[10:]
        assert entry["rest"][method]["pearson"] == pytest.approx(stats.pearsonr(values[rest], right[rest])[0], abs=1e-6)
        count = max(1, len(right) // 100)
        by_exact, by_method = (set(x.abs().argsort(descending=True)[:count].tolist()) for x in (right, values))
        assert entry["strongest"][method]["found"] == len(by_exact & by_method) / count
        assert entry["agreement"][method]["pearson"] == pytest.approx(stats.pearsonr(values, right)[0], abs=1e-6)
        assert entry["agreement"][method]["spearman"] == pytest.approx(stats.spearmanr(values, right)[0], abs=1e-6)


def test_ties_share_a_rank_and_constants_have_no_correlation(stats: Any) -> None:
    graph = eap.Graph(n_heads=(2, 2), n_kv_heads=(2, 2), d_model=8)
    rng = np.random.default_rng(0)
    first, second = (
        eap.EdgeScores(graph, torch.tensor(rng.integers(-2, 3, graph.edge_mask.shape), dtype=torch.float32))
        for _ in range(2)
    )
    a, b = (scores.values[graph.edge_mask].numpy() for scores in (first, second))
    found = eap.score_agreement(first, second)
    assert found.spearman == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-12)
    assert found.pearson == pytest.approx(stats.pearsonr(a, b)[0], abs=1e-7)
    few = torch.zeros_like(graph.edge_mask)
    few[:3] = True
    a, b = (scores.values[graph.edge_mask & few].numpy() for scores in (first, second))
    assert eap.score_agreement(first, second, among=few).spearman == pytest.approx(stats.spearmanr(a, b)[0], abs=1e-12)
    constant = eap.EdgeScores(graph, torch.ones(graph.edge_mask.shape))
    assert np.isnan(eap.score_agreement(first, constant).pearson)
    with pytest.raises(InputError, match="finite"):
        eap.score_agreement(first, eap.EdgeScores(graph, torch.full(graph.edge_mask.shape, torch.nan)))


def test_quadrature_errors_and_shared_edges_are_those_of_their_definitions(
    model: Any, experiments: list[Experiment], tmp_path: Path, relative: Any
) -> None:
    results = reproduce(model, experiments, tmp_path, SETTINGS)
    data = experiments[0].scored
    integral = eap.attribute(model, data, steps=4, quadrature="gauss-legendre").values
    one_step = eap.attribute(model, data, method="eap").values  # one step of the right grid
    error = relative(one_step, integral)
    assert results["tasks"]["first"]["quadrature"]["right"]["1"]["error"] == pytest.approx(error, rel=1e-5)
    circuits = {}
    for experiment in experiments:
        curve = results["tasks"][experiment.name]["curves"]["eap-ig-inputs"]
        faithful = [f for f, found in zip((0.1, 0.5), curve["faithfulness"], strict=False) if found >= 0.85]
        scores = eap.attribute(model, experiment.scored, steps=2)
        size = int((faithful[0] if faithful else 0.5) * scores.graph.n_edges)
        circuits[experiment.name] = set(scores.select(size, how="greedy").edges)
    shared = len(circuits["first"] & circuits["second"]) / len(circuits["first"] | circuits["second"])
    assert results["cross"]["first"]["second"]["edges"] == pytest.approx(shared)
    assert results["cross"]["second"]["second"]["edges"] == 1


class _Stopped(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_stopped(model: Any, experiments: list[Experiment], tmp_path: Path) -> None:
    begun: list[str] = []

    @contextlib.contextmanager
    def stop_at(count: int, what: str) -> Iterator[Any]:
        begun.append(what)
        if len(begun) == count:
            raise _Stopped
        yield lambda done, total: None

    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for folder in (whole, pieces):
        folder.mkdir()
    right = reproduce(model, experiments, whole, SETTINGS, lambda what: stop_at(-1, what))
    stages, scored = len(begun), sum("scores" in what for what in begun)
    for _ in range(stages):
        begun.clear()
        try:
            found = reproduce(model, experiments, pieces, SETTINGS, lambda what: stop_at(scored + 2, what))
            break
        except _Stopped:
            assert json.loads((pieces / "results.json").read_text())["request"] == right["request"]
    else:
        raise AssertionError("no progress")
    for results in (found, right):
        del results["environment"]["date"]  # midnight may lie between
    assert found == right
    part = reproduce(model, experiments[:1], pieces, SETTINGS)
    assert list(part["tasks"]) == ["first"] and part["tasks"]["first"] == right["tasks"]["first"]
    begun.clear()
    reproduce(model, experiments, pieces, SETTINGS, lambda what: stop_at(-1, what))
    assert not [what for what in begun if "scores" not in what], "what is done is not done again"


def test_results_of_something_else_are_refused_and_kept(
    model: Any, experiments: list[Experiment], tmp_path: Path, make_model: Any, make_pairs: Any
) -> None:
    reproduce(model, experiments[:1], tmp_path, SETTINGS)
    path = tmp_path / "results.json"
    before = path.read_bytes()
    other = [Experiment.from_data("first", make_pairs(5), SETTINGS)]
    with pytest.raises(InputError, match="folder"):
        reproduce(model, other, tmp_path, SETTINGS)
    with pytest.raises(InputError, match="folder"):
        reproduce(make_model("llama"), experiments, tmp_path, SETTINGS)
    with pytest.raises(InputError, match="folder"):
        reproduce(model, experiments, tmp_path, Settings())
    with pytest.raises(InputError, match="different names"):
        reproduce(model, [*experiments, experiments[0]], tmp_path, SETTINGS)
    assert path.read_bytes() == before
    path.write_text("[]")
    with pytest.raises(InputError, match="results of a reproduction"):
        reproduce(model, experiments, tmp_path, SETTINGS)
    assert path.read_text() == "[]"


def test_the_page_says_what_the_results_say(model: Any, experiments: list[Experiment], tmp_path: Path) -> None:
    (tmp_path / "reproduction").mkdir()
    results = reproduce(model, experiments, tmp_path / "reproduction", SETTINGS)
    # Numbers that no run would give, to be found again.
    for name, (eap_value, ig_value) in {"first": (0.111, 0.222), "second": (0.444, 0.333)}.items():
        agreement = results["tasks"][name]["agreement"]
        agreement["eap"]["pearson"], agreement["eap-ig-inputs"]["pearson"] = eap_value, ig_value
    files = write_page(results, tmp_path)
    text = (tmp_path / "reproduction.md").read_text()
    better = "By Pearson's correlation, EAP-IG agrees better with exact patching than EAP on 1 of 2 tasks"
    assert f"{better} (not on second)." in text
    for value in ("0.111", "0.222", "0.444", "0.333"):
        assert value in text
    with (tmp_path / "reproduction" / "agreement.csv").open(newline="") as file:
        assert [row["EAP Pearson"] for row in csv.DictReader(file)] == ["0.111", "0.444"]
    pictures = [path for path in files if path.suffix == ".png"]
    assert sorted(path.stem for path in pictures) == ["agreement", "cross", "faithfulness", "quadrature"]
    for path in pictures:
        assert f"(reproduction/{path.name})" in text
        assert path.read_bytes().startswith(b"\x89PNG")


def test_one_file_of_ones_own_from_the_command_line(
    model: Any, make_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "load_model", lambda *_, **__: (model, None))
    monkeypatch.setattr("eap_circuits.reproduction.Settings", lambda **given: Settings(**{**vars(SETTINGS), **given}))
    make_pairs().save(tmp_path / "mine.safetensors")
    arguments = ["reproduce", "tiny", "--data", str(tmp_path / "mine.safetensors"), "--scored", "2", "-n", "3"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, (result.stderr, result.exception)
    text = (tmp_path / "out" / "reproduction.md").read_text()
    assert "| mine |" in text and "cross-task" not in text
    assert str(tmp_path / "out" / "reproduction.md") in result.stdout.replace("\n", "")
    refused = CliRunner().invoke(app, ["reproduce", "tiny", "--tasks", "ioi,none", "--out", str(tmp_path / "no")])
    assert refused.exit_code == 2 and "--tasks" in refused.stderr and not (tmp_path / "no").exists()
    refused = CliRunner().invoke(app, ["reproduce", "tiny", "--align", "--out", str(tmp_path / "no")])
    assert refused.exit_code == 2 and "--data" in refused.stderr and not (tmp_path / "no").exists()


def test_a_stage_in_progress_goes_on_too(
    model: Any, make_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eap_circuits.checkpoint.file.SECONDS_BETWEEN_SAVES", 0.0)
    experiments = [Experiment.from_data("mine", make_pairs(1), SETTINGS)]
    steps: list[tuple[str, int]] = []

    @contextlib.contextmanager
    def stop_at(count: int, what: str) -> Iterator[Any]:
        def step(done: int, total: int) -> None:
            steps.append((what, done))
            if len(steps) == count:
                raise _Stopped

        yield step

    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for folder in (whole, pieces):
        folder.mkdir()
    right = reproduce(model, experiments, whole, SETTINGS, lambda what: stop_at(-1, what))
    every = steps.copy()
    steps.clear()
    for count in (1, 3, len(every) // 2, len(every) - 1):
        file = pieces / "checkpoint.safetensors"
        with pytest.raises(_Stopped):
            reproduce(model, experiments, pieces, SETTINGS, lambda what, count=count: stop_at(count, what))
        assert file.exists()
    found = reproduce(model, experiments, pieces, SETTINGS, lambda what: stop_at(-1, what))
    assert found == right and not file.exists()
    ran, once = ([step for step in found if "integration" not in step[0]] for found in (steps, every))
    assert ran == once, "no batch is run twice"


def test_a_name_does_not_end_its_cell() -> None:
    assert markdown([("task", "edges"), ("a|b", 1)]) == "| task | edges |\n|---|---|\n| a\\|b | 1 |"
