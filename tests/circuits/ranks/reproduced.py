"""A check of `eap reproduce` on ranks, for `runs.py`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from eap_circuits.reproduction import Experiment, Settings, reproduce
from tests.circuits.conftest import random_pairs, tiny_model
from tests.circuits.ranks.forked import on_ranks


def reproduced() -> list[str]:
    """All its stages, to the numbers of one process on every rank."""
    settings = Settings(scored=2, pairs=3, steps=2, draws=1, grid=(1,), reference=2, fractions=(0.5,))
    model = tiny_model("gpt2", torch.float32)
    experiments = [Experiment.from_data(str(seed), random_pairs(seed, n=5), settings) for seed in (1, 2)]

    def numbers(folder: Path) -> str:
        found = reproduce(model, experiments, folder, settings)
        return json.dumps([found["tasks"], found["cross"]])

    with tempfile.TemporaryDirectory() as alone, tempfile.TemporaryDirectory() as shared:
        right, found = numbers(Path(alone)), on_ranks(2, lambda _: numbers(Path(shared)))
        written = json.loads((Path(shared) / "results.json").read_text())
    if json.loads(right) != [written["tasks"], written["cross"]]:
        return ["other numbers in the file"]
    return [] if found == [right] * 2 else [f"{found}, not {right}"]


CHECKS = {"reproduced": reproduced}
