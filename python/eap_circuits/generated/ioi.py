"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593).

Two people are named. One of them (S) is named again as the giver, so the other one (IO) receives. In the corrupted
prompt the giver is a third person (the paper's ABC prompts), so that nothing says who receives.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from ..errors import expected
from ..texts.encoding import single_tokens
from .sampling import filled, sample_combinations

# {first} and {second} are IO and S in either order (ABBA, BABA); {giver} is S, or a third name in the corrupted prompt.
# Every name follows a space, as most tokenizers have another token for a name without one.
TEMPLATES = (
    "When {first} and {second} arrived at the {place}, {giver} gave a {thing} to",
    "After {first} and {second} had lunch near the {place}, {giver} handed a {thing} to",
    "While {first} and {second} were waiting outside the {place}, {giver} passed a {thing} to",
    "Yesterday {first} and {second} walked through the {place} together, and {giver} offered a {thing} to",
    "Once {first} and {second} found seats in the {place}, {giver} showed a {thing} to",
    "Last week {first} and {second} cleaned the {place}. Afterwards, {giver} lent a {thing} to",
    "The day {first} and {second} visited the {place}, {giver} brought a {thing} to",
    "Because {first} and {second} both worked at the {place}, {giver} sent a {thing} to",
)
NAMES = (
    "Mary", "John", "Tom", "James", "Sarah", "Anna", "Paul", "Mark", "Alice", "Peter", "David", "Laura",
    "Emma", "Kate", "Simon", "Jack", "Henry", "George", "Robert", "Susan", "Linda", "Adam", "Daniel",
    "Michael", "Lucy", "Jane", "Ruth", "Martin", "Frank", "Oliver", "Helen", "Julia", "Maria", "Kevin",
    "Brian", "Lisa", "Rachel", "Thomas", "William", "Charles",
)  # fmt: skip
PLACES = ("station", "library", "market", "museum", "hospital", "school", "park", "office", "garden")
THINGS = ("book", "letter", "ticket", "drink", "basket", "ring", "map", "phone", "flower", "key")


def generate(tokenizer: Any, n: int, rng: random.Random) -> list[dict[str, Any]]:
    """n records; the answers are the ids of IO (good) and S (bad). Raises `InputError` if too few names fit."""
    ids = single_tokens(tokenizer, "They gave it to", NAMES)
    if len(ids) < 3:
        raise expected("tokenizer", "at least 3 of the task's names as one token behind a space", list(ids) or "none")
    triples = list(itertools.permutations(ids, 3))
    records = []
    for template, swapped, (io, s, other), place, thing in sample_combinations(
        (TEMPLATES, (False, True), triples, PLACES, THINGS), n, rng
    ):
        first, second = (s, io) if swapped else (io, s)
        (clean, spans), (corrupted, _) = (
            filled(template, first=first, second=second, giver=giver, place=place, thing=thing) for giver in (s, other)
        )
        records.append({"clean": clean, "corrupted": corrupted, "answers": [ids[io], ids[s]], "spans": spans})
    return records
