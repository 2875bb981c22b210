"""eap learn: it saves and shows what the library learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import eap_circuits as eap

from .conftest import run


def test_it_learns_what_the_library_learns(tmp_path: Path, saved: Path, pairs: Path, make_model: Any) -> None:
    out, sizes = tmp_path / "learned.safetensors", ("--smallest", 5, "--largest", 50)
    asked = ("--steps", 2, "--circuits", 1, "--examples", 3, "--draw", 4, "--gates", "uniform", *sizes)
    found = run("learn", "tiny", saved, "--data", pairs, "-o", out, *asked, "--json")
    right = eap.learn_mask(
        make_model("llama", torch.float32),
        eap.PairedDataset.from_file(pairs),
        start=eap.EdgeScores.load(saved),
        steps=2,
        circuits=1,
        examples=3,
        seed=4,
        n_edges=(5, 50),
        gates="uniform",
    )
    learned = eap.EdgeScores.load(out)
    assert torch.equal(learned.values, right.values)
    assert json.loads(found.stdout)["info"]["learning"] == right.info["learning"]
    assert "eap learn" in learned.info["call"]


def test_half_a_range_of_sizes_is_refused_before_any_model(saved: Path, pairs: Path, loads: list[str]) -> None:
    result = run("learn", "tiny", saved, "--data", pairs, "--smallest", 5, code=2)
    assert "--smallest, --largest: expected both or neither, found one of them." in result.stderr
    assert not loads


def test_ibcircuit_learns_what_the_library_learns(
    tmp_path: Path, pairs: Path, loads: list[str], make_model: Any
) -> None:
    out, asked = tmp_path / "weights.safetensors", ("--steps", 2, "--examples", 3, "--draw", 4, "--beta", 0.5)
    found = run("ibcircuit", "tiny", "--data", pairs, "-o", out, *asked, "--heads", "query", "--json")
    right = eap.ibcircuit(
        make_model("llama", torch.float32),
        eap.PairedDataset.from_file(pairs),
        beta=0.5,
        steps=2,
        examples=3,
        heads="query",
        seed=4,
    )
    weights = eap.EdgeScores.load(out)
    assert torch.equal(weights.values, right.values)
    assert json.loads(found.stdout)["info"]["learning"] == right.info["learning"]
    assert "eap ibcircuit" in weights.info["call"]
