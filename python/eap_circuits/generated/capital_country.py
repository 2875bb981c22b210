"""Capital and country (a task of Hanna et al. 2024, arXiv 2403.17806): a capital is named, its country follows.

The corrupted prompt names another capital with as many tokens; its country is the bad answer.
"""

from __future__ import annotations

import random
from typing import Any

from ..errors import expected
from ..texts.encoding import equally_long, single_tokens
from .sampling import Spans, filled, sample_records

TEMPLATES = (
    "The city of {capital} is the capital of",
    "Last summer we went to {capital}, the capital of",
    "Her letters came from {capital}, the capital of",
    "Everybody knows that {capital} is the capital of",
    "The train stopped in {capital}, the capital of",
    "He was born in {capital}, the capital of",
    "The museum in {capital} is the largest in",
    "The embassy is in {capital}, the capital city of",
)
CAPITALS = {
    "Paris": "France", "Berlin": "Germany", "Rome": "Italy", "Madrid": "Spain", "Lisbon": "Portugal",
    "Vienna": "Austria", "Athens": "Greece", "Warsaw": "Poland", "Moscow": "Russia", "Tokyo": "Japan",
    "Beijing": "China", "Delhi": "India", "Cairo": "Egypt", "Ottawa": "Canada",
    "Canberra": "Australia", "Oslo": "Norway", "Stockholm": "Sweden", "Copenhagen": "Denmark",
    "Helsinki": "Finland", "Dublin": "Ireland", "Brussels": "Belgium",
    "Budapest": "Hungary", "Prague": "Czech", "Kiev": "Ukraine", "Ankara": "Turkey", "Tehran": "Iran",
    "Baghdad": "Iraq", "Damascus": "Syria", "Havana": "Cuba", "Lima": "Peru", "Santiago": "Chile",
    "Bogota": "Colombia", "Nairobi": "Kenya", "Bangkok": "Thailand", "Hanoi": "Vietnam", "Jakarta": "Indonesia",
    "Islamabad": "Pakistan", "Kathmandu": "Nepal", "Kabul": "Afghanistan", "London": "England", "Bern": "Switzerland",
    "Bucharest": "Romania", "Sofia": "Bulgaria", "Belgrade": "Serbia", "Zagreb": "Croatia", "Reykjavik": "Iceland",
    "Caracas": "Venezuela", "Quito": "Ecuador", "Beirut": "Lebanon", "Riyadh": "Saudi",
    "Brasilia": "Brazil", "Accra": "Ghana", "Addis Ababa": "Ethiopia", "Dakar": "Senegal",
}  # fmt: skip
_LEAST = 4


def generate(tokenizer: Any, n: int, rng: random.Random) -> list[dict[str, Any]]:
    """n records; the answers are the two countries' ids. Raises `InputError` if too few countries fit."""
    ids = single_tokens(tokenizer, TEMPLATES[0].format(capital="Paris"), CAPITALS.values())
    capitals = [capital for capital, country in CAPITALS.items() if country in ids]
    pairs: list[tuple[str, str, list[int], Spans]] = []
    for template in TEMPLATES:
        prompts = [filled(template, capital=capital) for capital in capitals]
        texts = [text for text, _ in prompts]
        for clean, corrupted in equally_long(tokenizer, texts):
            answers = [ids[CAPITALS[capitals[i]]] for i in (clean, corrupted)]
            pairs.append((texts[clean], texts[corrupted], answers, prompts[clean][1]))
    if len(ids) < _LEAST or not pairs:
        raise expected(
            "tokenizer",
            f"at least {_LEAST} of the task's countries as one token behind a space, capitals of equal lengths",
            list(ids) or "none",
        )
    return sample_records(pairs, n, rng)
