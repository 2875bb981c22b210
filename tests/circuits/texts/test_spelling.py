"""Answers are the tokens that follow the prompt, with or without the space before them, or a word says why not."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eap_circuits import InputError, PairedDataset
from eap_circuits.errors import InputWarning
from eap_circuits.texts.encoding import continuation

WORDS = ("Mary", "John", "Tom", "gave", "it", "to", "Answer", "year", "the", "17", "人", "的")
CLEAN, CORRUPTED = "John gave it to", "Tom gave it to"


def tokenizer_of(space: str) -> PreTrainedTokenizerFast:
    """A BPE with a token of each word and one of it behind a space, and no others but letters."""
    letters = sorted({*"".join(WORDS), *"Zeld5Ċ\n.:=(", space})
    merges = [(word[:i], word[i]) for word in WORDS for i in range(1, len(word))]
    merges += [(space, word) for word in WORDS]
    tokens = dict.fromkeys(["<unk>", "<s>", *letters, *(a + b for a, b in merges)])
    model = models.BPE({token: i for i, token in enumerate(tokens)}, list(dict.fromkeys(merges)), unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), bos_token="<s>", unk_token="<unk>")


def byte_level() -> PreTrainedTokenizerFast:
    made = tokenizer_of("Ġ")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


def metaspace() -> PreTrainedTokenizerFast:
    """As of models with SentencePiece's tokens now."""
    made = tokenizer_of("▁")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return made


def legacy() -> PreTrainedTokenizerFast:
    """A space is put in front of every text, as in Llama 2."""
    made = tokenizer_of("▁")
    made.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


KINDS = {"byte-level": cache(byte_level), "metaspace": cache(metaspace), "legacy": cache(legacy)}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def dataset(tokenizer: Any, answers: list[Any], end: str = "") -> PairedDataset:
    record = {"clean": CLEAN + end, "corrupted": CORRUPTED + end, "answers": answers}
    return PairedDataset.from_records([record], tokenizer, align=True)


@pytest.mark.parametrize(
    ("prompt", "answer", "wanted"),
    [
        ("gave it to", "Mary", " Mary"),
        ("gave it to", " Mary", " Mary"),
        ("Answer:", "A", " A"),
        ("Q: who? A:", "Mary", " Mary"),
        ("hot:cold big:", "small", "small"),
        ("hot: cold big:", "small", " small"),
        ("a -> b, c ->", "d", " d"),
        ("a->b, c->", "d", "d"),
        ("3 + 4 =", "7", " 7"),
        ("3+4=7 2+5=", "7", "7"),
        ("the answer (", "A", "A"),
        ('she said "', "No", "No"),
        ("snake_", "case", "case"),
        ("well-", "known", "known"),
        ("he does", "n't", " n't"),
        ("he", "'s", "'s"),
        ("the end", ".", "."),
        ("the year 17", "32", "32"),
        ("costs 3.", "50", "50"),
        ("in 3 of", "4", " 4"),
        ("of\n", " A", "A"),
        ("of ", " ", " "),
        ("मैं घर जाता हूँ और मेरी", "माँ", " माँ"),
        ("日本の首都は", "東京", "東京"),
        ("", "Mary", "Mary"),
    ],
)
def test_the_space_before_an_answer(prompt: str, answer: str, wanted: str) -> None:
    assert continuation(prompt, answer) == wanted


def last(tokenizer: Any, text: str) -> int:
    return int(tokenizer(text, add_special_tokens=False)["input_ids"][-1])


@pytest.mark.parametrize(
    ("end", "space"),
    [("", " "), (" Answer:", " "), (".", " "), (" =", " "), ("\n", ""), (" Answer:\n", ""), (" (", "")],
)
def test_both_spellings_give_the_token_that_follows(tokenizer: Any, end: str, space: str) -> None:
    wanted = [last(tokenizer, CLEAN + end + space + word) for word in ("Mary", "John")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        assert dataset(tokenizer, ["Mary", "John"], end).answers.tolist() == [wanted]
        if end != " (":  # after which a space is the user's own wish
            assert dataset(tokenizer, [" Mary", " John"], end).answers.tolist() == [wanted]
            assert dataset(tokenizer, [["Mary"], " John"], end).answers.tolist() == [wanted]


def test_files_too(tokenizer: Any, tmp_path: Path) -> None:
    wanted = [[last(tokenizer, f"{CLEAN} {word}") for word in ("Mary", "John")]]
    table = f"clean,corrupted,answer,wrong_answer\n{CLEAN},{CORRUPTED},Mary,['John']\n"
    (tmp_path / "a.csv").write_text(table)
    record = {"clean": CLEAN, "corrupted": CORRUPTED, "answers": ["Mary", " John"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    for name in ("a.csv", "a.jsonl"):
        assert PairedDataset.from_file(tmp_path / name, tokenizer, align=True).answers.tolist() == wanted


def test_inside_a_number_and_by_id_an_answer_is_taken_as_it_is(tokenizer: Any) -> None:
    space = "Ġ" if "ĠMary" in tokenizer.vocab else "▁"
    two, own, bare = tokenizer.convert_tokens_to_ids(["17", f"{space}17", "Mary"])
    assert dataset(tokenizer, ["17", "Mary"], " the year 17").answers[0, 0] == two
    assert dataset(tokenizer, [" 17", "Mary"], " the year 17").answers[0, 0] == own
    assert dataset(tokenizer, ["17", "Mary"], " the year").answers[0, 0] == own
    assert dataset(tokenizer, [bare, "Mary"]).answers[0].tolist() == [bare, last(tokenizer, f"{CLEAN} Mary")]


@pytest.mark.parametrize("kind", ["metaspace", "legacy"])
def test_scripts_without_spaces_bring_none(kind: str) -> None:
    tokenizer = KINDS[kind]()
    record = {"clean": "的", "corrupted": "人", "answers": ["人", "的"]}
    answers = PairedDataset.from_records([record], tokenizer).answers[0].tolist()
    assert tokenizer.convert_ids_to_tokens(answers) == ["人", "的"]


@pytest.mark.parametrize("answers", [["Mary", "John"], [" Mary", " John"]])
def test_a_prompt_that_ends_in_a_space_is_told(tokenizer: Any, answers: list[str]) -> None:
    with pytest.warns(InputWarning, match=r"^records\[0\], good answer: .* gave it to Mary' .*: one of 2 answers that"):
        data = dataset(tokenizer, answers, " ")
    assert tokenizer.convert_ids_to_tokens(data.answers[0].tolist()) == ["Mary", "John"]


def test_what_takes_several_tokens_with_its_space_is_told_or_taken_whole() -> None:
    tokenizer = byte_level()
    with pytest.warns(InputWarning, match=r" gave it to 5' ends in the tokens \[.*'Ġ', '5'\], but '5' was taken: an "):
        data = dataset(tokenizer, ["5", "John"])
    assert data.answers[0, 0] == last(tokenizer, "5")
    whole = dataset(tokenizer, ["Zeld", "John"]).answers[0, 0, 0].tolist()
    assert tokenizer.convert_ids_to_tokens(whole) == ["Ġ", "Z", "e", "l", "d"]
    # A space at the prompt's end becomes part of the token that begins the answer.
    with pytest.raises(InputError, match=r"whose tokens come after .* found 'JohnZ'.*\['Ġto', 'ĠJohn', 'Z'\]"):
        dataset(tokenizer, ["JohnZ", "John"], " ")


def test_variants_are_the_same_words_with_or_without_their_space(tokenizer: Any) -> None:
    data = dataset(tokenizer, [["Mary", "John"], ["Tom", tokenizer.vocab["Z"], 10**6]])
    assert data.variants is not None
    for ids, twins in zip(data.answers.flatten().tolist(), data.variants.flatten().tolist(), strict=True):
        pieces = tokenizer.convert_ids_to_tokens([ids]) if 0 <= ids < 10**6 else [None]
        spaced = [piece for piece in (f"Ġ{pieces[0]}", f"▁{pieces[0]}", str(pieces[0])[1:]) if piece in tokenizer.vocab]
        if twins >= 0:
            assert tokenizer.convert_ids_to_tokens([twins])[0] in spaced
        else:
            assert not spaced or ids < 0


def test_an_answer_is_no_variant_of_another() -> None:
    tokenizer = KINDS["metaspace"]()
    bare, spaced = (tokenizer.convert_tokens_to_ids(piece) for piece in ("Mary", "▁Mary"))
    data = dataset(tokenizer, [bare, spaced])
    assert data.variants is not None and data.variants.tolist() == [[-1, -1]]


def test_variants_are_kept(tmp_path: Path) -> None:
    data = dataset(KINDS["metaspace"](), [["Mary", "John"], "Tom"])
    data.save(tmp_path / "a.safetensors")
    for same in (data[[0]], PairedDataset.from_file(tmp_path / "a.safetensors")):
        assert same.variants is not None and data.variants is not None
        assert same.variants.tolist() == data.variants.tolist()
    with pytest.raises(InputError, match=r"^variants: expected shape \[1, 2, 2\], .* found \[1, 2\]"):
        PairedDataset(data.clean, data.corrupted, data.lengths, data.answers, variants=data.answers[..., 0])
