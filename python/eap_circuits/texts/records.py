"""Turn text records into tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import expected, listed, near, number, warn, whole
from .encoding import (
    answer_ids,
    answer_in_place,
    chat_text,
    check_text,
    check_tokenizer,
    encode_many,
    encode_prompts,
    mask_id,
    of_decoder,
    respelled,
)
from .spans import spans_of

_SIDES = ("clean", "corrupted")
IMAGES = ("clean_image", "corrupted_image")  # of a record
_OTHERS = ("scored", "scored_weights", "weight", "spans", "span_tokens", "decoder")  # no slips of the pen
_COUNTS = "a finite number above 0"
Answer = list[int]  # its tokens


def tokenised(
    records: Sequence[Mapping[str, Any]], labels: Sequence[str], tokenizer: Any, prepend_bos: bool, align: bool
) -> dict[str, Any]:
    """The fields of a dataset, from the records that `PairedDataset.from_records` takes.

    Args:
        labels: what errors call each record.

    Raises:
        InputError: names the record and the part of it that is missing, empty or of unequal length.
    """
    check_tokenizer(tokenizer)
    if not records:
        raise expected("records", "at least one prompt pair", "none")
    records, labels = _each_corrupted(records, labels)
    texts = [_texts(record, label, tokenizer) for record, label in zip(records, labels, strict=True)]
    begun = _decoder_texts(records, labels)
    clean, corrupted = (
        # A chat template writes the special tokens itself.
        encode_prompts(
            tokenizer, side, [prepend_bos and isinstance(_prompt(record, name), str) for record in records], bool(begun)
        )
        for name, side in zip(_SIDES, zip(*texts, strict=True), strict=True)
    )
    paired, answered, placed = (_in_all(records, labels, name) for name in ("corrupted", "answers", "scored"))
    masks = None if placed or begun else _masks(labels, tokenizer, clean, corrupted, answered)
    answers, odd = [], list[str]()
    answerable, answering = (begun, of_decoder(tokenizer)) if begun else ([own for own, _ in texts], tokenizer)
    for record, label, prompt, first, second in zip(records, labels, answerable, clean, corrupted, strict=True):
        if not first or not second:
            numbers = f"{len(first)} and {len(second)}"
            raise expected(label, "at least one token in clean and in corrupted", numbers)
        check_equal_lengths(label, len(first), len(second), align)
        if answered:
            answers.append(_answer_sets(record["answers"], label, prompt, answering, odd))
    if odd:
        such = f"one of {len(odd)} answers that are" if len(odd) > 1 else "an answer that is"
        warn(
            f"{odd[0]}: {such} not what the tokenizer makes of the text after the prompt. The model may not expect it; "
            "often the prompt ends in a space or in the middle of a word."
        )
    tensor = _answer_tensor(answers) if answered else torch.empty(len(clean), 2, 0, dtype=torch.int64)
    return {
        "clean": _padded(clean, 0),
        "corrupted": _padded(corrupted, 0),
        "lengths": torch.tensor([len(ids) for ids in clean]),
        "answers": tensor,
        "prompts": tuple(texts),
        "corrupted_lengths": torch.tensor([len(ids) for ids in corrupted]),
        "variants": _variants(tensor, answering) if answered and tensor.dim() < 4 else None,
        "alone": not paired,
        **(_scored(records, labels, clean) if placed else {}),
        **({} if masks is None else {"scored": masks, "targets": _filling(tensor, masks)}),
        "weights": _weights(records, labels),
        "decoder": _padded(encode_many(answering, begun), -1) if begun else None,
        **spans_of(records, labels, [own for own, _ in texts], clean, tokenizer),
    }


def check_equal_lengths(label: str, clean: int, corrupted: int, align: bool) -> None:
    """Refuse a pair of prompts with different numbers of tokens, unless they are aligned."""
    if clean != corrupted and not align:
        wanted = "the same number of tokens in clean and corrupted (align=True or --align takes others too)"
        raise expected(label, wanted, f"{clean} and {corrupted}")


def _padded(rows: Sequence[Sequence[float]], padding: int, dtype: torch.dtype = torch.int64) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], dtype=dtype)


def _each_corrupted(records: Sequence[Any], labels: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Records and labels; one with several corrupted prompts becomes one for each, which share its weight."""
    found, names = [], []
    for record, label in zip(records, labels, strict=True):
        several = record.get("corrupted") if isinstance(record, Mapping) else None
        if not isinstance(several, (list, tuple)) or not all(isinstance(each, (str, list, tuple)) for each in several):
            several = []
        if several:
            share = _weight(record, label) / len(several)
        found += [{**record, "corrupted": each, "weight": share} for each in several] or [record]
        names += [f"{label}, corrupted[{i}]" for i in range(len(several))] or [label]
    return found, names


def _prompt(record: Mapping[str, Any], side: str) -> Any:
    """The clean prompt stands for a corrupted one that is missing."""
    return record["clean"] if record.get(side) is None else record[side]


def _in_all(records: Sequence[Mapping[str, Any]], labels: Sequence[str], name: str) -> bool:
    """Have the records this part? Refuses that some have and others have not."""
    has = [record.get(name) is not None for record in records]
    if len(set(has)) > 1:
        raise expected(labels[has.index(not has[0])], f"{name} in every record or in none", f"{name} in some")
    return has[0]


def _texts(record: Any, label: str, tokenizer: Any) -> tuple[str, str]:
    """The clean and the corrupted prompt of a record, checked."""
    if not isinstance(record, Mapping):
        raise expected(label, "a mapping with clean, corrupted and answers", type(record).__name__)
    pictured = next((name for name in IMAGES if record.get(name) is not None), None)
    if pictured is not None:
        raise expected(label, "texts alone (image_pairs_from_file takes pictures)", pictured)
    optional = {"corrupted"} | ({"answers"} if record.get("scored") is not None else set())
    for key in (*_SIDES, "answers"):
        if key not in record and (
            key not in optional or near(key, [str(name) for name in record if name not in _OTHERS])
        ):
            without = " (None where there are none)" if key == "answers" else ""
            raise expected(label, f"the key {key!r}{without}", f"only {list(record)}")
    clean, corrupted = (prompt_text(_prompt(record, side), f"{label}, {side}", tokenizer) for side in _SIDES)
    answers = record.get("answers")
    one = isinstance(answers, Tensor) and not answers.dim()
    if answers is not None and (not isinstance(answers, (list, tuple, Tensor)) or one or len(answers) != 2):
        raise expected(f"{label}, answers", "a list [good, bad]", repr(answers))
    return clean, corrupted


def _decoder_texts(records: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[str]:
    """What the decoder of an encoder-decoder reads behind its start token, in each record; [] for other models."""
    if not _in_all(records, labels, "decoder"):
        return []
    for record, label in zip(records, labels, strict=True):
        if not isinstance(record["decoder"], str):
            raise expected(f"{label}, decoder", "a text, which may be empty", type(record["decoder"]).__name__)
        check_text(record["decoder"], f"{label}, decoder")
    return [record["decoder"] for record in records]


def _scored(records: Sequence[Mapping[str, Any]], labels: Sequence[str], clean: Sequence[list[int]]) -> dict[str, Any]:
    """The scored positions of each record, and their weights."""
    places, weights = [], []
    weighted = _in_all(records, labels, "scored_weights")
    for record, label, ids in zip(records, labels, clean, strict=True):
        name, size, wanted = f"{label}, scored", len(ids), "a list of positions, or 'all'"
        given = record["scored"]
        if isinstance(given, str) and given == "all":
            given = range(size - 1)  # the last token has no next one
        own = [whole(name, each, -size, size - 1) % size for each in listed(name, given, wanted)]
        if not own or own != sorted(set(own)):
            raise expected(name, f"at least one position of {size} tokens, in growing order", given)
        places.append(own)
        if weighted:
            name = f"{label}, scored_weights"
            each = listed(name, record["scored_weights"], "a list of numbers")
            weights.append([number(name, x, "a finite number of 0 or more", 0, 1e308) for x in each])
            if len(weights[-1]) != len(own) or not any(weights[-1]):
                raise expected(name, f"{len(own)} numbers, one for each scored position, not all 0", each)
    return {"scored": _padded(places, -1), "scored_weights": _padded(weights, 0, torch.float64) if weighted else None}


def _masks(
    labels: Sequence[str], tokenizer: Any, clean: Sequence[list[int]], corrupted: Sequence[list[int]], answered: bool
) -> Tensor | None:
    """Where the clean prompts have mask tokens, which are scored: [E, P], padded with -1; None: nowhere."""
    mask = mask_id(tokenizer)
    where = [[[i for i, token in enumerate(ids) if token == mask] for ids in side] for side in (clean, corrupted)]
    if not any(where[0]):
        return None
    for label, first, second, places, others in zip(labels, clean, corrupted, *where, strict=True):
        if not places or (answered and len(places) > 1):
            wanted = f"{'one' if answered else 'at least one'} {tokenizer.mask_token} in clean, as in other records"
            raise expected(label, wanted, len(places) or "none")
        # Compared are equal positions, or what follows the last difference, or comes before the first one.
        same = len(first) == len(second) and places == others
        same = same or first[places[0] :] == second[others[0] if others else len(second) :]
        if not same and first[: places[-1] + 1] != second[: places[-1] + 1]:
            raise expected(
                f"{label}, corrupted", f"{tokenizer.mask_token} where clean has it, at {places}", others or "none"
            )
    return _padded(where[0], -1)


def _filling(answers: Tensor, masks: Tensor) -> Tensor:
    """What should stand in the masks' places: the good answer, where there is one; shaped as `masks`."""
    one = answers.dim() == 2 and answers.numel()
    return answers[:, :1].masked_fill(masks < 0, -1) if one else torch.full_like(masks, -1)


def _weights(records: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Tensor | None:
    if all(record.get("weight") is None for record in records):
        return None
    return torch.tensor([_weight(*each) for each in zip(records, labels, strict=True)], dtype=torch.float64)


def _weight(record: Mapping[str, Any], label: str) -> float:
    """How much a record counts; 1 where it does not say."""
    given = record.get("weight")
    return 1.0 if given is None else number(f"{label}, weight", given, _COUNTS, 5e-324, 1e308)


def prompt_text(prompt: Any, label: str, tokenizer: Any) -> str:
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
) -> tuple[list[Answer], list[Answer]]:
    """The ids of the good and bad answers; `odd` gets what is odd about them."""
    good, bad = (
        _members(answer, f"{label}, {side} answer", prompt, tokenizer, odd)
        for answer, side in zip(answers, ("good", "bad"), strict=True)
    )
    shared = next((ids for ids in good if ids in bad), None)
    if shared:
        tokens = tokenizer.convert_ids_to_tokens(shared)
        raise expected(f"{label}, answers", "good and bad answers that differ", f"{tokens} in both")
    return good, bad


def _members(answer: Any, label: str, prompt: str, tokenizer: Any, odd: list[str]) -> list[Answer]:
    if isinstance(answer, Tensor):
        answer = answer.tolist()
    members = list(answer) if isinstance(answer, (list, tuple, set, frozenset, range)) else [answer]
    if not members:
        raise expected(label, "at least one token", "an empty list")
    found: dict[tuple[int, ...], None] = {}
    for member in members:
        if isinstance(member, str):
            check_text(member, label)
            if mask_id(tokenizer) is not None and prompt.count(tokenizer.mask_token) == 1:
                ids, oddity = [answer_in_place(tokenizer, member, prompt, label)], None
            else:
                ids, oddity = answer_ids(tokenizer, member, prompt, label)
            odd += [] if oddity is None else [oddity]
        elif isinstance(member, (list, tuple)) and member:
            ids = [_id(each, label) for each in member]
        else:
            ids = [_id(member, label)]
        found[tuple(ids)] = None
    return [list(ids) for ids in found]


def _id(given: Any, label: str) -> int:
    if not hasattr(given, "__index__") or isinstance(given, bool):
        raise expected(label, "a token id, a text or list of ids, or a list of these", repr(given))
    if not 0 <= int(given) < 2**31:
        raise expected(label, "a token id of 0 or more, below 2**31", int(given))
    return int(given)


def _answer_tensor(answers: Sequence[tuple[list[Answer], list[Answer]]]) -> Tensor:
    """int64 [E, 2] if every set holds one id, else [E, 2, A], or [E, 2, A, L] if an answer has several tokens."""
    longest = max(len(ids) for pair in answers for side in pair for ids in side)
    most = max(len(side) for pair in answers for side in pair)
    sides = [[*side, *[[]] * (most - len(side))] for pair in answers for side in pair]
    tensor = _padded([ids for side in sides for ids in side], -1).view(len(answers), 2, most, longest)
    return tensor if longest > 1 else tensor[..., 0] if most > 1 else tensor[..., 0, 0]


def _variants(answers: Tensor, tokenizer: Any) -> Tensor:
    """The answers with, or without, a leading space, shaped as they are; -1 where there is none or it is an answer."""
    twins = {token: respelled(tokenizer, token) for token in answers.unique().tolist() if token >= 0}
    found = answers.clone().apply_(lambda token: twins.get(token, -1))
    example = torch.arange(len(answers)).view(-1, *[1] * (answers.dim() - 1)) << 32
    return found.masked_fill(torch.isin(found + example, answers + example), -1)
