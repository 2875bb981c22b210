"""Prompts with a mask token are scored in its place, whatever the tokenizer makes of spaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eap_circuits import InputError, PairedDataset

WORDS = ("The", "capital", "of", "France", "Italy", "is", "Paris", "Rome", "not", "New", "York", ".")


def tokenizer_of(kind: str) -> Any:
    """As BERT's, without spaces in tokens; or as RoBERTa's, whose mask takes the space before it."""
    spelled = WORDS if kind == "bert" else ("The", *(f"▁{word}" for word in WORDS[:-1]), ".")
    tokens = ["[UNK]", "[CLS]", "[SEP]", *spelled, "[MASK]"]
    model = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    backend = Tokenizer(model)
    if kind == "bert":
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        space, points = pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()
        backend.pre_tokenizer = pre_tokenizers.Sequence([points, space])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    mask = AddedToken("[MASK]", lstrip=kind != "bert", special=True)
    ends = {"cls_token": "[CLS]"} if kind == "bert" else {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", mask_token=mask, **ends)


@pytest.fixture(params=["bert", "roberta"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of(request.param)


def record(clean: str, corrupted: str | None = None, *answers: Any) -> dict[str, Any]:
    return {"clean": clean, "corrupted": corrupted, "answers": list(answers) or None}


FRANCE, ITALY = "The capital of France is [MASK].", "The capital of Italy is [MASK]."
TWICE, WITHOUT = "The [MASK] of France is [MASK].", "The capital of France is Paris."


@pytest.mark.parametrize("spelled", ["Paris", " Paris"])
def test_the_mask_is_scored_and_answers_stand_in_its_place(tokenizer: Any, spelled: str) -> None:
    data = PairedDataset.from_records([record(FRANCE, ITALY, spelled, ["Rome", " New"])], tokenizer)
    ids = tokenizer(FRANCE)["input_ids"]
    assert data.clean[0].tolist() == ids and ids[-1] == 2  # with what the tokenizer puts at the end
    assert data.scored is not None and data.scored.tolist() == [[ids.index(tokenizer.mask_token_id)]]
    there = [
        tokenizer(FRANCE.replace("[MASK]", word))["input_ids"][ids.index(tokenizer.mask_token_id)] for word in WORDS
    ]
    found = [[[token for token in side if token >= 0] for side in pair] for pair in data.answers.tolist()]
    assert found == [[[there[WORDS.index("Paris")]], [there[WORDS.index("Rome")], there[WORDS.index("New")]]]]
    alone = PairedDataset.from_records([record(FRANCE, ITALY, "Paris", "Rome")], tokenizer)
    assert alone.targets is not None and torch.equal(alone.targets, alone.answers[:, :1])


def test_answers_may_be_left_out_and_prompts_may_have_several_masks(tokenizer: Any) -> None:
    pairs = [record(TWICE, TWICE.replace("France", "Italy")), record(FRANCE, ITALY)]
    data = PairedDataset.from_records(pairs, tokenizer)
    assert data.scored is not None and data.targets is not None
    for row, ids in zip(data.scored, data.clean, strict=True):
        places = (ids == tokenizer.mask_token_id).nonzero()[:, 0].tolist()
        assert [place for place in row.tolist() if place >= 0] == places
    assert (data.targets == -1).all()


def test_given_positions_count(tokenizer: Any) -> None:
    data = PairedDataset.from_records([{**record(FRANCE, ITALY, "Paris", "Rome"), "scored": [2]}], tokenizer)
    assert data.scored is not None and data.scored.tolist() == [[2]]


def test_prompts_of_unequal_lengths_are_scored_at_both_masks(tokenizer: Any) -> None:
    longer = "The capital of New York is [MASK]."
    data = PairedDataset.from_records([record(FRANCE, longer, "Paris", "Rome")], tokenizer, align=True)
    assert data.scored is not None and data.alignment is not None
    place = int(data.scored[0, 0])
    assert data.corrupted[0, data.alignment[0, place]] == data.clean[0, place] == tokenizer.mask_token_id


@pytest.mark.parametrize(
    ("given", "align", "said"),
    [
        (record(TWICE, TWICE, "Paris", "Rome"), False, "expected one [MASK] in clean"),
        (record(WITHOUT, WITHOUT, "Paris", "Rome"), False, "in clean, as in other records, found none"),
        (
            record(FRANCE, "The capital of Italy [MASK] Rome.", "Paris", "Rome"),
            False,
            "corrupted: expected [MASK] where clean",
        ),
        (
            record(FRANCE, "The capital of Italy is Rome.", "Paris", "Rome"),
            False,
            "corrupted: expected [MASK] where clean",
        ),
        (
            record(FRANCE, "The [MASK] of New York is Rome.", "Paris", "Rome"),
            True,
            "corrupted: expected [MASK] where clean",
        ),
        (
            record(FRANCE, ITALY, "New York", "Rome"),
            False,
            "good answer: expected one token of the vocabulary in the place of",
        ),
        (
            record(FRANCE, ITALY, "Paris", "Lisbon"),
            False,
            "bad answer: expected one token of the vocabulary in the place of",
        ),
    ],
)
def test_what_cannot_be_scored_is_named(given: dict[str, Any], align: bool, said: str, tokenizer: Any) -> None:
    with pytest.raises(InputError) as error:
        PairedDataset.from_records([record(FRANCE, ITALY, "Paris", "Rome"), given], tokenizer, align=align)
    assert "records[1]" in str(error.value) and said in str(error.value), error.value
