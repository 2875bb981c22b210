"""Tokenizers that cut names and years in different ways, and what holds for every generated task's pairs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eap_circuits import PairedDataset
from eap_circuits.generated import capital_country, gender_bias, hypernymy, subject_verb_agreement
from eap_circuits.tasks import TASKS

NAMES = ("Mary", "John", "Tom", "James", "Sarah", "Anna")
DIGITS = "0123456789"


def word_level(*words: str) -> PreTrainedTokenizerFast:
    """One token a word or number."""
    ids = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<s>", *words]))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def trained_bpe(*words: str, cut: str = r"\d") -> PreTrainedTokenizerFast:
    """A byte-level BPE in which each of `words` is one token behind a space; `cut` parts numbers first."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([f" {word}" for word in words] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>")


def two_digit_bpe(*whole_years: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE that cuts ' 1732' into ' 17' and '32' as GPT-2's does, but for `whole_years`."""
    merges = [(a, b) for a in DIGITS for b in DIGITS]
    merges += [("Ġ", a + b) for a, b in merges]
    merges += [(f"Ġ{year[:2]}", year[2:]) for year in whole_years]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    cut = "|".join([*(f" {year}" for year in whole_years), r" ?\d{2}"])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>")


def spaced_words(*words: str) -> PreTrainedTokenizerFast:
    """Puts a space before every text and cuts digits, as Llama 2's tokenizer does."""
    ids = {word: i for i, word in enumerate(["<unk>", "<s>", "▁", *DIGITS, *(f"▁{word}" for word in words)])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


WORDS = (
    "she", "he", "man", "woman", *gender_bias.SHE, *gender_bias.HE,
    *(form for pair in (*subject_verb_agreement.NOUNS, *subject_verb_agreement.VERBS) for form in pair),
    *capital_country.CAPITALS, *capital_country.CAPITALS.values(),
    *(word for kind in hypernymy.KINDS for side in kind for word in side),
)  # fmt: skip
GENERATED = [name for name in TASKS if name not in ("ioi", "greater-than")]  # these have tests of their own
NUMBERS = [f"{year}" for year in range(1000, 2000)]
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "words": cache(lambda: word_level(*NAMES, *NUMBERS)),
    "single digits": cache(lambda: trained_bpe(*NAMES, *WORDS)),
    "two digits": cache(lambda: two_digit_bpe("1776", "1492", "1301")),
    "three digits": cache(lambda: trained_bpe(*NUMBERS, cut=r"\d{1,3}")),
    "spaced": cache(lambda: spaced_words(*NAMES)),
    "bytes": cache(lambda: trained_bpe()),
}


def answer_texts(data: PairedDataset, tokenizer: PreTrainedTokenizerFast, row: int) -> list[set[str]]:
    sets = data.answers[row].reshape(2, -1).tolist()
    return [{str(tokenizer.convert_ids_to_tokens(i)).lstrip("Ġ▁") for i in ids if i >= 0} for ids in sets]


def check_texts_and_tokens(data: PairedDataset, tokenizer: PreTrainedTokenizerFast, n: int) -> None:
    assert data.prompts is not None
    assert len(data) == len(set(data.prompts)) == n
    for row, texts in enumerate(data.prompts):
        for text, ids in zip(texts, (data.clean[row], data.corrupted[row]), strict=True):
            wanted = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
            assert ids[: data.lengths[row]].tolist() == wanted
    assert (data.first_difference < data.lengths - 1).all()
