"""Rows in the layout of the MIB benchmark's datasets, written by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eap_circuits import InputError, PairedDataset

TEXT = "Ann Bob Cy and met . gave it to A B C D is red sky blue what 1 2 3 4 5 6 7 + = : What"


def tokenizer() -> Any:
    """One token a word."""
    ids = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<s>", *TEXT.split()]))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def ioi(io: str, s: str, other: str) -> dict[str, Any]:
    def prompt(giver: str) -> dict[str, Any]:
        return {"prompt": f"{io} and {s} met . {giver} gave it to", "choices": [io, s], "answerKey": 0}

    return {
        **prompt(s),
        "metadata": {"indirect_object": io, "subject": s, "random_c": other},
        "s2_io_flip_counterfactual": prompt(io),
        "abc_counterfactual": prompt(other),
    }


def mcqa(answer: int, symbols: str) -> dict[str, Any]:
    def prompt(labels: str, key: int) -> dict[str, Any]:
        lines = " . ".join(f"{label} {colour}" for label, colour in zip(labels, ("red", "blue")))
        return {
            "prompt": f"sky is {('red', 'blue')[key]} . what is sky : {lines} =",
            "choices": {"label": list(labels), "text": ["red", "blue"]},
            "answerKey": key,
        }

    return {**prompt("AB", answer), "symbol_counterfactual": prompt(symbols, answer)}


def addition(a: int, b: int, other: tuple[int, int] | None) -> dict[str, Any]:
    def prompt(x: int, y: int) -> dict[str, Any]:
        return {"prompt": f"{x} + {y} =", "label": x + y, "operator": "+", "operand1": x, "operand2": y}

    missing = {"prompt": None, "label": None}
    return {**prompt(a, b), "random_counterfactual": missing if other is None else prompt(*other)}


def written(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def answers(data: PairedDataset, tok: Any) -> list[list[str]]:
    return [tok.convert_ids_to_tokens(pair) for pair in data.answers.tolist()]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("read", [PairedDataset.from_mib, PairedDataset.from_file])
def test_ioi(tmp_path: Path, suffix: str, read: Any) -> None:
    tok = tokenizer()
    path = written(tmp_path / f"ioi{suffix}", [ioi("Ann", "Bob", "Cy"), ioi("Cy", "Ann", "Bob")])
    data = read(path, tok)
    assert (data.name, data.metric) == ("ioi", "logit_diff")
    assert data.prompts == (
        ("Ann and Bob met . Bob gave it to", "Ann and Bob met . Ann gave it to"),
        ("Cy and Ann met . Ann gave it to", "Cy and Ann met . Cy gave it to"),
    )
    assert answers(data, tok) == [["Ann", "Bob"], ["Cy", "Ann"]]
    assert data.clean[0, 0] == tok.bos_token_id


def test_another_counterfactual(tmp_path: Path) -> None:
    path = written(tmp_path / "ioi.json", [ioi("Ann", "Bob", "Cy")])
    data = PairedDataset.from_mib(path, tokenizer(), "abc_counterfactual", prepend_bos=False)
    assert data.prompts == (("Ann and Bob met . Bob gave it to", "Ann and Bob met . Cy gave it to"),)
    assert data.lengths.tolist() == [9]
    with pytest.raises(InputError, match=r"one of 'abc_counterfactual', 's2_io_flip_counterfactual', found 'x'"):
        PairedDataset.from_mib(path, tokenizer(), "x")


def test_multiple_choice(tmp_path: Path) -> None:
    tok = tokenizer()
    data = PairedDataset.from_mib(written(tmp_path / "mcqa.jsonl", [mcqa(0, "CD"), mcqa(1, "CD")]), tok)
    assert answers(data, tok) == [["A", "C"], ["B", "D"]]
    assert data.prompts is not None
    assert data.prompts[1][1].endswith("C red . D blue =")


def test_arithmetic_leaves_out_rows_without_a_counterfactual_and_answers_of_more_tokens(tmp_path: Path) -> None:
    tok = tokenizer()
    rows = [addition(1, 2, (2, 5)), addition(3, 4, None), addition(1, 4, (4, 1)), addition(5, 1, (1, 3))]
    data = PairedDataset.from_mib(written(tmp_path / "a.json", rows), tok)
    # The third row's two results are the same.
    assert [clean for clean, _ in data.prompts or ()] == ["1 + 2 =", "5 + 1 ="]
    assert answers(data, tok) == [["3", "7"], ["6", "4"]]


def test_rows_of_unequal_lengths_are_left_out(tmp_path: Path) -> None:
    long = ioi("Ann", "Bob", "Cy Cy")  # the track wants all three names equally long
    uneven = ioi("Ann", "Bob", "Cy")
    uneven["s2_io_flip_counterfactual"]["prompt"] += " it"
    rows = [long, uneven, ioi("Bob", "Cy", "Ann")]
    data = PairedDataset.from_mib(written(tmp_path / "ioi.json", rows), tokenizer())
    assert [clean for clean, _ in data.prompts or ()] == ["Bob and Cy met . Cy gave it to"]
    with pytest.raises(InputError, match=r"ioi\.json: rows: expected at least one whose .*, found none of 2\."):
        PairedDataset.from_mib(written(tmp_path / "ioi.json", rows[:2]), tokenizer())


def test_with_alignment_prompts_of_unequal_lengths_are_kept(tmp_path: Path) -> None:
    uneven = ioi("Ann", "Bob", "Cy")
    uneven["s2_io_flip_counterfactual"]["prompt"] = "Ann and Bob met . Bob Cy gave it to"
    path = written(tmp_path / "ioi.json", [ioi("Ann", "Bob", "Cy Cy"), uneven])
    for read in (PairedDataset.from_mib, PairedDataset.from_file):
        data = read(path, tokenizer(), align=True)
        assert data.corrupted_lengths is not None and data.alignment is not None
        assert (data.lengths.tolist(), data.corrupted_lengths.tolist()) == ([10], [11])
        # The corrupted prompt's second name stands for no clean word.
        assert data.alignment.tolist() == [[0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 0]]


def test_an_answer_of_several_tokens_begins_with_its_first(tmp_path: Path) -> None:
    tok = tokenizer()
    rows = [ioi("Ann Cy", "Bob Cy", "Cy Cy")]
    data = PairedDataset.from_mib(written(tmp_path / "ioi.json", rows), tok)
    assert answers(data, tok) == [["Ann", "Bob"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "sky is"}], r"columns of MIB's IOI, MCQA, ARC or arithmetic data, found \['prompt'\]"),
        ([ioi("Ann", "Bob", "Cy"), {"prompt": "sky"}], r"\[1\]: expected the columns that the first row has"),
        ([ioi("Ann", "Bob", "Cy"), 3], r"\[1\]: expected the columns that the first row has"),
        ([3], "columns of MIB's .*, found int"),
        ([], r"columns of MIB's .*, found \[\]"),
        ({"rows": []}, "a list of records, found dict"),
    ],
)
def test_other_rows_are_refused_by_name(tmp_path: Path, rows: Any, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=rf"x\.json: .*{message}"):
        PairedDataset.from_mib(path, tokenizer())


def test_records_of_ours_in_a_json_list(tmp_path: Path) -> None:
    rows = [{"clean": "Ann gave it to", "corrupted": "Bob gave it to", "answers": ["Ann", "Bob"]}]
    data = PairedDataset.from_file(written(tmp_path / "own.json", rows), tokenizer())
    assert data.prompts == (("Ann gave it to", "Bob gave it to"),)
    (tmp_path / "own.json").write_text("{")
    with pytest.raises(InputError, match=r"own\.json: file: expected JSON"):
        PairedDataset.from_file(tmp_path / "own.json", tokenizer())
