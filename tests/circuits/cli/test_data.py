"""eap data, and what the command line says of prompts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import eap_circuits as eap
from tests.circuits.cli.conftest import run


def test_data_shows_what_the_library_finds(pairs: Path, loads: list[str], make_model: Any, make_pairs: Any) -> None:
    wanted = asdict(eap.summarise(make_model("llama", torch.float32), make_pairs()))
    found = json.loads(run("data", "tiny", "--data", pairs, "--json").stdout)
    assert loads == ["tiny"]
    for name, value in wanted.items():
        assert found[name] == pytest.approx(list(value) if isinstance(value, tuple) else value)
    shown = run("data", "tiny", "--data", pairs)
    assert f"{wanted['good']:.3g}" in shown.stdout and "different pairs" in shown.stdout
    run("data", "tiny", "--task", "ioi", "--data", pairs, code=2)


@pytest.mark.parametrize("command", ["data", "attribute"])
def test_warnings_about_prompts_are_shown_once(
    command: str, tmp_path: Path, pairs: Path, loads: list[str], make_pairs: Any
) -> None:
    data = make_pairs()
    alike = eap.PairedDataset.from_tokens(data.clean, data.clean, data.lengths, data.answers)
    alike.save(tmp_path / "alike.safetensors")
    said = run(command, "tiny", "--data", tmp_path / "alike.safetensors").stderr
    assert said.count("eap: warning: data: on 7 of 7 pairs the corrupted prompt is the clean one") == 1
    assert "warning" not in run(command, "tiny", "--data", pairs).stderr
