"""Gender bias, agreement, capitals and kinds of things, whose pairs differ in a word."""

from __future__ import annotations

import re

import pytest

from eap_circuits import InputError, PairedDataset, load_task
from eap_circuits.generated import capital_country, gender_bias, hypernymy, subject_verb_agreement
from eap_circuits.tasks import TASKS
from tests.circuits.generated.generated_tasks import (
    GENERATED,
    TOKENIZERS,
    WORDS,
    answer_texts,
    check_texts_and_tokens,
    trained_bpe,
    word_level,
)


def words_of(data: PairedDataset) -> list[tuple[list[str], list[str]]]:
    """(clean, corrupted) words that differ, of each pair."""
    found = []
    for clean, corrupted in data.prompts or ():
        first, second = (re.findall(r"[\w]+", text) for text in (clean, corrupted))
        while first[0] == second[0]:
            first, second = first[1:], second[1:]
        while first[-1] == second[-1]:
            first, second = first[:-1], second[:-1]
        found.append((first, second))
    return found


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pairs_differ_in_one_place_of_equal_length(name: str) -> None:
    tokenizer = TOKENIZERS["single digits"]()
    data = load_task(name, tokenizer, n=60)
    check_texts_and_tokens(data, tokenizer, 60)
    assert (data.name, data.metric) == (name, TASKS[name].metric)
    for row, (clean, corrupted) in enumerate(words_of(data)):
        ids, others = data.clean[row].tolist(), data.corrupted[row].tolist()
        differ = [i for i, (a, b) in enumerate(zip(ids, others)) if a != b]
        # One span of tokens, which is the word that differs.
        span = slice(differ[0], differ[-1] + 1)
        for text, tokens in ((clean, ids), (corrupted, others)):
            assert tokenizer.decode(tokens[span]).strip("Ġ ") in " ".join(text)


def test_gender_bias_answers() -> None:
    tokenizer = TOKENIZERS["single digits"]()
    data = load_task("gender-bias", tokenizer, n=100)
    for row, ((person,), (other,)) in enumerate(words_of(data)):
        she = person in gender_bias.SHE
        assert she != (person in gender_bias.HE)
        assert other == ("man" if she else "woman")
        assert answer_texts(data, tokenizer, row) == ([{"she"}, {"he"}] if she else [{"he"}, {"she"}])


def test_agreement_answers() -> None:
    tokenizer = TOKENIZERS["single digits"]()
    data = load_task("subject-verb-agreement", tokenizer, n=100)
    one, many = ({pair[i] for pair in subject_verb_agreement.VERBS} for i in (0, 1))
    seen = set()
    for row, ((noun,), (other,)) in enumerate(words_of(data)):
        plural = (other, noun) in subject_verb_agreement.NOUNS
        assert plural != ((noun, other) in subject_verb_agreement.NOUNS)
        assert answer_texts(data, tokenizer, row) == ([many, one] if plural else [one, many])
        seen.add(plural)
    assert seen == {True, False}


def test_a_verb_with_a_form_of_more_tokens_is_left_out() -> None:
    words = [word for word in WORDS if word not in ("are", "looks")]
    tokenizer = trained_bpe(*words)
    data = load_task("subject-verb-agreement", tokenizer, n=1)
    good, bad = answer_texts(data, tokenizer, 0)
    assert not {"is", "are", "look", "looks"} & (good | bad)
    assert {"was", "were"} <= good | bad


def test_capital_country_answers() -> None:
    tokenizer = TOKENIZERS["single digits"]()
    data = load_task("capital-country", tokenizer, n=100)
    for row, (clean, corrupted) in enumerate(words_of(data)):
        good, bad = (capital_country.CAPITALS[" ".join(words)] for words in (clean, corrupted))
        assert answer_texts(data, tokenizer, row) == [{good}, {bad}]


def test_hypernymy_answers() -> None:
    tokenizer = TOKENIZERS["single digits"]()
    data = load_task("hypernymy", tokenizer, n=100)
    for row, ((clean,), (corrupted,)) in enumerate(words_of(data)):
        good, bad = (
            {name for names, things in hypernymy.KINDS if word in things for name in names}
            for word in (clean, corrupted)
        )
        assert answer_texts(data, tokenizer, row) == [good, bad]
        assert not good & bad


def test_no_thing_is_of_two_kinds() -> None:
    things = [thing for _, members in hypernymy.KINDS for thing in members]
    names = [name for group, _ in hypernymy.KINDS for name in group]
    assert len(set(things)) == len(things)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", ["bytes", "two digits"])
@pytest.mark.parametrize("name", ["ioi", *GENERATED])
def test_a_tokenizer_of_bytes_is_refused_in_one_sentence(name: str, kind: str) -> None:
    with pytest.raises(InputError, match=r"^tokenizer: expected [^.]*\.$"):
        load_task(name, TOKENIZERS[kind]())


@pytest.mark.parametrize("name", GENERATED)
def test_words_that_do_not_fit_are_dropped(name: str) -> None:
    """Under a tokenizer that lacks every third word, every pair left is still whole."""
    tokenizer = trained_bpe(*(word for i, word in enumerate(WORDS) if i < 4 or i % 3))
    data = load_task(name, tokenizer, n=40)
    check_texts_and_tokens(data, tokenizer, 40)


def test_words_outside_the_vocabulary_are_dropped() -> None:
    words = {word for template in capital_country.TEMPLATES for word in re.findall(r"\w+", template)}
    capitals = ("Paris", "France", "Rome", "Italy", "Oslo", "Norway", "Lima", "Peru", "Spain")
    tokenizer = word_level(*words, *capitals, ",")  # no Madrid
    data = load_task("capital-country", tokenizer, n=96)
    assert len(set(data.prompts or ())) == 96  # 8 templates, 4 capitals by 3 others
    assert all(tokenizer.unk_token_id not in row[:n] for row, n in zip(data.clean, data.lengths))
    with pytest.raises(InputError, match=r"at least 4 of the task's countries .*, found \['France', 'Italy'\]"):
        load_task("capital-country", word_level(*words, "Paris", "France", "Rome", "Italy"))
