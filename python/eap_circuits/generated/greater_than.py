"""Greater-than (Hanna et al. 2023, arXiv 2305.00586): something ends in a later year than it began.

What a model predicts depends on how its tokenizer splits a year, so the prompt's end and the answers do too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import expected
from ..texts.encoding import encode_plain, next_token
from .sampling import filled, sample_combinations

STEM = "The {noun} lasted from the year {year} to the year"
CENTURIES = ("17", "16", "15", "14", "13", "12", "11")
NOUNS = (
    "war", "strike", "project", "journey", "drought", "famine", "festival", "siege", "reign",
    "trial", "rebellion", "voyage", "dispute", "plague", "alliance", "marriage", "expedition", "occupation",
    "campaign", "reform", "revolt", "contract", "friendship", "investigation", "tour", "truce", "settlement",
    "partnership", "study", "march",
)  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How a tokenizer splits ` 1732`: `ending` closes the prompt, `piece` is one token, the rest follows.

    Args:
        ending: the text after "to the year", where {c} is the century.
        piece: the answer for a year, where {t} and {u} are its last two digits.
        step: how many years share a piece: 1, or 10 if the piece stops at the tens.
    """

    ending: str
    piece: str
    step: int

    def pieces(self, century: str) -> list[str]:
        """The pieces of the century's years in order: 100 of them, or 10."""
        return [self.piece.format(c=century, t=y // 10, u=y % 10) for y in range(0, 100, self.step)]


SCHEMES = (
    Scheme(" {c}", "{t}{u}", 1),  # two digits: GPT-2, Pythia
    Scheme(" {c}", "{t}", 10),  # single digits: Llama 2, Gemma, Qwen, SmolLM
    Scheme(" ", "{c}{t}", 10),  # three digits: Llama 3, OLMo 2
    Scheme("", " {c}{t}{u}", 1),  # whole years
)


def generate(tokenizer: Any, n: int, rng: random.Random) -> list[dict[str, Any]]:
    """n records whose answers are sets of ids: later pieces (good), and the others (bad).

    If a piece completes the year, the first year itself is a bad answer. If it stops at the tens, the first year's tens
    are in neither set, since the unit decides. In the corrupted prompt the first year ends in 01, or its tens are 0.

    Raises:
        InputError: the tokenizer splits years so that no answers are one token.
    """
    for scheme in SCHEMES:
        years = list(_years(tokenizer, scheme))
        if years:
            break
    else:
        example = tokenizer.convert_ids_to_tokens(encode_plain(tokenizer, "the year 1732"))
        raise expected(
            "tokenizer",
            "years whose whole, first three, last two or tens digits are one token each",
            f"'the year 1732' as {example}",
        )
    records = []
    for noun, (clean, corrupted, ending, good, bad) in sample_combinations((NOUNS, years), n, rng):
        (text, spans), (other, _) = (filled(STEM, noun=noun, year=year) for year in (clean, corrupted))
        record = {"clean": text + ending, "corrupted": other + ending, "answers": [good, bad], "spans": spans}
        records.append(record)
    return records


_Year = tuple[str, str, str, "list[int]", "list[int]"]


def _years(tokenizer: Any, scheme: Scheme) -> Iterator[_Year]:
    """(clean year, corrupted year, ending, good ids, bad ids) of every pair of years that the scheme fits."""
    for century in CENTURIES:
        ending = scheme.ending.format(c=century)
        ids = _piece_ids(tokenizer, scheme, century)
        if ids is None:
            continue
        for year in range(2, 99) if scheme.step == 1 else range(10, 90):
            clean = f"{century}{year:02}"
            corrupted = f"{century}01" if scheme.step == 1 else f"{century}0{year % 10}"
            rank = year // scheme.step
            context, other = (STEM.format(noun=NOUNS[0], year=y) + ending for y in (clean, corrupted))
            if not _comparable(tokenizer, context, other):
                continue
            piece, rest = scheme.pieces(century)[rank], "" if scheme.step == 1 else str(year % 10)
            if _token_behind(tokenizer, context, piece, rest) != ids[rank]:
                continue
            bad = ids[: rank + 1] if scheme.step == 1 else ids[:rank]
            yield clean, corrupted, ending, ids[rank + 1 :], bad


def _comparable(tokenizer: Any, clean: str, corrupted: str) -> bool:
    first, second = encode_plain(tokenizer, clean), encode_plain(tokenizer, corrupted)
    return len(first) == len(second) and first != second


def _token_behind(tokenizer: Any, context: str, piece: str, rest: str) -> int | None:
    """The one token that `piece` is after `context`, even if `rest` follows it."""
    token = next_token(tokenizer, context, piece)
    ids = [*encode_plain(tokenizer, context), token]
    return token if encode_plain(tokenizer, context + piece + rest)[: len(ids)] == ids else None


def _piece_ids(tokenizer: Any, scheme: Scheme, century: str) -> list[int] | None:
    """The distinct ids of the century's pieces in order, or None if some piece has none."""
    ids = []
    for piece in scheme.pieces(century):
        token = _piece_id(tokenizer, scheme, century, piece)
        if token is None:
            return None
        ids.append(token)
    return ids if len(set(ids)) == len(ids) else None


def _piece_id(tokenizer: Any, scheme: Scheme, century: str, piece: str) -> int | None:
    # Some years are one token (GPT-2's " 1776"): take the digits' id from another century, or from the digits as text.
    for c in (century, *CENTURIES):
        context = STEM.format(noun=NOUNS[0], year=f"{century}01") + scheme.ending.format(c=c)
        token = next_token(tokenizer, context, piece)
        if token is not None:
            return token
    alone = encode_plain(tokenizer, piece)
    return alone[0] if tokenizer.convert_ids_to_tokens(alone) == [piece] else None
