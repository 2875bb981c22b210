"""Draw combinations without repeats."""

from __future__ import annotations

import random
from collections.abc import Sequence
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


def sample_records(pairs: Sequence[tuple[str, str, Any]], n: int, rng: random.Random) -> list[dict[str, Any]]:
    """n records, as `PairedDataset.from_records` takes them, of tuples (clean, corrupted, answers)."""
    chosen = sample_combinations((pairs,), n, rng)
    return [dict(zip(("clean", "corrupted", "answers"), pair, strict=True)) for (pair,) in chosen]


def _combination(choices: Sequence[Sequence[Any]], number: int) -> tuple[Any, ...]:
    chosen = []
    for members in choices:
        number, index = divmod(number, len(members))
        chosen.append(members[index])
    return tuple(chosen)
