"""Draw combinations without repeats, and fill templates."""

from __future__ import annotations

import random
from collections.abc import Sequence
from string import Formatter
from typing import Any


def sample_combinations(choices: Sequence[Sequence[Any]], n: int, rng: random.Random) -> list[tuple[Any, ...]]:
    """n tuples with one member of each of `choices`; none repeats until all have been drawn."""
    total = 1
    for members in choices:
        total *= len(members)
    numbers: list[int] = []
    while len(numbers) < n:
        numbers += rng.sample(range(total), min(n - len(numbers), total))
    return [_combination(choices, number) for number in numbers]


Spans = dict[str, list[int]]  # the characters of each slot, [start, end]


def filled(template: str, **slots: str) -> tuple[str, Spans]:
    """The text of a template whose slots are filled, and where they are."""
    text, spans = "", Spans()
    for before, name, *_ in Formatter().parse(template):
        text += before
        if name is not None:
            spans[name] = [len(text), len(text) + len(slots[name])]
            text += slots[name]
    return text, spans


def sample_records(pairs: Sequence[tuple[str, str, Any, Spans]], n: int, rng: random.Random) -> list[dict[str, Any]]:
    """n records, as `PairedDataset.from_records` takes them, of tuples (clean, corrupted, answers, spans)."""
    chosen = sample_combinations((pairs,), n, rng)
    return [dict(zip(("clean", "corrupted", "answers", "spans"), pair, strict=True)) for (pair,) in chosen]


def _combination(choices: Sequence[Sequence[Any]], number: int) -> tuple[Any, ...]:
    chosen = []
    for members in choices:
        number, index = divmod(number, len(members))
        chosen.append(members[index])
    return tuple(chosen)
