"""Named spans of clean prompts: from characters or tokens to the span of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import expected, listed, whole
from .encoding import character_ranges

_RANGES = "[start, end], characters of the clean prompt with 0 <= start < end, or a list of such ranges"


def spans_of(
    records: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    texts: Sequence[str],
    clean: Sequence[list[int]],
    tokenizer: Any,
) -> dict[str, Any]:
    """`span_names`, and `spans` int64 [E, T], which of these each token of a clean prompt is in, or -1.

    Args:
        records: may have "spans", name -> range or ranges of characters, and "span_tokens", name -> tokens' positions.
        texts, clean: the prompts, and their tokens.

    Raises:
        InputError: names the record and the span that is not in the prompt, that others lack, or that meets another.
    """
    given = [_given(record, label) for record, label in zip(records, labels, strict=True)]
    names = list(given[0])
    spans = torch.full((len(clean), max(map(len, clean))), -1)
    for own, record, label, text, ids, row in zip(given, records, labels, texts, clean, spans, strict=True):
        if set(own) != set(names):
            wanted = f"the spans of {labels[0]}, {names} (an empty list where a prompt lacks one)"
            raise expected(f"{label}, spans", wanted, list(own))
        for name, (by_character, places) in own.items():
            where = f"{label}, {'spans' if by_character else 'span_tokens'}, {name!r}"
            if by_character and places and not isinstance(record["clean"], str):
                raise expected(where, "span_tokens, as the prompt is messages", "characters")
            found = _characters(where, places, text, ids, tokenizer) if by_character else _tokens(where, places, ids)
            taken = [place for place in found if row[place] >= 0]
            if taken:
                other, token = names[int(row[taken[0]])], tokenizer.convert_ids_to_tokens(ids[taken[0]])
                raise expected(
                    where, "tokens that are in no other span", f"token {taken[0]}, {token!r}, in {other!r} too"
                )
            row[found] = names.index(name)
    return {"spans": spans, "span_names": tuple(names)} if names else {}


def _given(record: Mapping[str, Any], label: str) -> dict[str, tuple[bool, Any]]:
    """name -> (by character?, where) of each span of a record."""
    found: dict[str, tuple[bool, Any]] = {}
    for key in ("spans", "span_tokens"):
        spans = {} if record.get(key) is None else record[key]
        if not isinstance(spans, Mapping):
            raise expected(f"{label}, {key}", "a mapping of names", repr(spans))
        for name, where in spans.items():
            if name in found:
                raise expected(f"{label}, {key}", "each span once", f"{name!r} in spans, too")
            found[name] = key == "spans", [] if where is None else where
    return found


def _characters(label: str, given: Any, text: str, ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens that a span's characters are of."""
    ranges = listed(label, given, _RANGES)
    if ranges and not isinstance(ranges[0], (list, tuple)):
        ranges = [ranges]
    found: set[int] = set()
    known = character_ranges(tokenizer, text, ids, label) if ranges else []
    for each in ranges:
        pair = [whole(label, x, 0, len(text), ", the characters of the prompt") for x in listed(label, each, _RANGES)]
        if len(pair) != 2 or pair[0] >= pair[1]:
            raise expected(label, _RANGES, each)
        start, end = pair
        # A token without characters of its own, such as a space that its tokenizer trims, is inside or not at all.
        own = [i for i, (a, b) in enumerate(known) if (a < end and start < b) or (a == b and start < a < end)]
        if not own:
            raise expected(label, "characters that belong to a token", f"{text[start:end]!r}")
        found |= set(own)
    return sorted(found)


def _tokens(label: str, given: Any, ids: list[int]) -> list[int]:
    size = len(ids)
    places = [whole(label, x, -size, size - 1) % size for x in listed(label, given, "a list of token positions")]
    if len(set(places)) < len(places):
        raise expected(label, "each position once", given)
    return places
