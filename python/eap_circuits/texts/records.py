"""Turn text records into tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import expected, warn
from .encoding import answer_id, chat_text, check_text, check_tokenizer, encode_prompts, respelled

_SIDES = ("clean", "corrupted")


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
    texts = [_texts(record, label, tokenizer) for record, label in zip(records, labels, strict=True)]
    clean, corrupted = (
        # A chat template writes the special tokens itself.
        encode_prompts(tokenizer, side, [prepend_bos and isinstance(record[name], str) for record in records])
        for name, side in zip(_SIDES, zip(*texts, strict=True), strict=True)
    )
    answers, odd = [], list[str]()
    for record, label, prompts, first, second in zip(records, labels, texts, clean, corrupted, strict=True):
        numbers = f"{len(first)} and {len(second)}"
        if not first or not second:
            raise expected(label, "at least one token in clean and in corrupted", numbers)
        if len(first) != len(second) and not align:
            wanted = "the same number of tokens in clean and corrupted (align=True or --align takes others too)"
            raise expected(label, wanted, numbers)
        answers.append(_answer_sets(record["answers"], label, prompts[0], tokenizer, odd))
    if odd:
        such = f"one of {len(odd)} answers that are" if len(odd) > 1 else "an answer that is"
        warn(
            f"{odd[0]}: {such} not what the tokenizer makes of the text after the prompt. The model may not expect it; "
            "often the prompt ends in a space or in the middle of a word."
        )
    tensor = _answer_tensor(answers)
    return {
        "clean": _padded(clean, 0),
        "corrupted": _padded(corrupted, 0),
        "lengths": torch.tensor([len(ids) for ids in clean]),
        "answers": tensor,
        "prompts": tuple(texts),
        "corrupted_lengths": torch.tensor([len(ids) for ids in corrupted]),
        "variants": _variants(tensor, tokenizer),
    }


def _padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])


def _texts(record: Any, label: str, tokenizer: Any) -> tuple[str, str]:
    """The clean and the corrupted prompt of a record, checked."""
    if not isinstance(record, Mapping):
        raise expected(label, "a mapping with clean, corrupted and answers", type(record).__name__)
    for key in (*_SIDES, "answers"):
        if key not in record:
            raise expected(label, f"the key {key!r}", f"only {list(record)}")
    clean, corrupted = (_text(record[side], f"{label}, {side}", tokenizer) for side in _SIDES)
    answers = record["answers"]
    one = isinstance(answers, Tensor) and not answers.dim()
    if not isinstance(answers, (list, tuple, Tensor)) or one or len(answers) != 2:
        raise expected(f"{label}, answers", "a list [good, bad]", repr(answers))
    return clean, corrupted


def _text(prompt: Any, label: str, tokenizer: Any) -> str:
    """A prompt's text: as it is, or what the chat template makes of messages."""
    if isinstance(prompt, (list, tuple)):
        if not prompt or not all(isinstance(each, Mapping) and {"role", "content"} <= set(each) for each in prompt):
            raise expected(label, "messages, each with role and content", repr(prompt)[:80])
        prompt = chat_text(tokenizer, prompt, label)
    if not isinstance(prompt, str) or not prompt:
        raise expected(label, "a prompt", "an empty text" if prompt == "" else type(prompt).__name__)
    check_text(prompt, label)
    return prompt


def _answer_sets(
    answers: Sequence[Any], label: str, prompt: str, tokenizer: Any, odd: list[str]
) -> tuple[list[int], list[int]]:
    """The ids of the good and bad answers; `odd` gets what is odd about them."""
    good, bad = (
        _ids(answer, f"{label}, {side} answer", prompt, tokenizer, odd)
        for answer, side in zip(answers, ("good", "bad"), strict=True)
    )
    shared = sorted(set(good) & set(bad))
    if shared:
        tokens = tokenizer.convert_ids_to_tokens(shared)
        raise expected(f"{label}, answers", "good and bad answers that differ", f"{tokens} in both")
    return good, bad


def _ids(answer: Any, label: str, prompt: str, tokenizer: Any, odd: list[str]) -> list[int]:
    if isinstance(answer, Tensor):
        answer = answer.tolist()
    members = list(answer) if isinstance(answer, (list, tuple, set, frozenset, range)) else [answer]
    if not members:
        raise expected(label, "at least one token", "an empty list")
    ids = []
    for member in members:
        if isinstance(member, str):
            check_text(member, label)
            token, oddity = answer_id(tokenizer, member, prompt, label)
            ids.append(token)
            odd += [] if oddity is None else [oddity]
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


def _variants(answers: Tensor, tokenizer: Any) -> Tensor:
    """The answers with, or without, a leading space, shaped as they are; -1 where there is none or it is an answer."""
    twins = {token: respelled(tokenizer, token) for token in answers.unique().tolist() if token >= 0}
    found = answers.clone().apply_(lambda token: twins.get(token, -1))
    example = torch.arange(len(answers)).view(-1, *[1] * (answers.dim() - 1)) << 32
    return found.masked_fill(torch.isin(found + example, answers + example), -1)
