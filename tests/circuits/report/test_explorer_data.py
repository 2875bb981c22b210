"""The data that the report's explorer reads: which edges are kept, and what examples and positions are called."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

import eap_circuits as eap
from eap_circuits import Circuit
from eap_circuits.report import explorer, write_report
from tests.circuits.report.test_explorer import scored
from tests.circuits.report.test_figures import GRAPHS


def test_of_many_edges_the_strongest_and_the_circuits_are_kept() -> None:
    scores = scored(GRAPHS["kv"])
    weak = torch.zeros_like(scores.graph.edge_mask)
    u, v = divmod(int(scores.values.abs().masked_fill(~scores.graph.edge_mask, 9e9).argmin()), weak.shape[1])
    weak[u, v] = True
    circuit = Circuit(scores.graph, weak, scores.values)
    content = json.loads(explorer.page_data(scores, circuit, None, None, None, "", kept=50))
    kinds = {"u2": "<u2", "f4": "<f4", "u1": "u1"}
    read = {
        name: numpy.frombuffer(base64.b64decode(x["data"]), kinds[x["type"]]) for name, x in content["edges"].items()
    }
    found = list(zip(read["u"].tolist(), read["v"].tolist()))
    names = [(scores.graph.senders[a], scores.graph.receivers[b]) for a, b in found]
    assert names[:49] == [(a, b) for a, b, _ in scores.top_edges(49)] and found[49] == (u, v)
    assert read["score"].tolist() == [float(scores.values[a, b]) for a, b in found]
    assert content["total"] == scores.graph.n_edges > len(found) == 50


def test_examples_have_the_prompts_that_were_scored_and_no_others(
    make_model: Any, make_pairs: Any, tmp_path: Path
) -> None:
    data = replace(make_pairs(n=3), prompts=tuple((f"clean {i}", "corrupted") for i in range(3)))
    model, other = make_model("llama"), replace(data, prompts=(("another", "one"),) * 3)
    scores = eap.attribute(model, data, method="eap", keep="examples")
    curve = eap.faithfulness_curve(model, scores, data, (0.5, 1.0))
    for given, own in ((data, True), (other, False)):
        content = json.loads(explorer.page_data(scores, curve.circuits[0], curve, None, given, ""))
        (profile,) = content["profiles"]
        assert profile["labels"] == [f"{i}: clean {i}" if own else f"example {i}" for i in range(3)]
        values = numpy.frombuffer(base64.b64decode(profile["values"]["data"]), "<f4").reshape(3, -1)
        assert values.shape[1] == profile["edges"] == scores.graph.n_edges
        assert values.mean(0) == pytest.approx(
            numpy.frombuffer(base64.b64decode(content["edges"]["score"]["data"]), "<f4"), abs=1e-6
        )
        write_report(tmp_path / "r.html", scores, curve.circuits[0], curve, given)
        text = (tmp_path / "r.html").read_text()
        result = curve.results[0]
        kept = (result.values[0] - result.corrupted_values[0]) / (result.clean_values[0] - result.corrupted_values[0])
        numbers = (float(x) for x in (result.clean_values[0], result.values[0], result.corrupted_values[0], kept))
        assert ("".join(f'<td class="number">{x:.3f}</td>' for x in numbers) in text) == own


@pytest.mark.parametrize("keep", ["positions", "positions-from-end"])
def test_positions_have_the_first_prompts_tokens(make_model: Any, make_pairs: Any, keep: str) -> None:
    data = replace(make_pairs(n=3), prompts=(("clean", "corrupted"),) * 3)
    scores = eap.attribute(make_model("llama"), data, method="eap", keep=keep)
    tokenizer = SimpleNamespace(decode=lambda token: f" word {token}")
    circuit = scores.select(20)
    (profile,) = json.loads(explorer.page_data(scores, circuit, None, None, data, "", tokenizer))["profiles"]
    tokens = data.clean[0, : data.lengths[0]].tolist()
    first, own = (0, slice(len(tokens))) if keep == "positions" else (1 - len(tokens), slice(-len(tokens), None))
    assert profile["labels"][own] == [f"{i}: ' word {token}'" for i, token in enumerate(tokens, first)]
    other = replace(data, prompts=(("another", "one"),) * 3)
    for given, reader in ((other, tokenizer), (data, None)):
        assert "word" not in explorer.page_data(scores, circuit, None, None, given, "", reader)
