"""Files of prompt pairs: text in `.csv`, `.json`, `.jsonl` and `.parquet`, tokens in `.safetensors` and `.pt`."""

from __future__ import annotations

import ast
import csv
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import InputError, expected, near, reason
from ..files import CHECKSUM, DAMAGED, check_digest, check_file, digest, parse_json, suffix_of, write_whole
from ..texts.records import IMAGES
from .tokens.pictures import Pictures

TEXTS, TOKENS = (".csv", ".json", ".jsonl", ".parquet"), (".safetensors", ".pt")
SUFFIXES = (*TEXTS, *TOKENS)
# Pairs of columns (good, bad): ids, under the names in EAP-IG's tables; then texts.
_IDS = (
    ("correct_idx", "incorrect_idx"),
    ("answers_idx", "corrupted_answers_idx"),
    ("country_idx", "corrupted_country_idx"),
    ("clean_answer_idx", "corrupted_answer_idx"),
)
_TEXTS = (("good", "bad"), ("answer", "wrong_answer"), ("correct", "incorrect"))
_TENSORS = ("clean", "corrupted", "lengths", "answers")
_MASKS = ("attention_mask", "corrupted_attention_mask")  # in place of lengths
_OPTIONAL = (
    *("corrupted_lengths", "alignment", "scored", "targets", "scored_weights", "weights", "spans", "decoder"),
    "variants",
)
_COUNTS = ("scored", "scored_weights", "weight")  # of a record
_SPANS = ("spans", "span_tokens")
_FORMAT = "eap-circuits/1"

_LONGEST = 2**31 - 1  # characters of a cell; of itself csv takes 131,072
# What json and ast raise for a cell that they cannot read: a dict as a member of a set is a TypeError.
_UNREADABLE = (ValueError, SyntaxError, TypeError, RecursionError, MemoryError)

Records = tuple["list[Any]", "list[str]"]


@dataclass(frozen=True)
class PairsFile(os.PathLike[str]):
    """A file of prompt pairs that has been read, and need not be read again where its path is asked for.

    Args:
        rows, labels: what it holds, and what errors call each row.
        tokens: the fields of a dataset, if it holds tokens in place of rows.
    """

    path: Path
    rows: list[Any]
    labels: list[str]
    tokens: dict[str, Any] | None = None

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def names_pictures(self) -> bool:
        return any(isinstance(row, Mapping) and row.get(name) for row in self.rows for name in IMAGES)


def read_file(path: str | os.PathLike[str], read: Callable[[Path], Records] | None = None) -> PairsFile:
    """Read a file with `read`, by default as its suffix says; one that has been read is returned as it is."""
    if isinstance(path, PairsFile):
        return path
    suffix = "" if read else suffix_of(path, SUFFIXES)
    file = check_file(path)
    with naming(file):
        try:
            if suffix in TOKENS:
                return PairsFile(file, [], [], read_tokens(file))
            return PairsFile(file, *(read or (read_csv if suffix == ".csv" else read_rows))(file))
        except UnicodeDecodeError as error:
            raise expected("file", "text in UTF-8", f"a byte that is not, at {error.start}") from error
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror or error}).") from error


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, errors from using a file's content name the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{os.fspath(path)}: {error}") from error


def read_csv(path: Path) -> Records:
    """Rows of texts and their labels; rows are numbered as in a spreadsheet: the header is row 1."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        most = csv.field_size_limit(_LONGEST)
        try:
            cells = list(csv.reader(file, strict=True))
        except csv.Error as error:
            raise expected("file", "comma-separated values", f"something else ({error})") from error
        finally:
            csv.field_size_limit(most)
    header = cells[0] if cells else []
    if _answer_columns(header) is None and "scored" not in header:
        raise expected("row 1", "columns correct_idx and incorrect_idx, or good and bad", header)
    for column in ("clean", "corrupted"):
        if column not in header and (
            column == "clean" or near(column, [name for name in header if name not in IMAGES])
        ):
            raise expected("row 1", f"a column {column!r}", header)
    twice = sorted({column for column in header if column and header.count(column) > 1})
    if twice:
        raise expected("row 1", "each column once", f"{twice} more than once")
    rows, labels = [], []
    for number, row in enumerate(cells[1:], 2):
        if not row:
            continue
        if len(row) != len(header):
            raise expected(f"row {number}", f"{len(header)} cells, as many as columns", len(row))
        rows.append(dict(zip(header, row, strict=True)))
        labels.append(f"row {number}")
    return rows, labels


def read_rows(path: Path) -> Records:
    """Rows and their labels, from `.parquet`, from the list in `.json`, or else from lines, numbered from 1."""
    suffix = path.suffix.lower()
    if suffix in (".json", ".parquet"):
        content = _json(path) if suffix == ".json" else _parquet(path)
        if not isinstance(content, list):
            raise expected("file", "a list of records", type(content).__name__)
        return content, [f"[{index}]" for index in range(len(content))]
    with path.open(encoding="utf-8-sig") as file:
        lines = {f"line {number}": line for number, line in enumerate(file, 1) if line.strip()}
    return [_parsed(line, label, "a JSON object") for label, line in lines.items()], list(lines)


def _json(path: Path) -> Any:
    return _parsed(path.read_text(encoding="utf-8-sig"), "file", "JSON")


def _parsed(text: str, label: str, wanted: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise expected(label, wanted, f"something else ({error})") from error


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise expected("file", "pyarrow (pip install 'eap-kernels[parquet]') to read it with", "none") from error
    try:
        return parquet.read_table(path).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise expected("file", "Parquet", f"something else ({reason(error)})") from error


def own_records(rows: list[Any], labels: list[str]) -> Records:
    """Records for `PairedDataset.from_records`: answers in two columns become a pair.

    Raises:
        InputError: an answer is not what its column holds: an id or a text, or a list of them.
    """
    return [_record(row, label) for row, label in zip(rows, labels, strict=True)], labels


def _record(row: Any, label: str) -> Any:
    if not isinstance(row, Mapping) or "answers" in row:
        return row
    columns = _answer_columns(row)
    if columns is None and "scored" not in row:
        return row
    record = {name: _prompt(row[name]) for name in ("clean", "corrupted", "decoder") if name in row}
    record |= {name: _list(row[name]) or row[name] for name in IMAGES if row.get(name) not in (None, "")}
    record |= {name: _number_or_list(row[name]) for name in _COUNTS if row.get(name) not in (None, "")}
    for name in _SPANS:
        if row.get(name) not in (None, ""):
            record[name] = _parsed(row[name], f"{label}, {name}", "JSON") if isinstance(row[name], str) else row[name]
    if columns is not None:
        member = int if columns in _IDS else str
        record["answers"] = [_answer(row[column], member, f"{label}, {column}") for column in columns]
    return record


def _number_or_list(cell: Any) -> Any:
    """What a cell holds, if it is the text of a number or a list."""
    with suppress(ValueError):
        return _list(cell) or (float(cell) if isinstance(cell, str) else cell)
    return cell


def _prompt(cell: Any) -> Any:
    """A prompt; a cell of a table may hold messages as text."""
    value = _list(cell)
    return value if value and all(isinstance(each, dict) and "role" in each for each in value) else cell


def _list(cell: Any) -> list[Any] | None:
    """The list that a cell holds as text: Python writes lists into tables as often as JSON does."""
    for read in (json.loads, ast.literal_eval) if isinstance(cell, str) and cell[:1] == "[" else ():
        with suppress(*_UNREADABLE):
            return list(read(cell))
    return None


def _answer_columns(names: Collection[str]) -> tuple[str, str] | None:
    """The first pair of answer columns among these names."""
    return next((pair for pair in (*_IDS, *_TEXTS) if all(name in names for name in pair)), None)


def _answer(cell: Any, member: type, label: str) -> Any:
    """An id or a text, or a list of them; a cell of a table may hold the list as text."""
    value = _list(cell) or cell
    if isinstance(value, str) and member is int:
        with suppress(*_UNREADABLE):
            value = json.loads(value)
    members = value if isinstance(value, list) else [value]
    if not members or not all(type(x) is member for x in members):
        raise expected(label, ("a text" if member is str else "a token id") + " or a list of them", repr(cell))
    return value


def read_tokens(path: Path) -> dict[str, Any]:
    """The fields of a dataset, from `.safetensors` or `.pt`. Nothing is unpickled."""
    try:
        content, texts = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pt(path)
    except InputError:
        raise
    except DAMAGED as error:
        raise expected("file", "token tensors", f"something else ({reason(error)})") from error
    masked = not texts and _MASKS[0] in content
    missing = [name for name in _TENSORS if name not in content and not (masked and name == "lengths")]
    if missing:
        raise expected("file", "tensors " + ", ".join(_TENSORS), "none named " + ", ".join(missing))
    names = (*_TENSORS, *(_OPTIONAL if texts else (*_OPTIONAL[:-1], *_MASKS)))
    return {"name": path.stem, **texts, **{name: content[name] for name in names if name in content}}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with safe_open(path, "pt") as file:
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        metadata = file.metadata() or {}
    form = metadata.get("format", _FORMAT)
    if form != _FORMAT and form.startswith(_FORMAT.partition("/")[0]):  # others write others
        raise expected("metadata", f"format {_FORMAT!r}", repr(form))
    if CHECKSUM in metadata:  # older files have none
        check_digest(metadata.pop(CHECKSUM), metadata, content)
    if metadata.get("kind") != "dataset":
        return content, {}
    texts = json.loads(metadata["dataset"])
    if texts["prompts"] is not None:
        texts["prompts"] = [(clean, corrupted) for clean, corrupted in texts["prompts"]]
    return content, {
        "name": str(texts["name"]),
        "metric": str(texts["metric"]),
        "prompts": texts["prompts"],
        "seed": texts.get("seed"),
        "alone": bool(texts.get("alone")),
        "span_names": texts.get("span_names", ()),
        "pictures": _pictures(content, texts["pictures"]) if "pictures" in texts else None,
    }


def _pictures(content: Mapping[str, Any], fields: Mapping[str, Any]) -> Pictures:
    tensors: dict[str, Any] = {name: content.get(f"picture_{name}") for name in ("embeddings", "shifts", "stacked")}
    return Pictures(**tensors, **fields)


def _read_pt(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return content if isinstance(content, dict) else {}, {}


def write_tokens(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor | None], texts: object) -> None:
    """Write a dataset to `.safetensors`, whole or not at all."""
    suffix_of(path, (".safetensors",))
    metadata = {"format": _FORMAT, "kind": "dataset", "dataset": json.dumps(texts)}
    found = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    metadata[CHECKSUM] = digest(metadata, found)
    write_whole(path, lambda file: save_file(found, file, metadata=metadata))
