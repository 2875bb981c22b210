"""Files of which a byte is flipped, or which are read in other parts: refused, or the same values."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eap_circuits import Circuit, EdgeScores, InputError, NodeScores, PairedDataset
from eap_circuits.formats import parts
from eap_circuits.report import load_curve
from tests.circuits.formats.test_strict_formats import KV, SUFFIXES, curve, refused, values_of, written
from tests.fuzz.common import tokenizer


def test_a_flipped_byte_of_prompts_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "pairs.safetensors"
    texts = [("Ann met Bob", "Cy met Bob"), ("Bob gave", "Ann gave")]
    records = [{"clean": own, "corrupted": other, "answers": [2, 3 + i]} for i, (own, other) in enumerate(texts)]
    right = PairedDataset.from_records(records, tokenizer())
    right.save(path)
    whole, said = path.read_bytes(), list[str]()
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            assert PairedDataset.from_file(path) == right
        except InputError as error:
            said.append(str(error))
    assert len(said) > 250 and all(each.startswith(str(path)) and "\n" not in each for each in said)


def test_prompts_of_a_newer_format_are_refused(tmp_path: Path) -> None:
    tensors = {"clean": torch.ones(1, 2), "corrupted": torch.ones(1, 2), "lengths": torch.ones(1)}
    save_file(tensors, path := tmp_path / "p.safetensors", {"kind": "dataset", "format": "eap-circuits/9"})
    with pytest.raises(InputError, match=r"metadata: expected format 'eap-circuits/1', found 'eap-circuits/9'\.$"):
        PairedDataset.from_file(path)


@pytest.mark.parametrize("suffix", [*SUFFIXES, "nodes", "curve"])
def test_a_flipped_byte_is_refused_or_changes_nothing(suffix: str, tmp_path: Path) -> None:
    rng = random.Random(suffix)
    loads: dict[str, Callable[[Path], Any]] = {"nodes": NodeScores.load, "curve": load_curve}
    path = tmp_path / {"nodes": "n.safetensors", "curve": "c.json"}.get(suffix, f"r{suffix}")
    scores = EdgeScores(KV, values_of(KV), {"method": "eap", "n_examples": 3})
    if suffix == "nodes":
        scores.node_scores().save(path)
    elif suffix == "curve":
        from eap_circuits.files import write_json

        write_json(path, curve(), indent=2)
    else:
        scores.select(9).save(path)
    load, whole = loads.get(suffix, Circuit.load), path.read_bytes()
    right = load(path)
    refusals, said = 0, ""
    for _ in range(300):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= rng.choice([1 << rng.randrange(8), rng.randrange(1, 256)])
        path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = load(path)
        except InputError as error:
            found, said = None, str(error)
        if found is None:
            assert said.startswith(str(path)) and "\n" not in said
            refusals += 1
            continue
        if suffix == "curve":
            assert found == right or found.info != right.info
        else:
            assert torch.equal(found.values, right.values) and found.graph == right.graph
        assert suffix == "nodes" or suffix == "curve" or found == right
    assert refusals > 100


@pytest.mark.parametrize("size", [1, 60, 1000])
def test_json_is_the_same_in_whatever_parts_it_is_read(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(".json", tmp_path, lambda content: None, keep_checksum=True)
    right, text = Circuit.load(path), path.read_text()
    monkeypatch.setattr(parts, "_CHARACTERS", size)
    content = json.loads(text)
    unlike = {
        **content,
        "edges": {n: {"in_graph": e["in_graph"], "why": ['"},{'], **e} for n, e in content["edges"].items()},
    }
    first = {"edges": content["edges"], **content}  # before the graph is known
    for each in (content, unlike, {**first, "sha256": content["sha256"]}):
        path.write_text(json.dumps(each, indent=size))
        found = Circuit.load(path)
        assert found == right and torch.equal(found.values, right.values)
    edge = '"m0->m1": {"score": 1, "in_graph": false}'
    for broken, message in [
        (text.replace('"m0->m1": {', f'{edge}, "m0->m1": {{'), "'m0->m1' comes twice"),
        (text.replace('"edges": {', f'"edges": {{{edge}, '), "'m0->m1' comes twice"),
        (text.replace('"cfg": {', '"cfg": 3, "cfg": {'), "'cfg' comes twice"),
        (text.replace('"in_graph": true', '"in_graph": true, "in_graph": true', 1), "'in_graph' comes twice"),
        (text.replace('}, "sha256"', ', }, "sha256"'), "something else"),
        (text.replace('}, "sha256"', ',,}, "sha256"'), "something else"),
        (text.replace('"cfg": {', '"cfg" {'), "something else"),
        (text[:-20], "something else"),
        (text + "}", "something else"),
    ]:
        path.write_text(broken)
        assert message in refused(path, Circuit.load)
