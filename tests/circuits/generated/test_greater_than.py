"""Greater-than, under tokenizers that cut years in different ways."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from eap_circuits import InputError, load_task
from tests.circuits.generated.generated_tasks import (
    DIGITS,
    NUMBERS,
    TOKENIZERS,
    answer_texts,
    check_texts_and_tokens,
    trained_bpe,
    word_level,
)


@pytest.mark.parametrize(
    ("kind", "width", "shape"),
    [
        ("two digits", 2, 99),
        ("words", 4, 99),
        ("single digits", 1, 8),
        ("spaced", 1, 8),
        ("three digits", 3, 8),
    ],
)
def test_greater_than_pairs(kind: str, width: int, shape: int) -> None:
    tokenizer = TOKENIZERS[kind]()
    n = 150
    data = load_task("greater-than", tokenizer, n=n)
    check_texts_and_tokens(data, tokenizer, n)
    assert (data.name, data.metric) == ("greater-than", "prob_diff")
    assert list(data.answers.shape[:2]) == [n, 2]
    assert data.answers.shape[2] <= shape
    for row, texts in enumerate(data.prompts or ()):
        (clean, ending), (early, same) = (
            re.fullmatch(r"The \w+ lasted from the year (\d{4}) to the year ?(\d*)", text).groups()  # type: ignore[union-attr]
            for text in texts
        )
        assert ending == same == ("" if width > 2 else clean[:2])
        good, bad = answer_texts(data, tokenizer, row)
        if width in (2, 4):
            assert early == f"{clean[:2]}01"
            start = clean[-width:]
            century = clean[:2] if width == 4 else ""
            every = {f"{century}{year:02}" for year in range(100)}
            assert good == {piece for piece in every if piece > start}
            assert bad == {piece for piece in every if piece <= start}
            assert good
        else:
            assert early == f"{clean[:2]}0{clean[3]}"
            century = clean[:2] if width == 3 else ""
            assert clean[2] not in "09"
            assert good == {century + digit for digit in DIGITS if digit > clean[2]}
            assert bad == {century + digit for digit in DIGITS if digit < clean[2]}


def test_years_of_one_token_are_not_asked_about_but_are_answers() -> None:
    tokenizer = TOKENIZERS["two digits"]()
    data = load_task("greater-than", tokenizer, n=3000)
    texts = " ".join(clean for clean, _ in data.prompts or ())
    assert "1776" not in texts
    assert "1492" not in texts
    assert "year 13" not in texts  # its corrupted year, 1301, is one token
    assert "1775" in texts
    row = next(i for i, (clean, _) in enumerate(data.prompts or ()) if " 1775 " in clean)
    assert "76" in answer_texts(data, tokenizer, row)[0]


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: word_level("The", "year", "lasted"),  # years are unknown
        lambda: trained_bpe(*NUMBERS, cut=r"(?<=1)\d{2}"),  # 1 73 2
        lambda: word_level(*(f"17{year:02}" for year in range(0, 100, 2))),  # some years are unknown
    ],
)
def test_greater_than_where_no_cut_gives_answers(tokenizer: Callable[[], PreTrainedTokenizerFast]) -> None:
    with pytest.raises(InputError, match=r"^tokenizer: expected years .*, found 'the year 1732' as \[.*\]\.$"):
        load_task("greater-than", tokenizer())
