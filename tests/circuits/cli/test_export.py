"""eap export: the checkpoint, what is said of it, and what is refused before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import eap_circuits as eap
from eap_circuits.adapters import bind

from .conftest import run


def test_a_checkpoint_is_written_and_described(tmp_path: Path, loads: list[str], make_model: Any) -> None:
    model, circuit = make_model("llama", torch.float32), tmp_path / "circuit.json"
    graph = bind(model).graph("kv")
    kept = torch.tensor([float(name in ("a0.h0", "m0", "a2.h1")) for name in graph.senders])
    eap.NodeScores(graph, kept).select(3).save(circuit)
    found = json.loads(run("export", "tiny", circuit, "-o", tmp_path / "small", "--json").stdout)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.num_hidden_layers == 2 and found["heads"] == [1, 1] and found["heads_before"] == [6, 6, 6]
    assert (found["weights"], found["of"]) == tuple(
        sum(x.numel() for x in each.parameters()) for each in (small, model)
    )
    shown = run("export", "tiny", circuit, "-o", tmp_path / "other").stdout
    assert f"2 of 3 layers, 2 of 18 heads, {found['weights']:,} of {found['of']:,} weights are left." in shown
    assert f"Wrote {tmp_path / 'other'}." in shown.replace("\n", "")


def test_refused_before_any_model(tmp_path: Path, loads: list[str]) -> None:
    for circuit, folder, said in (
        (tmp_path / "none.json", tmp_path / "small", "none.json: expected a file"),
        (tmp_path / "none.json", tmp_path, "expected a new or an empty folder"),
    ):
        (tmp_path / "mine.txt").write_text("")
        assert said in " ".join(run("export", "tiny", circuit, "-o", folder, code=2).stderr.split())
    assert not loads
