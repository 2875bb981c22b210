"""Hypernymy (a task of Hanna et al. 2024, arXiv 2403.17806): things are named, then the kind of thing that they are.

The corrupted prompt names things of another kind with as many tokens; the names of that kind are the bad answers.
"""

from __future__ import annotations

import random
from typing import Any

from ..errors import expected
from ..texts.encoding import equally_long, single_tokens
from .sampling import Spans, filled, sample_records

TEMPLATES = (
    "They sell {things} and other",
    "The book is about {things} and other",
    "She has always liked {things} and other",
    "We talked about {things} and many other",
    "There were pictures of {things} and other",
    "He knows everything about {things} and other",
)
# For each kind: its names, any of which is a right answer; and its members. No kind includes another: "animals" would
# also be right after "crows and other".
KINDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("fruits", "fruit"), ("apples", "pears", "oranges", "bananas", "grapes", "peaches", "plums", "cherries")),
    (("vegetables", "veggies"), ("carrots", "onions", "potatoes", "beans", "cabbages", "peas")),
    (("birds",), ("eagles", "crows", "owls", "sparrows", "hawks", "pigeons", "ducks", "swans", "robins")),
    (("insects", "bugs"), ("ants", "bees", "flies", "beetles", "wasps", "butterflies", "moths")),
    (("flowers",), ("roses", "tulips", "lilies", "daisies", "violets", "orchids")),
    (("tools",), ("hammers", "saws", "drills", "chisels", "pliers", "wrenches", "shovels")),
    (("instruments",), ("guitars", "pianos", "violins", "drums", "flutes", "trumpets", "harps")),
    (("furniture",), ("chairs", "tables", "sofas", "desks", "beds", "shelves", "couches")),
    (("vehicles",), ("cars", "trucks", "buses", "vans", "motorcycles", "tractors", "trains")),
    (("weapons",), ("guns", "swords", "rifles", "spears", "bombs", "daggers")),
    (("metals",), ("iron", "copper", "zinc", "silver", "nickel", "aluminum", "steel")),
    (("diseases", "illnesses"), ("cancer", "diabetes", "malaria", "cholera", "measles", "influenza", "tuberculosis")),
    (("languages",), ("French", "German", "Spanish", "Italian", "Russian", "Chinese", "Arabic")),
    (("sports", "games"), ("football", "tennis", "hockey", "baseball", "basketball", "soccer", "golf")),
    (("colors", "colours"), ("red", "blue", "green", "yellow", "purple", "orange", "pink")),
    (("drinks", "beverages"), ("coffee", "tea", "juice", "beer", "wine", "lemonade", "soda")),
    (("clothes", "clothing", "garments"), ("shirts", "jackets", "coats", "dresses", "trousers", "sweaters", "skirts")),
)  # fmt: skip


def generate(tokenizer: Any, n: int, rng: random.Random) -> list[dict[str, Any]]:
    """n records whose answers are sets of ids. Raises `InputError` if fewer than two kinds fit."""
    context = TEMPLATES[0].format(things="these")
    ids = single_tokens(tokenizer, context, (name for names, _ in KINDS for name in names))
    answers = [[ids[name] for name in names if name in ids] for names, _ in KINDS]
    things = [(thing, kind) for kind, (_, members) in enumerate(KINDS) if answers[kind] for thing in members]
    pairs: list[tuple[str, str, list[list[int]], Spans]] = []
    for template in TEMPLATES:
        prompts = [filled(template, things=thing) for thing, _ in things]
        texts = [text for text, _ in prompts]
        for clean, corrupted in equally_long(tokenizer, texts):
            good, bad = things[clean][1], things[corrupted][1]
            if good != bad:
                pairs.append((texts[clean], texts[corrupted], [answers[good], answers[bad]], prompts[clean][1]))
    if not pairs:
        raise expected(
            "tokenizer",
            "at least 2 of the task's kinds of things as one token behind a space, with members of equal lengths",
            list(ids) or "none",
        )
    return sample_records(pairs, n, rng)
