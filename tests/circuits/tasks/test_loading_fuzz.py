"""Any file is either read whole or refused in one sentence that names it."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eap_circuits import InputError, PairedDataset

WORDS = ["<unk>", "<s>", "Ann", "Bob", "Cy", "met", "and", "gave", "it", "[", "5"]
BACKEND = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
BACKEND.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=BACKEND, bos_token="<s>", unk_token="<unk>")
TEXTS = (".csv", ".json", ".jsonl", ".parquet")
FUZZ = settings(deadline=None, max_examples=150)


def read(suffix: str, content: bytes) -> PairedDataset | None:
    """What a file of this content holds; None where it is refused, in a sentence that names it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"data{suffix}"
        path.write_bytes(content)
        try:
            return PairedDataset.from_file(path, TOKENIZER, align=True)
        except InputError as error:
            sentence = str(error)
            assert sentence.startswith(f"{path}: ") and sentence.endswith(".")
            assert len(sentence.splitlines()) == 1, sentence
            return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=3) | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "0", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)
NAMES = ["clean", "corrupted", "answers", "good", "bad", "answer", "wrong_answer", "correct_idx", "incorrect_idx"]
MIB = ["prompt", "metadata", "s2_io_flip_counterfactual", "choices", "answerKey", "symbol_counterfactual", "label"]
MIB_ROW = {
    "prompt": "Ann and Bob met Bob gave it",
    "metadata": {"indirect_object": "Ann", "subject": "Bob", "random_c": "Cy"},
    "s2_io_flip_counterfactual": {"prompt": "Ann and Bob met Ann gave it"},
}
ROWS = st.lists(st.dictionaries(st.sampled_from(NAMES) | st.sampled_from(MIB), JSON, max_size=7) | JSON, max_size=3)
PROMPT = st.lists(st.sampled_from(WORDS[2:9]), min_size=1, max_size=6).map(" ".join)


@pytest.mark.parametrize("suffix", [*TEXTS, ".safetensors", ".pt"])
@given(content=st.binary(max_size=60) | st.text(max_size=40).map(lambda x: x.encode("utf-8", "surrogatepass")))
@FUZZ
def test_bytes(suffix: str, content: bytes) -> None:
    read(suffix, content)


@given(rows=ROWS, lines=st.booleans(), ascii=st.booleans())
@example(rows=[{"clean": "Ann \ud800", "corrupted": "Bob", "answers": [2, 3]}], lines=True, ascii=True)
@example(rows=[{"clean": "Ann", "corrupted": "Bob", "answers": ["\udfff", 3]}], lines=True, ascii=True)
@example(rows=[{"clean": "Ann", "corrupted": "Bob", "answers": [[], 3]}], lines=False, ascii=True)
@example(rows=[{**MIB_ROW, "prompt": "\ud800"}], lines=False, ascii=True)
@example(
    rows=[{**MIB_ROW, "metadata": {"indirect_object": "\ud800", "subject": "Bob", "random_c": 3}}],
    lines=True,
    ascii=True,
)
@FUZZ
def test_json(rows: list[Any], lines: bool, ascii: bool) -> None:
    texts = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    text = "\n".join(texts) if lines else "[" + ",".join(texts) + "]"
    found = read(".jsonl" if lines else ".json", text.encode("utf-8", "surrogatepass"))
    assert found is None or len(found) == len(rows) or "prompt" in rows[0]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"clean": "Ann", "clean": "Bob", "corrupted": "Cy", "answers": [2, 3]}',
        '{"clean": "Ann", "corrupted": "Cy", "answers": [2, ' + "9" * 5000 + "]}",
        '{"clean": "Ann", "corrupted": "Cy", "answers": [2, 1e400]}',
        '{"clean": "Ann", "corrupted": "Cy", "good": 2, "bad": 3}',
        '{"clean": "Ann", "corrupted": "Cy", "good": "' + "[" * 5000 + '", "bad": "Bob"}',
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_that_parsers_trip_over(suffix: str, text: str) -> None:
    assert read(suffix, (text if suffix == ".jsonl" else f"[{text}]").encode()) is None


CELL = st.text(max_size=4) | st.sampled_from([*WORDS, "[2, 3]", "['Ann', 'Cy']", "[[", "7", "-1", "None", "[1e400]"])


@given(header=st.lists(st.sampled_from([*NAMES, "", "clean"]), max_size=6), cells=st.lists(st.lists(CELL), max_size=3))
@FUZZ
def test_csv(header: list[str], cells: list[list[str]]) -> None:
    # By hand: the writer of Python 3.10 refuses NUL.
    lines = (",".join('"{}"'.format(cell.replace('"', '""')) for cell in row) for row in [header, *cells])
    found = read(".csv", "\r\n".join(lines).encode("utf-8", "surrogatepass"))
    assert found is None or len(found) == sum(map(bool, cells))


def test_a_column_that_comes_twice_is_refused() -> None:
    rows = "clean,corrupted,good,bad,clean\nAnn,Bob,Cy,Ann,Bob\n"
    assert read(".csv", rows.encode()) is None
    assert read(".csv", rows.replace("clean\n", "\n").encode()) is not None


TEXTS_OF_A_DATASET = st.fixed_dictionaries({}, optional={"name": JSON, "metric": JSON, "prompts": JSON})


@given(texts=TEXTS_OF_A_DATASET, extra=st.sampled_from(["corrupted_lengths", "alignment"]), value=st.integers(-1, 4))
@FUZZ
def test_safetensors(texts: dict[str, Any], extra: str, value: int) -> None:
    tensors = {"clean": [[2, 3]], "corrupted": [[2, 4]], "lengths": [2], "answers": [[2, 3]], extra: [value]}
    metadata = {"kind": "dataset", "dataset": json.dumps(texts)}
    read(".safetensors", save({name: torch.tensor(x) for name, x in tensors.items()}, metadata=metadata))


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def cells(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


WRITERS = {
    ".csv": cells,
    ".json": lambda rows: json.dumps(rows).encode(),
    ".jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    ".parquet": parquet,
}
COLUMNS = [
    ("correct_idx", "incorrect_idx", [3, 4]),
    ("answers_idx", "corrupted_answers_idx", [[3, 5], [4]]),
    ("country_idx", "corrupted_country_idx", [3, 4]),
    ("clean_answer_idx", "corrupted_answer_idx", [3, 4]),
    ("good", "bad", ["Ann", " Bob"]),
    ("answer", "wrong_answer", [["Ann", "Cy"], ["Bob", "met"]]),
    ("correct", "incorrect", ["[", "5"]),
]


@pytest.mark.parametrize("suffix", TEXTS)
@given(pairs=st.lists(st.tuples(PROMPT, PROMPT), min_size=1, max_size=4), columns=st.sampled_from(COLUMNS))
@settings(deadline=None, max_examples=40)
def test_nothing_is_lost(suffix: str, pairs: list[tuple[str, str]], columns: tuple[str, str, list[Any]]) -> None:
    good, bad, answers = columns
    rows = [{"clean": a, "corrupted": b, good: answers[0], bad: answers[1], "other": "x"} for a, b in pairs]
    found = read(suffix, WRITERS[suffix](rows))
    records = [{"clean": a, "corrupted": b, "answers": answers} for a, b in pairs]
    right = PairedDataset.from_records(records, TOKENIZER, align=True)
    assert found is not None and found.prompts == right.prompts and found.name == "data"
    for name in ("clean", "corrupted", "lengths", "answers"):
        assert torch.equal(getattr(found, name), getattr(right, name))


def test_parquet_of_records_and_of_mib_rows() -> None:
    found = read(".parquet", parquet([{"clean": "Ann met", "corrupted": "Bob met", "answers": ["Cy", "Ann"]}]))
    assert found is not None and found.answers.tolist() == [[4, 2]]
    found = read(".parquet", parquet([MIB_ROW]))
    assert found is not None and found.answers.tolist() == [[2, 3]]
    whole = parquet([MIB_ROW])
    assert read(".parquet", whole[:-20]) is None and read(".parquet", whole[20:]) is None


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        InputError, match=r"x\.parquet: file: expected pyarrow \(pip install .*\) to read it with, found"
    ):
        PairedDataset.from_file(tmp_path / "x.parquet", TOKENIZER)


def tokens(suffix: str) -> bytes:
    tensors = {"clean": [[2, 3]], "corrupted": [[2, 4]], "lengths": [2], "answers": [[2, 3]]}
    found = {name: torch.tensor(x) for name, x in tensors.items()}
    if suffix == ".safetensors":
        return save(found)
    file = io.BytesIO()
    torch.save(found, file)
    return file.getvalue()


def test_a_reference_in_place_of_any_byte_of_a_pickle() -> None:
    """torch asserts what a persistent id refers to."""
    whole = tokens(".pt")
    for place in range(len(whole)):
        read(".pt", whole[:place] + pickle.BINPERSID + whole[place + 1 :])


@pytest.mark.parametrize("suffix", [*TEXTS, ".safetensors", ".pt"])
@given(data=st.data())
@FUZZ
def test_damage(suffix: str, data: st.DataObject) -> None:
    whole = WRITERS[suffix]([MIB_ROW] * 2) if suffix in WRITERS else tokens(suffix)
    if suffix == ".csv":
        whole = cells([{"clean": "Ann met", "corrupted": "Bob met", "good": "Cy", "bad": "['Ann', 'Bob']"}])
    content = bytearray(whole)
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)):
        content[place] = byte
    read(suffix, bytes(content[: data.draw(st.sampled_from([None, len(whole) // 2, -1]))]))
