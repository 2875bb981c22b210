"""Prompt pairs: tokenisation, files, and every way in which they can be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eap_circuits import InputError, PairedDataset

WORDS = ["<unk>", "<s>", "</s>", "Mary", "John", "Tom", "gave", "a", "book", "to", "Kate", "and"]
ID = {word: i for i, word in enumerate(WORDS)}


def word_tokenizer(bos: bool = True, adds: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A token a word; `adds` are the special tokens that it puts around a text of its own."""
    backend = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds:
        template = [*(["<s>"] if "<s>" in adds else []), "$A", *(["</s>"] if "</s>" in adds else [])]
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(template), special_tokens=[(token, ID[token]) for token in adds]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>", unk_token="<unk>"
    )


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space before every text, and tokens keep the space before them, as Llama 2's does."""
    vocabulary = ["<unk>", "<s>", "▁", *(f"▁{word}" for word in WORDS[3:])]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


TOKENIZER = word_tokenizer()
RECORDS: list[dict[str, Any]] = [
    {
        "clean": "Mary and John gave a book to",
        "corrupted": "Mary and John gave a book to",
        "answers": [" John", 3],
    },
    {"clean": "Mary gave", "corrupted": "Kate gave", "answers": [ID["Tom"], "Mary"]},
]


def ids(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


# From records.


def test_records_become_right_padded_tensors() -> None:
    data = PairedDataset.from_records(RECORDS, TOKENIZER, name="toy")
    assert data.clean.tolist() == [
        ids("<s> Mary and John gave a book to"),
        [*ids("<s> Mary gave"), 0, 0, 0, 0, 0],
    ]
    assert data.corrupted[1].tolist() == [*ids("<s> Kate gave"), 0, 0, 0, 0, 0]
    assert data.lengths.tolist() == [8, 3]
    assert data.answers.tolist() == [[ID["John"], ID["Mary"]], [ID["Tom"], ID["Mary"]]]
    assert {t.dtype for t in (data.clean, data.corrupted, data.lengths, data.answers)} == {torch.int64}
    assert data.prompts == tuple((record["clean"], record["corrupted"]) for record in RECORDS)
    assert (data.name, data.metric, len(data), data.n_tokens) == ("toy", "logit_diff", 2, 11)
    assert data.first_difference.tolist() == [7, 1]
    assert data.first_difference.dtype == torch.int64


@pytest.mark.parametrize(
    ("tokenizer", "prepend_bos", "wanted"),
    [
        (word_tokenizer(), True, "<s> Mary gave"),
        (word_tokenizer(), False, "Mary gave"),
        (word_tokenizer(bos=False), True, "Mary gave"),
        (word_tokenizer(adds=("<s>",)), True, "<s> Mary gave"),
        (word_tokenizer(adds=("<s>",)), False, "Mary gave"),
        (word_tokenizer(adds=("<s>", "</s>")), True, "<s> Mary gave"),
        (word_tokenizer(adds=("</s>",)), False, "Mary gave"),
    ],
)
def test_bos_stands_in_front_once_and_the_text_ends_the_prompt(
    tokenizer: PreTrainedTokenizerFast, prepend_bos: bool, wanted: str
) -> None:
    data = PairedDataset.from_records(RECORDS[1:], tokenizer, prepend_bos)
    assert data.clean.tolist() == [ids(wanted)]


def test_special_tokens_written_in_the_text_stay_as_they_are() -> None:
    for adds in ((), ("</s>",), ("<s>", "</s>")):
        for begun in ("<s> ", ""):
            own = {"clean": f"{begun}Mary gave </s>", "corrupted": f"{begun}Kate gave </s>", "answers": [5, 6]}
            found = PairedDataset.from_records([own], word_tokenizer(adds=adds))
            assert found.clean.tolist() == [ids("<s> Mary gave </s>")]


def test_sets_of_answers_are_padded() -> None:
    records = [
        {**RECORDS[1], "answers": [["Mary", " John"], ID["Tom"]]},
        {**RECORDS[1], "answers": ["Kate", ("John", ID["John"], 5)]},  # a set holds an id once
    ]
    data = PairedDataset.from_records(records, TOKENIZER)
    assert data.answers.tolist() == [[[3, 4], [5, -1]], [[ID["Kate"], -1], [4, 5]]]


def test_a_space_that_the_tokenizer_puts_itself_is_not_a_second_one() -> None:
    tokenizer = spaced_tokenizer()
    alone = tokenizer("Mary", add_special_tokens=False)["input_ids"]
    assert len(tokenizer(" Mary", add_special_tokens=False)["input_ids"]) == 2
    record = {"clean": "John gave a book to", "corrupted": "Tom gave a book to", "answers": [" Mary", "John"]}
    data = PairedDataset.from_records([record], tokenizer)
    assert data.answers[0, 0].item() == alone[0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.tuples(*[st.sampled_from(WORDS[3:])] * 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_lengths_padding_and_first_difference(pairs: list[list[tuple[str, str]]]) -> None:
    records = [
        {"clean": " ".join(a for a, _ in pair), "corrupted": " ".join(b for _, b in pair), "answers": [3, 4]}
        for pair in pairs
    ]
    data = PairedDataset.from_records(records, TOKENIZER)
    for row, pair in enumerate(pairs):
        assert data.lengths[row] == len(pair) + 1
        assert data.clean[row, : len(pair) + 1].tolist() == [1, *(ID[a] for a, _ in pair)]
        assert not data.clean[row, len(pair) + 1 :].any()
        assert not data.corrupted[row, len(pair) + 1 :].any()
        differ = [i for i, (a, b) in enumerate(pair, 1) if a != b]
        assert data.first_difference[row] == (differ[0] if differ else len(pair))


WRONG_RECORDS = [
    ([], "^records: expected at least one prompt pair, found none"),
    (["Mary gave"], r"^records\[0\]: expected a mapping with clean, corrupted and answers, found str"),
    (
        [RECORDS[0], {"clean": "a", "answers": [1, 2]}],
        r"^records\[1\]: expected corrupted in every record or in none, found corrupted in some",
    ),
    (
        [{"clean": "a", "corupted": "b", "answers": [1, 2]}],
        r"^records\[0\]: expected the key 'corrupted', found only",
    ),
    ([{"clean": "a", "corrupted": "a"}], r"^records\[0\]: expected the key 'answers'"),
    ([{**RECORDS[0], "corrupted": ""}], r"^records\[0\], corrupted: expected a prompt, found an empty text"),
    ([{**RECORDS[0], "clean": 3}], r"^records\[0\], clean: expected a prompt, found int"),
    ([RECORDS[0], {**RECORDS[1], "corrupted": "Kate and John gave"}], r"^records\[1\]: .*, found 3 and 5"),
    ([{**RECORDS[1], "answers": "ab"}], r"answers: expected a list \[good, bad\], found 'ab'"),
    ([{**RECORDS[1], "answers": torch.tensor(3)}], r"answers: expected a list \[good, bad\], found tensor\(3\)"),
    ([{**RECORDS[1], "answers": ["\ud800", 3]}], "good answer: expected Unicode text, found a lone surrogate in "),
    ([{**RECORDS[1], "answers": [3]}], r"answers: expected a list \[good, bad\], found \[3\]"),
    (
        [{**RECORDS[1], "answers": ["", 3]}],
        r"good answer: expected an answer of at least one token, found ''",
    ),
    (
        [{**RECORDS[1], "answers": [" Zoe", 3]}],
        r"good answer: .* in the tokenizer's vocabulary, found ' Zoe'",
    ),
    ([{**RECORDS[1], "answers": [[], 3]}], "good answer: expected at least one token, found an empty list"),
    ([{**RECORDS[1], "answers": [3, -4]}], "bad answer: expected a token id of 0 or more, .*found -4"),
    ([{**RECORDS[1], "answers": [3, 10**20]}], r"bad answer: expected a token id .* below 2\*\*31, found"),
    ([{**RECORDS[1], "answers": [1.5, 3]}], "good answer: expected a token id, a text .*, found 1.5"),
    ([{**RECORDS[1], "answers": [True, 3]}], "good answer: expected a token id, a text .*, found True"),
    (
        [{**RECORDS[1], "answers": [["Mary", "Tom"], [ID["Mary"], 4]]}],
        r"answers: expected good and bad answers that differ, found \['Mary'\] in both",
    ),
]


@pytest.mark.parametrize(("records", "message"), WRONG_RECORDS)
def test_records_that_cannot_be(records: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        PairedDataset.from_records(records, TOKENIZER)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_text_of_no_tokens() -> None:
    record = {"clean": " ", "corrupted": " ", "answers": [3, 4]}
    with pytest.raises(InputError, match=r"expected at least one token in clean and in corrupted, found 0 and 0\."):
        PairedDataset.from_records([record], TOKENIZER, prepend_bos=False)


@pytest.mark.parametrize("tokenizer", [None, "gpt2", str.split])
def test_something_that_is_no_tokenizer(tokenizer: object) -> None:
    with pytest.raises(InputError, match=r"^tokenizer: expected a Hugging Face tokenizer, found"):
        PairedDataset.from_records(RECORDS, tokenizer)


# From tokens.

CLEAN = torch.tensor([[1, 2, 3, 4], [5, 6, -100, 9]])
CORRUPTED = torch.tensor([[1, 2, 8, 4], [5, 6, 9, -1]])
LENGTHS = torch.tensor([4, 2])
ANSWERS = torch.tensor([[3, 4], [0, 7]])


def test_pad_positions_are_zeroed_in_a_copy() -> None:
    tensors = [CLEAN.clone(), CORRUPTED.clone(), LENGTHS.clone(), ANSWERS.clone()]
    data = PairedDataset.from_tokens(tensors[0], tensors[1], tensors[2], tensors[3])
    assert data.clean.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert data.corrupted.tolist() == [[1, 2, 8, 4], [5, 6, 0, 0]]
    assert data.first_difference.tolist() == [2, 1]
    assert data.prompts is None
    for tensor, before in zip(tensors, (CLEAN, CORRUPTED, LENGTHS, ANSWERS), strict=True):
        assert torch.equal(tensor, before)
        tensor.zero_()
    assert data.answers.tolist() == ANSWERS.tolist()
    assert data.lengths.tolist() == LENGTHS.tolist()
    assert data.clean[0].tolist() == [1, 2, 3, 4]


def test_integers_of_any_kind_become_int64() -> None:
    data = PairedDataset.from_tokens(CLEAN.int(), CORRUPTED.tolist(), LENGTHS.numpy(), ANSWERS.to(torch.uint8))
    assert {t.dtype for t in (data.clean, data.corrupted, data.lengths, data.answers)} == {torch.int64}
    assert data.answers.tolist() == ANSWERS.tolist()


def test_answer_sets_as_tensors() -> None:
    sets = torch.tensor([[[3, 5], [4, -1]], [[0, -1], [7, 8]]])
    assert torch.equal(PairedDataset.from_tokens(CLEAN, CORRUPTED, LENGTHS, sets).answers, sets)


def sets_with(row: list[list[int]]) -> Tensor:
    return torch.tensor([[[3, 5], [4, -1]], row])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clean": CLEAN.float()}, "^clean: expected an integer dtype, found torch.float32"),
        ({"answers": torch.zeros(2, 2).bool()}, "^answers: expected an integer dtype, found torch.bool"),
        ({"lengths": LENGTHS.double()}, "^lengths: expected an integer dtype, found torch.float64"),
        ({"lengths": "four"}, "^lengths: expected a tensor of integers, found str"),
        ({"clean": [[1, 2], [3]]}, "^clean: expected a tensor of integers, found list"),
        ({"clean": CLEAN[0]}, r"^clean: expected shape \[examples, positions\], found \[4\]"),
        ({"clean": CLEAN[:0]}, "^dataset: expected at least one example, found none"),
        ({"corrupted": CORRUPTED[:, :3]}, r"^corrupted: expected shape \[2, 4\], .* found \[2, 3\]"),
        ({"lengths": LENGTHS[:1]}, r"^lengths: expected shape \[2\], .* found \[1\]"),
        ({"lengths": torch.tensor([4, 0])}, r"^lengths\[1\]: expected 1 to 4, .* found 0"),
        ({"lengths": torch.tensor([5, 2])}, r"^lengths\[0\]: expected 1 to 4, .* found 5"),
        ({"lengths": torch.tensor([4, 3])}, r"^clean\[1, 2\]: expected a token id of 0 or more, found -100"),
        ({"answers": ANSWERS[:1]}, r"^answers: expected shape \[2, 2\] .* found \[1, 2\]"),
        ({"answers": ANSWERS[:, 0]}, r"^answers: expected shape \[2, 2\] .* found \[2\]"),
        ({"answers": torch.zeros(2, 3).long()}, r"^answers: expected shape \[2, 2\] .* found \[2, 3\]"),
        (
            {"answers": torch.tensor([[3, 4], [0, -1]])},
            r"^answers\[1\]: expected token ids of 0 or more, found -1",
        ),
        ({"answers": sets_with([[0, -2], [7, 8]])}, r"^answers\[1\]: .* padded with -1, found -2"),
        (
            {"answers": sets_with([[0, 1], [-1, -1]])},
            r"^answers\[1\]: expected at least one bad id, found padding",
        ),
        (
            {"answers": sets_with([[-1, -1], [0, 1]])},
            r"^answers\[1\]: expected at least one good id, found padding",
        ),
        (
            {"answers": torch.tensor([[3, 4], [7, 7]])},
            r"^answers\[1\]: expected each id once, .* found id 7 twice",
        ),
        (
            {"answers": sets_with([[0, 1], [2, 1]])},
            r"^answers\[1\]: expected each id once, .* found id 1 twice",
        ),
        (
            {"answers": sets_with([[6, 6], [2, -1]])},
            r"^answers\[1\]: expected each id once, .* found id 6 twice",
        ),
        ({"prompts": (("a", "b"),)}, "^prompts: expected 2 pairs of texts, one per example, found 1"),
    ],
)
def test_tokens_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    fields = {"clean": CLEAN, "corrupted": CORRUPTED, "lengths": LENGTHS, "answers": ANSWERS, **wrong}
    with pytest.raises(InputError, match=rf"{message}.*\.$"):
        PairedDataset(**fields)


# Choosing examples.


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (1, [1]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -1), [3, 2, 1, 0]),
        ([2, 0, 2], [2, 0, 2]),
        ((0, 3), [0, 3]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        ([False, True, True, False], [1, 2]),
    ],
)
def test_examples_by_index(index: Any, rows: list[int]) -> None:
    clean = torch.arange(12).view(4, 3)
    texts = tuple((f"clean {i}", f"corrupted {i}") for i in range(4))
    lengths = torch.tensor([3, 3, 2, 1])
    data = PairedDataset(clean, clean + 1, lengths, clean[:, :2] + 5, texts, "toy", "prob_diff")
    chosen = data[index]
    assert chosen.lengths.tolist() == [lengths[row] for row in rows]
    for name in ("clean", "corrupted", "answers"):
        assert torch.equal(getattr(chosen, name), getattr(data, name)[rows])
    assert chosen.prompts == tuple(texts[row] for row in rows)
    assert (chosen.name, chosen.metric) == ("toy", "prob_diff")


def test_one_example_after_another() -> None:
    data = PairedDataset.from_tokens(CLEAN, CORRUPTED, LENGTHS, ANSWERS)
    assert [data[i].lengths.tolist() for i in range(len(data))] == [[4], [2]]
    with pytest.raises(IndexError):
        data[2]


@pytest.mark.parametrize("index", [[], slice(0, 0), torch.tensor([False, False])])
def test_no_examples_are_no_dataset(index: Any) -> None:
    with pytest.raises(InputError, match=r"^dataset: expected at least one example, found none"):
        PairedDataset.from_tokens(CLEAN, CORRUPTED, LENGTHS, ANSWERS)[index]
