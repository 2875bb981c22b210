"""Texts of both sides of an encoder-decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import eap_circuits as eap
from eap_circuits.tasks import PairedDataset

WORDS = ["<pad>", "</s>", "<unk>", "<x>", "▁The", "▁capital", "▁of", "▁France", "▁Italy", "▁is", "▁Paris", "▁Rome"]


def tokenizer(words=WORDS):
    """As T5's: an end after each text, no beginning, and a place holder that the decoder repeats."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
    ends = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=[AddedToken("<x>", lstrip=True)], **ends
    )


RECORDS = [
    {
        "clean": f"The capital of {land} is <x>",
        "corrupted": f"The capital of {other} is <x>",
        "answers": [good, bad],
        "decoder": begun,
    }
    for land, other, good, bad, begun in (
        ("France", "Italy", "Paris", "Rome", "<x>"),
        ("Italy", "France", "Rome", "Paris", ""),
    )
]


def test_texts_of_both_sides(tmp_path):
    data = PairedDataset.from_records(RECORDS, tokenizer())
    assert data.clean.tolist() == [[4, 5, 6, 7, 9, 3, 1], [4, 5, 6, 8, 9, 3, 1]]  # with the end that encoders expect
    assert data.decoder.tolist() == [[3], [-1]]
    assert data.answers.tolist() == [[10, 11], [11, 10]]
    data.save(tmp_path / "data.safetensors")
    assert PairedDataset.from_file(tmp_path / "data.safetensors") == data
    assert data[[1]].decoder.tolist() == [[-1]]
    assert data.to_dict()["decoder"] == [[3], []]
    alike = replace(data[[0, 0]], decoder=data.decoder)  # except for what the decoder reads
    assert [each.summary().different for each in (alike, data[[0, 0]])] == [2, 1]
    (tmp_path / "data.csv").write_text(
        "clean,corrupted,decoder,good,bad\n"
        + "".join(f"{r['clean']},{r['corrupted']},{r['decoder']},{','.join(r['answers'])}\n" for r in RECORDS)
    )
    table = PairedDataset.from_file(tmp_path / "data.csv", tokenizer())
    assert torch.equal(table.decoder, data.decoder) and torch.equal(table.answers, data.answers)


class OfTwoLanguages(PreTrainedTokenizerFast):
    """As Marian's: what a decoder reads becomes other tokens."""

    def _switch_to_target_mode(self):
        self._tokenizer = tokenizer(WORDS[::-1])._tokenizer

    def _switch_to_input_mode(self):
        self._tokenizer = tokenizer()._tokenizer


def test_texts_of_a_decoder_that_has_other_tokens():
    own, plain = tokenizer(), PairedDataset.from_records(RECORDS, tokenizer())
    own.__class__ = OfTwoLanguages
    data = PairedDataset.from_records(RECORDS, own)
    assert torch.equal(data.clean, plain.clean) and torch.equal(data.corrupted, plain.corrupted)
    assert data.decoder.tolist() == [[8], [-1]]
    assert data.answers.tolist() == [[1, 0], [0, 1]]
    # One that wants to know which language it is, for special tokens alone.
    own.tgt_lang = None
    assert PairedDataset.from_records(RECORDS, own) == plain


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{**RECORDS[0], "decoder": 3}], r"records\[0\], decoder: expected a text"),
        ([RECORDS[0], {k: x for k, x in RECORDS[1].items() if k != "decoder"}], "decoder in every record or in none"),
    ],
)
def test_records_that_do_not_fit(given, said):
    with pytest.raises(eap.InputError, match=said):
        PairedDataset.from_records(given, tokenizer())


@pytest.mark.parametrize("decoder", [[3, 4], [[-2], [1]], [[-1, 3], [3, 3]]])
def test_decoder_tokens_that_do_not_fit(decoder):
    data = PairedDataset.from_records(RECORDS, tokenizer())
    with pytest.raises(eap.InputError, match=r"^decoder"):
        replace(data, decoder=torch.tensor(decoder))
