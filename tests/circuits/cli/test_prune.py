"""eap prune: it saves and shows what the library finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import eap_circuits as eap

from .conftest import run


def test_it_prunes_as_the_library_does(tmp_path: Path, saved: Path, pairs: Path, make_model: Any) -> None:
    out, asked = tmp_path / "pruned.safetensors", ("--keep", 0.5, "--smallest", 5, "--largest", 50)
    found = run("prune", "tiny", saved, "--data", pairs, "-o", out, *asked, "--json")
    start, data = eap.EdgeScores.load(saved), eap.PairedDataset.from_file(pairs)
    right = eap.prune_gradually(make_model("llama", torch.float32), data, start=start, keep=0.5, n_edges=(5, 50))
    pruned = eap.EdgeScores.load(out)
    assert torch.equal(pruned.values, right.values)
    assert json.loads(found.stdout)["info"]["pruning"] == right.info["pruning"]
    assert "eap prune" in pruned.info["call"]


def test_half_a_range_of_sizes_is_refused_before_any_model(saved: Path, pairs: Path, loads: list[str]) -> None:
    result = run("prune", "tiny", saved, "--data", pairs, "--largest", 5, code=2)
    assert "--smallest, --largest: expected both or neither, found one of them." in result.stderr
    assert not loads
