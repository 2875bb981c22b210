"""The leaderboard: its numbers from first principles, what an interruption leaves, and what its page says."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import eap_circuits as eap
from eap_circuits.cli import app, session
from eap_circuits.errors import InputError
from eap_circuits.leaderboard import Settings, leaderboard, measure, of_pairs, of_task, write_page
from eap_circuits.leaderboard.measure import FAITHFUL
from eap_circuits.leaderboard.page import edges_at, page

SETTINGS = Settings(scored=2, pairs=3, seeds=(0, 1), steps=2, fractions=(0.1, 0.5, 1.0))
RANKINGS = ("eap", "learned", "pruned", "pruned-learned", "ibcircuit")


@pytest.fixture
def model(make_model: Any) -> Any:
    return make_model("gpt2")


@pytest.fixture
def tasks(make_pairs: Any) -> dict[str, Any]:
    return {name: of_pairs(name, make_pairs(seed), SETTINGS) for seed, name in enumerate(("first", "second"))}


def test_circuits_run_on_pairs_that_no_ranking_saw(model: Any, tasks: dict[str, Any], tmp_path: Path) -> None:
    results = leaderboard(model, tasks, tmp_path, rankings=RANKINGS, settings=SETTINGS)
    for seed in SETTINGS.seeds:
        data = tasks["first"](seed)
        few, others = data[:2], data[2:]
        assert len(others) == 3 and not (few.clean[:, None] == others.clean[None]).all(-1).any()
        start = eap.attribute(model, few)
        pruned = eap.prune_gradually(model, few, start=start)
        found = {
            "eap": eap.attribute(model, few, method="eap"),
            "eap-ig-inputs": start,
            "learned": eap.learn_mask(model, few, start=start, steps=2, seed=seed),
            "pruned": pruned,
            "pruned-learned": eap.learn_mask(model, few, start=pruned, steps=2, seed=seed),
            "ibcircuit": eap.ibcircuit(model, few, "kl_divergence", steps=2, seed=seed),
        }
        for ranking, scores in found.items():
            circuits = [scores.select(int(f * scores.graph.n_edges), how="greedy") for f in SETTINGS.fractions]
            entry = results["tasks"]["first"][str(seed)][ranking]
            assert entry["curve"]["n_edges"] == [circuit.n_edges for circuit in circuits]
            right = [result.faithfulness for result in eap.evaluate(model, circuits, others)]
            assert entry["curve"]["faithfulness"] == pytest.approx(right, abs=1e-12)
            assert entry["seconds"] > 0 and entry["forwards"] > 0
        runs = results["tasks"]["first"][str(seed)]
        for later, earlier in {"pruned-learned": "pruned", "pruned": "eap-ig-inputs"}.items():
            assert runs[later]["seconds"] > runs[earlier]["seconds"], "what it starts from is part of its cost"
    first, second = (tasks["first"](seed).clean for seed in SETTINGS.seeds)
    assert not torch.equal(first, second), "a seed is one of the pairs"


def test_an_interrupted_run_goes_on_and_nothing_is_done_twice(
    model: Any, tasks: dict[str, Any], tmp_path: Path
) -> None:
    @contextlib.contextmanager
    def stop_at(what: str) -> Iterator[Any]:
        if what == "second, seed 0: learned":
            raise KeyboardInterrupt
        yield lambda done, total: None

    with pytest.raises(KeyboardInterrupt):
        leaderboard(model, tasks, tmp_path, rankings=RANKINGS, settings=SETTINGS, watch=stop_at)
    ran: list[str] = []

    @contextlib.contextmanager
    def watch(what: str) -> Iterator[Any]:
        yield lambda done, total: ran.append(what)

    whole = leaderboard(model, tasks, tmp_path, rankings=RANKINGS, settings=SETTINGS, watch=watch)
    left = {f"second, seed 0: {x}" for x in RANKINGS[1:]}
    assert set(ran) == {*left, *(f"second, seed 1: {x}" for x in ("eap-ig-inputs", *RANKINGS))}
    ran.clear()
    again = leaderboard(model, tasks, tmp_path, rankings=RANKINGS, settings=SETTINGS, watch=watch)
    assert not ran and again == whole


def test_what_does_not_belong_together_is_refused(
    model: Any, tasks: dict[str, Any], tmp_path: Path, make_model: Any, make_pairs: Any
) -> None:
    leaderboard(model, {"first": tasks["first"]}, tmp_path, rankings=["eap"], settings=SETTINGS)
    before = (tmp_path / "leaderboard.json").read_bytes()
    others = {"first": of_pairs("first", make_pairs(7), SETTINGS)}
    for case in ((model, others, SETTINGS), (make_model("llama"), tasks, SETTINGS), (model, tasks, Settings())):
        with pytest.raises(InputError, match="folder"):
            leaderboard(case[0], case[1], tmp_path, settings=case[2])
    with pytest.raises(InputError, match="rankings: expected one of"):
        leaderboard(model, tasks, tmp_path, rankings=["eap-ig"], settings=SETTINGS)
    with pytest.raises(InputError, match="tasks: expected at least one"):
        leaderboard(model, {}, tmp_path, settings=SETTINGS)
    with pytest.raises(InputError, match="mine: expected at least 5 pairs"):
        of_pairs("mine", make_pairs()[:4], SETTINGS)
    with pytest.raises(InputError, match="seeds: expected one or more different ones"):
        Settings(seeds=(1, 1))
    assert (tmp_path / "leaderboard.json").read_bytes() == before


def test_what_is_wrong_with_a_later_task_is_said_before_the_first_is_measured(
    model: Any, tasks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "attribute", lambda *_, **__: pytest.fail("it ran"))

    def beyond(seed: int) -> eap.PairedDataset:
        data = tasks["first"](seed)
        return dataclasses.replace(data, answers=data.answers + 1000)

    with pytest.raises(InputError, match="answers of example 0: expected token ids below"):
        leaderboard(model, {**tasks, "third": beyond}, tmp_path, settings=SETTINGS)
    with pytest.raises(InputError, match="task: expected one of"):
        leaderboard(model, {**tasks, "none": of_task("none", None, SETTINGS)}, tmp_path, settings=SETTINGS)


def test_the_size_at_a_faithfulness_is_that_of_the_smallest_circuit_that_has_it() -> None:
    curve = {"n_edges": [10, 20, 40, 100], "faithfulness": [0.2, 0.9, 0.8, 1.0]}
    assert [edges_at({"curve": curve}, least) for least in (0.1, 0.85, 0.95, 1.1)] == [10, 20, 100, 100]
    assert edges_at({"curve": {"n_edges": [10, 100], "faithfulness": [None, None]}}, 0.85) == 100
    between = [(14, 0.8), (17, 0.86), (63, 0.7), (80, 0.96)]
    assert [edges_at({"curve": curve, "between": between}, least) for least in (0.1, 0.85, 0.95)] == [10, 17, 80]


def test_sizes_between_those_of_the_curve_close_in_on_the_first_that_is_faithful(
    model: Any, tasks: dict[str, Any], tmp_path: Path
) -> None:
    results = leaderboard(model, {"first": tasks["first"]}, tmp_path, rankings=["eap"], settings=SETTINGS)
    for seed in SETTINGS.seeds:
        data, run = tasks["first"](seed), results["tasks"]["first"][str(seed)]["eap"]
        scores = eap.attribute(model, data[:2], method="eap")

        def ran(size: int, scores: Any = scores, others: Any = data[2:]) -> tuple[int, float]:
            circuit = scores.select(size, how="greedy")
            return circuit.n_edges, eap.evaluate(model, circuit, others).faithfulness

        right = set()
        for least in FAITHFUL:
            sizes = [int(f * scores.graph.n_edges) for f in SETTINGS.fractions]
            reached = [f >= least for f in run["curve"]["faithfulness"]]
            low, high = sizes[reached.index(True) - 1], sizes[reached.index(True)]
            assert not reached[0]
            for _ in range(3):
                middle = round((low * high) ** 0.5)
                right.add(ran(middle))
                low, high = (low, middle) if ran(middle)[1] >= least else (middle, high)
            assert edges_at(run, least) == ran(high)[0]
        assert {n for n, _ in run["between"]} == {n for n, _ in right}
        assert sorted(f for _, f in run["between"]) == pytest.approx(sorted(f for _, f in right), abs=1e-12)


def test_the_page_says_what_the_results_say(model: Any, tasks: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "leaderboard").mkdir()
    results = leaderboard(model, tasks, tmp_path / "leaderboard", rankings=RANKINGS, settings=SETTINGS)
    results = copy.deepcopy(results)
    # Numbers that no run would give, to be found again.
    for task, learned in {"first": [0.9, 0.95, 1.0], "second": [0.1, 0.9, 1.0]}.items():
        for seed, runs in results["tasks"][task].items():
            for ranking, values in {"eap-ig-inputs": [0.3, 0.5, 1.0], "learned": learned, "eap": [0, 0, 1.0]}.items():
                cmd = {"learned": 0.1, "eap": 0.3}.get(ranking, 0.2)
                runs[ranking] = {
                    "seconds": 60.0 if ranking == "learned" else 2.0,
                    "forwards": 1234.0 + int(seed),
                    "curve": {**runs[ranking]["curve"], "n_edges": [10, 50, 100], "faithfulness": values, "cmd": cmd},
                }
    text = page(results)
    assert (
        "`learned` beside `eap-ig-inputs`: at most a fifth of the edges at faithfulness 0.85 on 1 of 2 tasks (first), "
        "a lower CMD on 2 of 2 tasks, at no size less faithful on 1 of 2 tasks (first), 30 to 30 times its time."
        in text
    )
    assert "Between a curve's first such size and the one before, 3 more ran, by bisection in ratios." in text
    assert text.startswith(f"# Leaderboard on {results['request']['model']['name']}, 2 scored pairs")
    assert '"ibcircuit" is `ibcircuit` of the next-token divergence for 2 steps.' in text
    assert "| first | learned | 0.100 | 0.50 | 30 | no size |" in text
    assert (
        "| second | learned | 0.500 | 0.50 | 30 | 1 of 2 sizes (1 in every seed), most at 10: 0.200 (0.000) |" in text
    )
    assert "| first | learned |" in text and "1,234 (1,234–1,235)" in text
    files = write_page(results, tmp_path)
    assert (tmp_path / "leaderboard.md").read_text() == text
    pictures = [path for path in files if path.suffix == ".png"]
    assert sorted(path.stem for path in pictures) == ["cost", "faithfulness"]
    for path in pictures:
        assert f"(leaderboard/{path.name})" in text and path.read_bytes().startswith(b"\x89PNG")
    # A seed in which the ranking is no less faithful there.
    results["tasks"]["second"]["1"]["learned"]["curve"]["faithfulness"] = [0.4, 0.9, 1.0]
    assert "1 of 2 sizes (0 in every seed), most at 10: 0.050 (0.000) |" in page(results)
    # A ranking that some seeds do not have yet is compared on those that it has.
    for runs in results["tasks"].values():
        runs["1"]["eap-ig-inputs"]["curve"]["cmd"] = 0.0
    assert "a lower CMD on 0 of 2 tasks" in page(results)
    del results["tasks"]["second"]["1"]["learned"], results["tasks"]["first"]["1"]["learned"]
    text = page(results)
    assert "(except for `learned` of 0)" in text and "| second | learned |" in text
    assert "a lower CMD on 2 of 2 tasks" in text
    # So it was before sizes between those of curves were tried.
    del results["request"]["settings"]["bisections"]
    assert "bisection" not in page(results)
    # One that some tasks do not have is in the table, and compared with nothing.
    for runs in results["tasks"]["second"].values():
        del runs["ibcircuit"]
    text = page(results)
    assert "`ibcircuit` of 0, 1, on 1 of 2 tasks" in text and "`ibcircuit` beside" not in text
    assert "| first | ibcircuit |" in text and "| second | ibcircuit |" not in text


def test_one_file_of_ones_own_from_the_command_line(
    model: Any, make_pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "load_model", lambda *_, **__: (model, None))
    make_pairs().save(tmp_path / "mine.safetensors")
    arguments = ["leaderboard", "tiny", "--data", str(tmp_path / "mine.safetensors"), "--scored", "2", "-n", "3"]
    arguments += ["--seeds", "1", "--methods", "eap", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "| mine | eap |" in (tmp_path / "out" / "leaderboard.md").read_text()
    for option, value in {"--tasks": "ioi,none", "--methods": "best"}.items():
        refused = CliRunner().invoke(app, ["leaderboard", "tiny", option, value, "--out", str(tmp_path / "no")])
        assert refused.exit_code == 2 and option in refused.stderr and not (tmp_path / "no").exists()
