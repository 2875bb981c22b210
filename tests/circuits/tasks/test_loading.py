"""Files of prompt pairs: text, tokens, and everything that is neither."""

from __future__ import annotations

import csv
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eap_circuits import InputError, PairedDataset
from eap_circuits.tasks.loading import _IDS, _TEXTS, SUFFIXES

WORDS = ["<unk>", "<s>", "Mary", "John", "Tom", "gave", "a", "book", "to", "Kate"]
ID = {word: i for i, word in enumerate(WORDS)}
BACKEND = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
BACKEND.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=BACKEND, bos_token="<s>", unk_token="<unk>")

RECORDS: list[dict[str, Any]] = [
    {"clean": "Mary gave a book", "corrupted": "Mary gave a book", "answers": [" John", 2]},
    {"clean": "Mary gave", "corrupted": "Kate gave", "answers": [ID["Tom"], "Mary"]},
]
CLEAN = torch.tensor([[1, 2, 3, 4], [5, 6, -100, 9]])
CORRUPTED = torch.tensor([[1, 2, 8, 4], [5, 6, 9, -1]])
LENGTHS = torch.tensor([4, 2])
ANSWERS = torch.tensor([[3, 4], [0, 7]])


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_as_eap_ig_writes_it(tmp_path: Path) -> None:
    text = (
        ",clean,corrupted,correct_idx,incorrect_idx\n"
        "0,Mary gave,Kate gave,5,3\n\n"
        '1,"John gave a","Tom gave a","[4, 6]",[3]\n'
    )
    data = PairedDataset.from_csv(write(tmp_path / "toy.csv", text), TOKENIZER)
    assert data.clean.tolist() == [[*ids("<s> Mary gave"), 0], ids("<s> John gave a")]
    assert data.answers.tolist() == [[[5, -1], [3, -1]], [[4, 6], [3, -1]]]
    assert data.name == "toy"


def test_csv_of_texts(tmp_path: Path) -> None:
    text = "\ufeffgood,bad,clean,corrupted\r\n Tom,Mary,Mary gave,Kate gave\r\n"
    path = write(tmp_path / "toy.csv", text)
    data = PairedDataset.from_csv(path, TOKENIZER, prepend_bos=False)
    assert data.clean.tolist() == [ids("Mary gave")]
    assert data.answers.tolist() == [[ID["Tom"], ID["Mary"]]]


def test_jsonl(tmp_path: Path) -> None:
    path = write(tmp_path / "toy.jsonl", "\n\n".join(json.dumps(record) for record in RECORDS))
    data, wanted = PairedDataset.from_jsonl(path, TOKENIZER), PairedDataset.from_records(RECORDS, TOKENIZER)
    assert torch.equal(data.clean, wanted.clean)
    assert torch.equal(data.answers, wanted.answers)


HEADER = "clean,corrupted,good,bad\n"
IDS = "clean,corrupted,correct_idx,incorrect_idx\n"
LINE = json.dumps(RECORDS[1]) + "\n"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", r"row 1: expected columns correct_idx and incorrect_idx, or good and bad, found \[\]"),
        (
            "a.csv",
            "clean,corrupted,good\n",
            "row 1: expected columns correct_idx and incorrect_idx, or good and bad",
        ),
        ("a.csv", "clean,corupted,good,bad\n", "row 1: expected a column 'corrupted', found"),
        ("a.csv", HEADER, "records: expected at least one prompt pair, found none"),
        (
            "a.csv",
            HEADER + "Mary gave,Kate gave,Tom,Mary\nMary,Kate gave,Tom,Mary\n",
            "row 3: .* found 2 and 3",
        ),
        (
            "a.csv",
            HEADER + "\nMary gave,Kate gave,Tom,Mary Zoe\n",
            "row 3, bad answer: expected an answer in the vocabulary .* 'Mary Zoe', ",
        ),
        (
            "a.csv",
            HEADER + "Mary gave,Kate gave,Tom\n",
            "row 2: expected 4 cells, as many as columns, found 3",
        ),
        ("a.csv", HEADER + ",Kate gave,Tom,Mary\n", "row 2, clean: expected a prompt, found an empty text"),
        (
            "a.csv",
            HEADER + '"Mary" gave,Kate gave,Tom,Mary\n',
            "expected comma-separated values, found something",
        ),
        (
            "a.csv",
            IDS + "Mary gave,Kate gave,3,Mary\n",
            "row 2, incorrect_idx: expected a token id .*, found 'Mary'",
        ),
        (
            "a.csv",
            IDS + "Mary gave,Kate gave,1.0,3\n",
            "row 2, correct_idx: expected a token id .*, found '1.0'",
        ),
        (
            "a.csv",
            IDS + "Mary gave,Kate gave,[],3\n",
            r"row 2, correct_idx: expected a token id .*, found '\[\]'",
        ),
        (
            "a.csv",
            IDS + f"Mary gave,Kate gave,{'[' * 100_000},3\n",
            r"row 2, correct_idx: expected a token id .*, found '\[\[.* … .*\['",
        ),
        (
            "a.csv",
            HEADER + 'Mary gave,Kate gave,"[{[1]: 2}]",Mary\n',
            r"row 2, good answer: expected an answer in the vocabulary .*\[\{\[1\]: 2\}\]",
        ),
        (
            "a.csv",
            IDS + "Mary gave,Kate gave,3,3\n",
            "row 2, answers: expected good and bad answers that differ",
        ),
        ("a.jsonl", "", "records: expected at least one prompt pair, found none"),
        ("a.jsonl", "\n" + LINE + '{"clean": \n', "line 3: expected a JSON object, found something else"),
        (
            "a.jsonl",
            LINE + "[1, 2]\n",
            "line 2: expected a mapping with clean, corrupted and answers, found list",
        ),
        ("a.jsonl", LINE + '{"clean": "Mary"}\n', "line 2: expected the key 'answers' .*, found only"),
    ],
)
def test_text_files_that_cannot_be(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(InputError, match=message) as caught:
        PairedDataset.from_file(path, TOKENIZER)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_text_that_is_not_utf8_or_has_no_tokenizer(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes("clean,corrupted,good,bad\nMáry gave".encode("latin-1"))
    with pytest.raises(InputError, match="expected text in UTF-8, found a byte that is not"):
        PairedDataset.from_file(path, TOKENIZER)
    write(path, LINE if name == "a.jsonl" else HEADER + "Mary gave,Kate gave,Tom,Mary\n")
    with pytest.raises(InputError, match="tokenizer: expected a Hugging Face tokenizer, found NoneType"):
        PairedDataset.from_file(path)


def test_a_saved_dataset_comes_back(tmp_path: Path) -> None:
    for name, data in {
        "texts": PairedDataset.from_records(RECORDS, TOKENIZER, name="toy", metric="prob_diff"),
        "tokens": PairedDataset.from_tokens(CLEAN, CORRUPTED, LENGTHS, ANSWERS),
    }.items():
        data.save(tmp_path / f"{name}.safetensors")
        loaded = PairedDataset.from_file(tmp_path / f"{name}.safetensors")
        for field in ("clean", "corrupted", "lengths", "answers"):
            assert torch.equal(getattr(loaded, field), getattr(data, field))
        assert (loaded.prompts, loaded.name, loaded.metric) == (data.prompts, data.name, data.metric)


TENSORS = {"clean": CLEAN, "corrupted": CORRUPTED, "lengths": LENGTHS, "answers": ANSWERS}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_token_files_of_others(suffix: str, tmp_path: Path) -> None:
    savers: dict[str, Callable[[dict[str, Tensor], Path], Any]] = {
        ".safetensors": save_file,
        ".pt": torch.save,
    }
    save = savers[suffix]
    path = tmp_path / f"toy{suffix}"
    save(TENSORS, path)
    data = PairedDataset.from_file(path)
    assert data.clean.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert (data.name, data.metric, data.prompts) == ("toy", "logit_diff", None)
    save({name: TENSORS[name] for name in ("clean", "corrupted")}, path)
    with pytest.raises(InputError, match=r"expected tensors clean, .*, found none named lengths, answers\.$"):
        PairedDataset.from_file(path)
    save({**TENSORS, "lengths": LENGTHS + 1}, path)
    with pytest.raises(InputError, match=rf"^{path}: lengths\[0\]: expected 1 to 4"):
        PairedDataset.from_file(path)
    whole = path.read_bytes()
    for share in (0.0, 0.1, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match=rf"^{path}: .*expected token tensors, found something else .*\.$"):
            PairedDataset.from_file(path)


@pytest.mark.parametrize("dataset", [None, "{", "{}", "[]"])
def test_a_dataset_whose_texts_are_damaged(dataset: str | None, tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    save_file(TENSORS, path, metadata={"kind": "dataset", **({} if dataset is None else {"dataset": dataset})})
    with pytest.raises(InputError, match="expected token tensors, found something else"):
        PairedDataset.from_file(path)


class Mischief:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "toy.pt"
    torch.save({**TENSORS, "clean": Mischief(mark)}, path)
    with pytest.raises(InputError, match="expected token tensors, found something else"):
        PairedDataset.from_file(path)
    path.write_bytes(pickle.dumps(Mischief(mark), protocol=2))
    with pytest.raises(InputError, match="expected token tensors, found something else"):
        PairedDataset.from_file(path)
    assert not mark.exists()


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    data = PairedDataset.from_tokens(CLEAN, CORRUPTED, LENGTHS, ANSWERS)
    with pytest.raises(
        InputError, match=r"expected a name ending in .csv, .json, .jsonl, .parquet, .safetensors, .pt, found '.txt'"
    ):
        PairedDataset.from_file(tmp_path / "toy.txt")
    for suffix in (".csv", ".json", ".jsonl", ".safetensors", ".pt"):
        with pytest.raises(InputError, match="expected a file, found nothing there"):
            PairedDataset.from_file(tmp_path / f"toy{suffix}", TOKENIZER)
    with pytest.raises(InputError, match=r"expected a name ending in .safetensors, found '.pt'"):
        data.save(tmp_path / "toy.pt")
    with pytest.raises(InputError, match="expected a folder that exists"):
        data.save(tmp_path / "none" / "toy.safetensors")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match=r"cannot be read \(File name too long\)"):
        PairedDataset.from_file(tmp_path / f"{'x' * 300}.csv", TOKENIZER)
    os.mkfifo(pipe := tmp_path / "toy.csv")
    with pytest.raises(InputError, match="expected a file, found something that is no file"):
        PairedDataset.from_file(pipe, TOKENIZER)
    for read in (PairedDataset.from_csv, PairedDataset.from_jsonl, PairedDataset.from_file):
        with pytest.raises(InputError, match="path: expected the name of a file, found 3"):
            read(3, TOKENIZER)


def test_names_in_capital_letters(tmp_path: Path) -> None:
    rows = "clean,corrupted,good,bad\nMary gave,Kate gave,Tom,Mary\n"
    data = PairedDataset.from_file(write(tmp_path / "TOY.CSV", rows), TOKENIZER)
    assert data == PairedDataset.from_file(write(tmp_path / "TOY.JSON", json.dumps([RECORDS[1]])), TOKENIZER)
    data.save(tmp_path / "TOY.SAFETENSORS")
    assert PairedDataset.from_file(tmp_path / "TOY.SAFETENSORS") == data


def test_csv_of_long_prompts(tmp_path: Path) -> None:
    """Longer than Python's own limit for a cell, which stays as it was."""
    most, n = csv.field_size_limit(), 40_000
    clean = " ".join(["gave"] * n)
    table = write(tmp_path / "toy.csv", f"clean,corrupted,good,bad\nMary {clean},Kate {clean},Tom,Mary\n")
    assert len(clean) > most and PairedDataset.from_csv(table, TOKENIZER).lengths.tolist() == [n + 2]
    assert csv.field_size_limit() == most


def test_the_page_names_every_ending_and_column() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    for name in (*SUFFIXES, *sum((*_IDS, *_TEXTS), ())):
        assert f"`{name}`" in page
