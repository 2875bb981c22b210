"""eap refine: it saves and shows what the library finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import eap_circuits as eap

from .conftest import run


def test_it_refines_as_the_library_does(tmp_path: Path, saved: Path, pairs: Path, make_model: Any) -> None:
    before, after = tmp_path / "circuit.json", tmp_path / "refined.json"
    eap.EdgeScores.load(saved).select(20, exactly=True).save(before)
    found = run("refine", "tiny", before, "--data", pairs, "-o", after, "--rounds", 2, "--candidates", 4)
    model, data = make_model("llama", torch.float32), eap.PairedDataset.from_file(pairs)
    right = eap.refine(model, eap.Circuit.load(before), data, rounds=2, candidates=4)
    assert torch.equal(eap.Circuit.load(after).mask, right.mask)
    assert f"{right.n_edges} of {right.graph.n_edges} edges are left" in found.stdout
    assert f"{right.info['refining']['after']:.4g} now" in found.stdout
