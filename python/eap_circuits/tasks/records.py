"""Turn text records into tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import expected
from .encoding import answer_id, check_text, check_tokenizer, encode_prompts


def tokenised(
    records: Sequence[Mapping[str, Any]], labels: Sequence[str], tokenizer: Any, prepend_bos: bool, align: bool
) -> dict[str, Any]:
    """The fields of a dataset, from the records that `PairedDataset.from_records` takes.

    Args:
        labels: what errors call each record.

    Raises:
        InputError: names the record and the part of it that is missing, empty, of unequal length or not one token.
    """
    check_tokenizer(tokenizer)
    if not records:
        raise expected("records", "at least one prompt pair", "none")
    for record, label in zip(records, labels, strict=True):
        _check_record(record, label)
    clean = encode_prompts(tokenizer, [record["clean"] for record in records], prepend_bos)
    corrupted = encode_prompts(tokenizer, [record["corrupted"] for record in records], prepend_bos)
    answers = []
    for record, label, first, second in zip(records, labels, clean, corrupted, strict=True):
        numbers = f"{len(first)} and {len(second)}"
        if not first or not second:
            raise expected(label, "at least one token in clean and in corrupted", numbers)
        if len(first) != len(second) and not align:
            wanted = "the same number of tokens in clean and corrupted (align=True or --align takes others too)"
            raise expected(label, wanted, numbers)
        answers.append(_answer_sets(record, label, tokenizer))
    return {
        "clean": _padded(clean, 0),
        "corrupted": _padded(corrupted, 0),
        "lengths": torch.tensor([len(ids) for ids in clean]),
        "answers": _answer_tensor(answers),
        "prompts": tuple((record["clean"], record["corrupted"]) for record in records),
        "corrupted_lengths": torch.tensor([len(ids) for ids in corrupted]),
    }


def _padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])


def _check_record(record: Any, label: str) -> None:
    if not isinstance(record, Mapping):
        raise expected(label, "a mapping with clean, corrupted and answers", type(record).__name__)
    for key in ("clean", "corrupted", "answers"):
        if key not in record:
            raise expected(label, f"the key {key!r}", f"only {list(record)}")
    for key in ("clean", "corrupted"):
        if not isinstance(record[key], str) or not record[key]:
            found = "an empty text" if record[key] == "" else type(record[key]).__name__
            raise expected(f"{label}, {key}", "a prompt", found)
        check_text(record[key], f"{label}, {key}")
    answers = record["answers"]
    one = isinstance(answers, Tensor) and not answers.dim()
    if not isinstance(answers, (list, tuple, Tensor)) or one or len(answers) != 2:
        raise expected(f"{label}, answers", "a list [good, bad]", repr(answers))


def _answer_sets(record: Mapping[str, Any], label: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids of the record's good and bad answers."""
    good, bad = (
        _ids(answer, f"{label}, {side} answer", record["clean"], tokenizer)
        for answer, side in zip(record["answers"], ("good", "bad"), strict=True)
    )
    shared = sorted(set(good) & set(bad))
    if shared:
        tokens = tokenizer.convert_ids_to_tokens(shared)
        raise expected(f"{label}, answers", "good and bad answers that differ", f"{tokens} in both")
    return good, bad


def _ids(answer: Any, label: str, prompt: str, tokenizer: Any) -> list[int]:
    if isinstance(answer, Tensor):
        answer = answer.tolist()
    members = list(answer) if isinstance(answer, (list, tuple, set, frozenset, range)) else [answer]
    if not members:
        raise expected(label, "at least one token", "an empty list")
    ids = []
    for member in members:
        if isinstance(member, str):
            check_text(member, label)
            ids.append(answer_id(tokenizer, member, prompt, label))
        elif hasattr(member, "__index__") and not isinstance(member, bool):
            if not 0 <= int(member) < 2**31:
                raise expected(label, "a token id of 0 or more, below 2**31", int(member))
            ids.append(int(member))
        else:
            raise expected(label, "a token id, a text of one token, or a list of these", repr(member))
    return list(dict.fromkeys(ids))


def _answer_tensor(answers: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """int64 [E, 2] if every set holds one id, else [E, 2, A] padded with -1."""
    tensor = _padded([ids for pair in answers for ids in pair], -1).view(len(answers), 2, -1)
    return tensor[..., 0] if tensor.shape[2] == 1 else tensor
