"""Subject–verb agreement (Linzen et al. 2016, arXiv 1611.01368; Newman et al. 2021, arXiv 2104.09635).

A noun is followed by words that do not tell its number but may contain a noun of the other number; then a verb follows.
In the corrupted prompt the noun has the other number.
"""

from __future__ import annotations

import random
from typing import Any

from ..errors import expected
from ..texts.encoding import equally_long, single_tokens
from .sampling import filled, sample_combinations

NOUNS = (
    ("key", "keys"), ("teacher", "teachers"), ("author", "authors"), ("book", "books"), ("car", "cars"),
    ("doctor", "doctors"), ("farmer", "farmers"), ("picture", "pictures"), ("friend", "friends"), ("boy", "boys"),
    ("girl", "girls"), ("student", "students"), ("dog", "dogs"), ("tree", "trees"), ("letter", "letters"),
    ("house", "houses"), ("bird", "birds"), ("painter", "painters"), ("worker", "workers"), ("horse", "horses"),
    ("soldier", "soldiers"), ("chair", "chairs"), ("ship", "ships"), ("actor", "actors"), ("window", "windows"),
    ("visitor", "visitors"), ("chef", "chefs"), ("cup", "cups"),
)  # fmt: skip
# Subordinate clauses, because after the first noun of a sentence a comma is as likely as a verb.
STEMS = ("We know that the", "I think the", "It is true that the", "She told us that the")
PHRASES = (
    "near the table", "near the tables", "next to the door", "next to the doors", "behind the wall",
    "behind the gardens", "from the village", "that the man likes", "that the men like", "in front of the school",
    "beside the rivers", "opposite the church", "across the street", "under the bridge", "in the small rooms",
)  # fmt: skip
VERBS = (
    ("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"), ("seems", "seem"), ("looks", "look"),
    ("needs", "need"), ("makes", "make"), ("comes", "come"), ("gets", "get"), ("stands", "stand"),
)  # fmt: skip
_LEAST = 4
_SLOTS = "{noun} {phrase}"


def generate(tokenizer: Any, n: int, rng: random.Random) -> list[dict[str, Any]]:
    """n records whose answers are the verbs' ids in the noun's number (good) and in the other number (bad).

    Raises:
        InputError: too few nouns have as many tokens in the plural, or no verb has two forms of one token each.
    """
    ids = single_tokens(tokenizer, _text(STEMS[0], NOUNS[0][0], PHRASES[0]), (form for pair in VERBS for form in pair))
    verbs = [(ids[one], ids[many]) for one, many in VERBS if one in ids and many in ids]
    if not verbs:
        raise expected(
            "tokenizer", "one of the task's verbs with both forms one token behind a space", list(ids) or "none"
        )
    nouns = []
    for pair in NOUNS:
        texts = [_text(stem, form, PHRASES[0]) for stem in STEMS for form in pair]
        same = equally_long(tokenizer, texts)
        if all((first, first + 1) in same for first in range(0, len(texts), 2)):
            nouns.append(pair)
    if len(nouns) < _LEAST:
        found = [one for one, _ in nouns] or "none"
        raise expected("tokenizer", f"at least {_LEAST} of the task's nouns with as many tokens in the plural", found)
    answers = [[one for one, _ in verbs], [many for _, many in verbs]]
    records = []
    for stem, pair, plural, phrase in sample_combinations((STEMS, nouns, (0, 1), PHRASES), n, rng):
        (clean, spans), (corrupted, _) = (
            filled(f"{stem} {_SLOTS}", noun=pair[number], phrase=phrase) for number in (plural, 1 - plural)
        )
        sides = [answers[plural], answers[1 - plural]]
        records.append({"clean": clean, "corrupted": corrupted, "answers": sides, "spans": spans})
    return records


def _text(stem: str, noun: str, phrase: str) -> str:
    return filled(f"{stem} {_SLOTS}", noun=noun, phrase=phrase)[0]
