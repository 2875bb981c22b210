"""Indirect object identification, under several tokenizers."""

from __future__ import annotations

import re

import pytest

from eap_circuits import InputError, load_task
from tests.circuits.generated.generated_tasks import (
    NAMES,
    TOKENIZERS,
    answer_texts,
    check_texts_and_tokens,
    two_digit_bpe,
    word_level,
)


@pytest.mark.parametrize("kind", ["words", "single digits", "spaced"])
def test_ioi_pairs(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    data = load_task("ioi", tokenizer, n=40)
    check_texts_and_tokens(data, tokenizer, 40)
    assert (data.name, data.metric, list(data.answers.shape)) == ("ioi", "logit_diff", [40, 2])
    orders = set()
    for row, (clean, corrupted) in enumerate(data.prompts or ()):
        names = [word for word in re.findall(r"\w+", clean) if word in NAMES]
        others = [word for word in re.findall(r"\w+", corrupted) if word in NAMES]
        first, second, subject = names
        recipient = second if subject == first else first
        assert {first, second} == {subject, recipient}
        assert others[:2] == names[:2]
        assert others[2] not in names
        assert re.sub(others[2], subject, corrupted) == clean
        assert all(f" {name}" in clean for name in names)
        ids = data.clean[row].tolist()
        good, bad = data.answers[row].tolist()
        assert answer_texts(data, tokenizer, row) == [{recipient}, {subject}]
        # The answer is the very token by which the prompt names the person.
        assert (ids.count(good), ids.count(bad)) == (1, 2)
        orders.add(recipient == first)
    assert orders == {True, False}


def test_ioi_uses_only_names_of_one_token() -> None:
    tokenizer = word_level("Mary", "Tom", "Anna", "When", "and", "arrived", "gave", "to")
    data = load_task("ioi", tokenizer, n=200)
    assert {i for pair in data.answers.tolist() for i in pair} == {
        tokenizer.convert_tokens_to_ids(name) for name in ("Mary", "Tom", "Anna")
    }


def test_ioi_with_too_few_names() -> None:
    with pytest.raises(InputError, match=r"at least 3 of the task's names .*, found \['Mary', 'John'\]\.$"):
        load_task("ioi", word_level("Mary", "John"))
    with pytest.raises(InputError, match=r"at least 3 of the task's names .*, found none\.$"):
        load_task("ioi", two_digit_bpe())
