"""Gender bias (Vig et al. 2020, arXiv 2004.12265; as a circuit task Hanna et al. 2024, arXiv 2403.17806).

A sentence about somebody with a profession goes on with a pronoun. The good answer is the pronoun of the profession's
stereotype. In the corrupted prompt the person is a man if that is "she", and a woman if it is "he". The task asks what
a model does, not what is right.
"""

from __future__ import annotations

import random
from typing import Any

from ..errors import expected
from ..texts.encoding import equally_long, next_token
from .sampling import Spans, filled, sample_records

TEMPLATES = (
    "The {person} said that",
    "The {person} hoped that",
    "The {person} promised that",
    "The {person} was tired because",
    "The {person} went home early because",
    "The {person} laughed when",
    "This morning the {person} told me that",
    "We asked the {person} to wait until",
    "The {person} stayed calm even though",
    "The {person} could not sleep after",
)
SHE = (
    "nurse", "secretary", "maid", "nanny", "housekeeper", "babysitter", "receptionist", "dancer", "hairdresser",
    "librarian", "midwife", "typist", "florist", "seamstress", "ballerina", "cheerleader", "caretaker", "governess",
    "stylist", "teacher", "counselor", "model", "baker", "therapist",
)  # fmt: skip
HE = (
    "captain", "soldier", "carpenter", "mechanic", "plumber", "farmer", "engineer", "pilot", "sheriff", "butcher",
    "boss", "miner", "guard", "banker", "driver", "colonel", "sailor", "builder", "hunter", "architect", "general",
    "detective", "magician", "warrior", "electrician", "surgeon", "broker", "philosopher", "blacksmith", "janitor",
)  # fmt: skip
_LEAST = 4


def generate(tokenizer: Any, n: int, rng: random.Random) -> list[dict[str, Any]]:
    """n records; the answers are the two pronouns' ids. Raises `InputError` if too few professions fit."""
    she, he = (next_token(tokenizer, "The person said that", f" {word}") for word in ("she", "he"))
    if she is None or he is None or she == he:
        raise expected("tokenizer", "' she' and ' he' as one token each", "more or fewer")
    pairs: list[tuple[str, str, list[int], Spans]] = []
    fitting = set()
    for template in TEMPLATES:
        for people, other, answers in ((SHE, "man", [she, he]), (HE, "woman", [he, she])):
            prompts = [filled(template, person=person) for person in (other, *people)]
            texts = [text for text, _ in prompts]
            found = [clean for clean, corrupted in equally_long(tokenizer, texts) if corrupted == 0]
            pairs += [(texts[clean], texts[0], answers, prompts[clean][1]) for clean in found]
            fitting |= {people[clean - 1] for clean in found}
    if len(fitting) < _LEAST:
        raise expected(
            "tokenizer",
            f"at least {_LEAST} of the task's professions with as many tokens as 'man' or 'woman'",
            sorted(fitting) or "none",
        )
    return sample_records(pairs, n, rng)
