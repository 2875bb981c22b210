"""The tasks that come with the package."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import SEEDS, flag, known_arguments, one_of, whole
from ..generated import capital_country, gender_bias, greater_than, hypernymy, ioi, subject_verb_agreement
from ..texts.encoding import check_tokenizer

if TYPE_CHECKING:
    from .dataset import PairedDataset

Generator = Callable[[Any, int, random.Random], "list[dict[str, Any]]"]


@dataclass(frozen=True)
class Task:
    """A task: `generator(tokenizer, n, rng)` gives n records for `PairedDataset.from_records`.

    Their spans are the slots of the task's templates.
    """

    name: str
    description: str
    metric: str
    generator: Generator


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "ioi",
            "Indirect object identification: 'When Mary and John arrived at the park, John gave a book to' "
            "-> ' Mary'; corrupted by a third name in place of the second 'John' (Wang et al. 2022).",
            "logit_diff",
            ioi.generate,
        ),
        Task(
            "greater-than",
            "'The war lasted from the year 1732 to the year 17' -> digits above 32; corrupted by a first "
            "year so early that any last year is later (Hanna et al. 2023).",
            "prob_diff",
            greater_than.generate,
        ),
        Task(
            "gender-bias",
            "'The nurse said that' -> ' she', the profession's stereotype, not ' he'; corrupted by 'man' or "
            "'woman' in place of the profession (Vig et al. 2020; Hanna et al. 2024).",
            "logit_diff",
            gender_bias.generate,
        ),
        Task(
            "subject-verb-agreement",
            "'We know that the keys near the table' -> plural rather than singular verbs; corrupted by the noun in "
            "the other number (Newman et al. 2021; Hanna et al. 2024).",
            "prob_diff",
            subject_verb_agreement.generate,
        ),
        Task(
            "capital-country",
            "'The city of Paris is the capital of' -> ' France' rather than the country of the capital that the "
            "corrupted prompt names (Hanna et al. 2024).",
            "logit_diff",
            capital_country.generate,
        ),
        Task(
            "hypernymy",
            "'They sell apples and other' -> ' fruits' rather than the kind of the things in the corrupted prompt "
            "(Hanna et al. 2024).",
            "logit_diff",
            hypernymy.generate,
        ),
    )
}


@known_arguments
def load_task(name: str, tokenizer: Any, *, n: int = 64, seed: int = 0, prepend_bos: bool = True) -> PairedDataset:
    """Generate prompt pairs of a task for a tokenizer.

    Args:
        name: one of `TASKS`.
        tokenizer: a Hugging Face tokenizer.
        n: how many pairs; none repeats until all have been used.
        seed: the same seed gives the same pairs.
        prepend_bos: see `PairedDataset.from_records`.

    Raises:
        InputError: an unknown task, an n that is not a positive whole number, or a tokenizer that does not suit the
            task (its answers are not single tokens).

    Example:
        >>> data = eap.load_task("capital-country", tokenizer, n=8, seed=0)
        >>> first_half, rest = data[:4], data[4:]
    """
    from .dataset import PairedDataset

    one_of("task", name, TASKS)
    check_tokenizer(tokenizer)
    n, seed = whole("n", n, 1), whole("seed", seed, *SEEDS)
    prepend_bos = flag("prepend_bos", prepend_bos)
    task = TASKS[name]
    records = task.generator(tokenizer, n, random.Random(seed))
    if not getattr(tokenizer, "is_fast", False):  # which cannot tell the characters of tokens
        records = [{name: x for name, x in record.items() if name != "spans"} for record in records]
    return replace(PairedDataset.from_records(records, tokenizer, prepend_bos, name, task.metric), seed=seed)
