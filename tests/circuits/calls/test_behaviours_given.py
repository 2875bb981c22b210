"""Scored positions, whole answers and prompts alone, as they are given; and what is refused before any work."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import eap_circuits as eap
from tests.circuits.calls.behaviours import alone, answered_pairs, margin, scored_pairs
from tests.circuits.conftest import random_pairs, tiny_model
from tests.circuits.texts.test_spelling import byte_level

# What is refused, in one sentence and before any work.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scored": [[0, 4], [1, -1]]}, r"^scored\[0\]: expected positions from 0 to 3, the prompt's last, .* found 4"),
        ({"scored": [[0, 1], [2, -1]]}, r"^scored\[1\]: expected positions from 0 to 1, .* found 2"),
        ({"scored": [[0, 1], [-2, -1]]}, r"^scored\[1\]: expected positions from 0 .* found -2"),
        ({"scored": [[0, 1], [-1, -1]]}, r"^scored\[1\]: expected at least one position, in growing order"),
        ({"scored": [[1, 1], [0, -1]]}, r"^scored\[0\]: expected at least one position, in growing order"),
        ({"scored": [[0, -1, 1], [0, -1, -1]]}, r"^scored\[0\]: expected at least one position, in growing order"),
        ({"scored": [0, 1]}, r"^scored: expected shape \[2, P\]"),
        ({"scored": [[0.5], [1.0]]}, "^scored: expected an integer dtype"),
        (
            {"scored": [[0], [1]], "scored_weights": [[1.0], [0.0]]},
            r"^scored_weights\[1\]: expected at least one above",
        ),
        ({"scored": [[0], [1]], "scored_weights": [[1.0], [-1.0]]}, r"^scored_weights\[1, 0\]: expected a number of 0"),
        ({"scored": [[0], [1]], "scored_weights": [[1.0]]}, r"^scored_weights: expected shape \[2, 1\]"),
        ({"scored": [[0], [1]], "targets": [[1, 2], [3, 4]]}, r"^targets: expected shape \[2, 1\]"),
        ({"targets": [[1], [3]]}, "^targets: expected none without scored positions"),
        ({"weights": [1.0, 0.0]}, r"^weights\[1\]: expected a number above 0"),
        ({"weights": [1.0, float("nan")]}, r"^weights\[1\]: expected a number above 0"),
        ({"weights": [1.0]}, r"^weights: expected shape \[2\]"),
        ({"answers": [[[[1, -1, 2]], [[3, 4, 5]]]] * 2}, r"^answers\[0\]: expected padding behind"),
        ({"answers": [[[[1, 2]], [[-1, -1]]]] * 2}, r"^answers\[0\]: expected at least one bad"),
        ({"answers": [[[[1, 2]], [[1, 2]]]] * 2}, r"^answers\[0\]: expected each id once, .* found id \[1, 2\] twice"),
        (
            {"answers": [[[[1, 2]], [[1, 3]]]] * 2, "scored": [[0], [1]]},
            "^scored: expected none beside answers of several",
        ),
    ],
)
def test_tensors_that_cannot_be(change, message):
    given = {"clean": [[1, 2, 3, 4], [5, 6, 0, 0]], "corrupted": [[1, 2, 8, 4], [5, 7, 0, 0]], "lengths": [4, 2]}
    with pytest.raises(eap.InputError, match=message):
        eap.PairedDataset.from_tokens(**given, **{"answers": [[1, 2], [3, 4]], **change})


def test_metrics_and_ablations_that_do_not_fit():
    model, plain = tiny_model("llama"), random_pairs(n=2)
    whole, scored = answered_pairs(n=2), scored_pairs(n=2)
    last = replace(plain, scored=plain.lengths[:, None] - 1)
    lonely = replace(alone(scored), metric="next_token_loss")
    none = eap.PairedDataset.from_tokens(plain.clean, plain.corrupted, plain.lengths, scored=last.scored)
    refusals: list[tuple[Any, dict[str, Any], str]] = [
        (whole, {}, r"^metric: expected one of 'sequence_logprob', 'sequence_logprob_diff', .* example . has . tokens"),
        (whole, {"metric": "rank", "method": "exact"}, "^metric: expected one of 'sequence_logprob'"),
        (whole, {"metric": "next_token_loss"}, "^metric: expected one of a single position"),
        (plain, {"metric": "next_token_loss"}, "^metric: expected one of a single position"),
        (last, {"metric": "next_token_loss"}, "^metric: expected one that needs no next tokens, .* of example 0"),
        (scored, {"metric": "sequence_logprob"}, "^metric: expected one of scored positions"),
        (none, {}, "^metric: expected one that needs no answers"),
        (lonely, {"method": "eap"}, "^ablation: expected 'zero', 'mean' or constants, as the data have no corrupted"),
        (lonely, {"ablation": "zero"}, "^method: expected one of 'eap', .* as the data have no corrupted prompts"),
        (
            replace(scored, targets=scored.targets.clamp(min=10**6)),
            {"metric": margin},
            "^targets of example 0: expected",
        ),
    ]
    for data, settings, message in refusals:
        with pytest.raises(eap.InputError, match=message):
            eap.attribute(model, data, **settings)


# Texts.

TEXT = {"clean": "John gave it to", "corrupted": "Mary gave it to"}


def read(*records: dict[str, Any]) -> eap.PairedDataset:
    return eap.PairedDataset.from_records(records, byte_level(), align=True)


def tokens(data: eap.PairedDataset, *place: int) -> list[str]:
    ids = data.answers[place]
    return byte_level().convert_ids_to_tokens(ids[ids >= 0].tolist())


def test_answers_of_several_tokens_are_what_the_text_adds_to_the_prompt():
    data = read({**TEXT, "answers": [["Mary gave", " Tom"], "John the year"]}, {**TEXT, "answers": ["Mary", [[5, 6]]]})
    assert tokens(data, 0, 0, 0) == ["ĠMary", "Ġgave"]
    assert tokens(data, 0, 0, 1) == ["ĠTom"]
    assert tokens(data, 0, 1, 0) == ["ĠJohn", "Ġthe", "Ġyear"]
    assert tokens(data, 1, 0, 0) == ["ĠMary"]
    assert data.answers[1, 1].tolist() == [[5, 6, -1], [-1, -1, -1]]
    assert data.to_dict()["bad"][1] == [[5, 6]]
    # What runs is each prompt with all but an answer's last token.
    rows = data.rows.data
    run = byte_level().convert_ids_to_tokens(rows.clean[0, : rows.lengths[0]].tolist())
    assert run == ["<s>", "John", "Ġgave", "Ġit", "Ġto", "ĠMary"]
    assert rows.scored[2].tolist() == [int(data.lengths[0]) - 1 + i for i in range(3)]


def test_positions_weights_and_several_corrupted_prompts_of_records():
    one = {**TEXT, "answers": None, "scored": [-3, -1], "scored_weights": [0.1, 0.3], "weight": 2}
    two = {
        "clean": "Tom gave it",
        "corrupted": ["John gave it", "Mary gave it"],
        "scored": "all",
        "scored_weights": [1] * 3,
    }
    data = read(one, two)
    assert len(data) == 3 and data.weights.tolist() == [2, 0.5, 0.5]
    assert data.scored.tolist()[0] == [2, 4, -1] and data.scored.tolist()[1:] == [[0, 1, 2], [0, 1, 2]]
    assert data.scored_weights.tolist() == [[0.1, 0.3, 0], [1, 1, 1], [1, 1, 1]]  # in float64
    assert data.targets.tolist()[1] == data.clean[1, 1:4].tolist()
    assert data.targets.tolist()[0] == [int(data.clean[0, 3]), -1, -1]
    assert not data.alone and read({**one, "corrupted": None}).alone
    assert read({"clean": TEXT["clean"], "scored": "all", "weight": 2}).alone  # a document


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({**TEXT, "scored": [5]}, r"^records\[0\], scored: expected a whole number from -5 to 4, found 5"),
        ({**TEXT, "scored": [3, 1]}, r"^records\[0\], scored: expected at least one position of 5 tokens, in growing"),
        ({**TEXT, "scored": []}, r"^records\[0\], scored: expected at least one position"),
        ({**TEXT, "scored": "last"}, r"^records\[0\], scored: expected a list of positions, or 'all', found 'last'"),
        ({**TEXT, "scored": [1], "scored_weights": [0]}, r"scored_weights: expected 1 numbers, .* not all 0"),
        ({**TEXT, "scored": [1], "scored_weights": [1, 2]}, r"scored_weights: expected 1 numbers"),
        ({**TEXT, "scored": [1], "scored_weights": ["a"]}, r"scored_weights: expected a finite number of 0 or more"),
        ({**TEXT, "scored": [1], "weight": -1}, r"^records\[0\], weight: expected a finite number above 0, found -1"),
        ({**TEXT, "answers": ["", "John"]}, "good answer: expected an answer of at least one token, found ''"),
        ({**TEXT, "answers": [[[]], "John"]}, r"good answer: expected a token id, a text .*, found \[\]"),
        ({**TEXT, "answers": ["Mary gave", ["Mary gave"]]}, "expected good and bad answers that differ"),
        ({**TEXT, "answers": ["Mary gave", "John"], "scored": [1]}, "^scored: expected none beside answers of several"),
        (
            {"clean": "John gave", "scored": [1], "answer": 3, "corrupt": "a"},
            r"expected the key 'corrupted', found only",
        ),
    ],
)
def test_records_that_cannot_be(record, message):
    with pytest.raises(eap.InputError, match=message):
        read(record)


def test_files_hold_what_records_do(tmp_path):
    records = [{**TEXT, "scored": [1, 2], "weight": 2.0}, {**TEXT, "scored": [0, 3], "weight": 1.0}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows = [f'{TEXT["clean"]},{TEXT["corrupted"]},"{r["scored"]}",{r["weight"]}' for r in records]
    (tmp_path / "a.csv").write_text("\n".join(["clean,corrupted,scored,weight", *rows]))
    right = read(*records)
    right.save(tmp_path / "a.safetensors")
    for name in ("a.jsonl", "a.csv", "a.safetensors"):
        found = eap.PairedDataset.from_file(tmp_path / name, byte_level(), align=True)
        for field in ("clean", "corrupted", "scored", "targets", "weights", "answers"):
            assert torch.equal(getattr(found, field), getattr(right, field)), (name, field)
    lines = [{"clean": TEXT["clean"], "answers": ["Mary gave", "Tom"]}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    whole = eap.PairedDataset.from_file(tmp_path / "b.jsonl", byte_level())
    assert whole.alone and tokens(whole, 0, 0, 0) == ["ĠMary", "Ġgave"]
    whole.save(tmp_path / "b.safetensors")
    again = eap.PairedDataset.from_file(tmp_path / "b.safetensors")
    assert again.alone and torch.equal(again.answers, whole.answers)
