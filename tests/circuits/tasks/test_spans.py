"""Named spans of prompts: by characters, by tokens, in files; and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eap_circuits import InputError, PairedDataset
from eap_circuits.edges import Spans
from eap_circuits.tasks.scoring.spans import spans_in
from tests.circuits.tasks.test_dataset import ID, spaced_tokenizer, word_tokenizer

TOKENIZER = word_tokenizer()
RECORD: dict[str, Any] = {
    "clean": "Mary and John gave a book to",
    "corrupted": "Mary and Tom gave a book to",
    "answers": [" Mary", " John"],
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, so that a character may have several, with spaces trimmed from what tokens are said to be of."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<s>", *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def spans_of(data: PairedDataset) -> list[list[str]]:
    assert data.spans is not None
    names = [*data.span_names, "-"]
    return [[names[i] for i in row[:n]] for row, n in zip(data.spans.tolist(), data.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, word_tokenizer(adds=("<s>", "</s>")), spaced_tokenizer()])
def test_characters_become_tokens(tokenizer: Any) -> None:
    """BOS is in no span; part of a word is the whole word; a span may have gaps, or be missing from a prompt."""
    first = {**RECORD, "spans": {"who": [9, 13], "what": [[19, 20], [23, 24]]}}
    second = {**RECORD, "clean": "Tom gave", "corrupted": "Kate gave", "spans": {"what": [], "who": [0, 1]}}
    data = PairedDataset.from_records([first, second], tokenizer)
    assert data.span_names == ("who", "what")
    assert spans_of(data) == [["-", "-", "-", "who", "-", "what", "what", "-"], ["-", "who", "-"]]


def test_a_character_of_several_tokens() -> None:
    record = {**RECORD, "clean": "Ça va à Łódź", "corrupted": "Ça va à Łódź", "answers": [[5], [6]]}
    data = PairedDataset.from_records([{**record, "spans": {"city": [8, 12], "va": [3, 5]}}], byte_tokenizer())
    # BOS, two bytes, a, space; v, a; space, two bytes, space; seven bytes.
    assert "".join(name[0] for name in spans_of(data)[0]) == "-" * 5 + "vv" + "-" * 4 + "c" * 7


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_token_whose_characters_a_span_has_is_in_it(draw: Any) -> None:
    """By brute force over characters."""
    words = draw.draw(st.lists(st.sampled_from(list(ID)[3:]), min_size=2, max_size=8))
    text = " ".join(words)
    start = draw.draw(st.integers(0, len(text) - 1))
    end = draw.draw(st.integers(start + 1, len(text)))
    record = {"clean": text, "corrupted": text, "answers": [3, 4], "spans": {"x": [start, end]}}
    owner = [i for i, word in enumerate(words) for _ in range(len(word) + 1)]
    inside = {owner[i] for i in range(start, end) if text[i] != " "}
    if inside:
        data = PairedDataset.from_records([record], TOKENIZER)
        assert spans_of(data)[0] == ["-", *("x" if i in inside else "-" for i in range(len(words)))]
    else:
        with pytest.raises(InputError, match="characters that belong to a token"):
            PairedDataset.from_records([record], TOKENIZER)


def test_tokens_are_named_by_their_positions() -> None:
    record = {**RECORD, "span_tokens": {"last": [-1], "who": [1, 3]}, "spans": {"what": [19, 25]}}
    data = PairedDataset.from_records([record], TOKENIZER)
    assert spans_of(data) == [["-", "who", "-", "who", "-", "what", "what", "last"]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"spans": [3, 5]}, "spans: expected a mapping of names"),
        ({"spans": {"x": 3}}, r"'x': expected \[start, end\]"),
        ({"spans": {"x": [5, 3]}}, r"'x': expected \[start, end\].*found \[5, 3\]"),
        ({"spans": {"x": [3, 3]}}, r"expected \[start, end\]"),
        ({"spans": {"x": [3, 5, 7]}}, r"expected \[start, end\]"),
        ({"spans": {"x": [3, 99]}}, "'x': expected .*28.*the characters of the prompt, found 99"),
        ({"spans": {"x": [-2, 3]}}, "'x': expected .*found -2"),
        ({"spans": {"x": [1.5, 3]}}, "'x': expected .*found 1.5"),
        ({"spans": {"x": [4, 5]}}, "characters that belong to a token, found ' '"),
        ({"spans": {"x": [0, 3], "y": [3, 4]}}, "'y': expected tokens that are in no other span.*'Mary', in 'x' too"),
        ({"spans": {"rest": [0, 3]}}, "other names than 'rest'"),
        ({"spans": {"": [0, 3]}}, "span_names: expected texts"),
        ({"spans": {"x": [0, 3]}, "span_tokens": {"x": [1]}}, "each span once"),
        ({"span_tokens": {"x": [8]}}, "'x': expected .*found 8"),
        ({"span_tokens": {"x": [1, -7]}}, "each position once"),
        ({"span_tokens": {"x": 1}}, "a list of token positions"),
    ],
)
def test_wrong_spans_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PairedDataset.from_records([{**RECORD, **more}], TOKENIZER)


def test_every_prompt_has_the_same_names() -> None:
    records = [{**RECORD, "spans": {"who": [0, 4]}}, {**RECORD, "spans": {"hwo": [0, 4]}}]
    with pytest.raises(InputError, match=r"records\[1\], spans: expected the spans of records\[0\], \['who'\]"):
        PairedDataset.from_records(records, TOKENIZER)
    with pytest.raises(InputError, match=r"records\[1\], spans: expected the spans of records\[0\]"):
        PairedDataset.from_records([records[0], RECORD], TOKENIZER)


def test_a_tokenizer_that_cannot_tell_and_messages_need_positions() -> None:
    class Slow:
        is_fast = False

        def __call__(self, *args: Any, **more: Any) -> Any:
            return TOKENIZER(*args, **more)

        def __getattr__(self, name: str) -> Any:
            return getattr(TOKENIZER, name)

    record = {**RECORD, "spans": {"x": [0, 3]}}
    with pytest.raises(InputError, match="span_tokens, as only fast tokenizers"):
        PairedDataset.from_records([record], Slow())
    assert PairedDataset.from_records([{**RECORD, "span_tokens": {"x": [1]}}], Slow()).span_names == ("x",)
    chatty = word_tokenizer()
    chatty.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = {side: [{"role": "user", "content": RECORD[side]}] for side in ("clean", "corrupted")}
    with pytest.raises(InputError, match="span_tokens, as the prompt is messages"):
        PairedDataset.from_records([{**record, **chat}], chatty)


def test_files_keep_spans(tmp_path: Path) -> None:
    spans = {"who": [9, 13], "what": [19, 25]}
    record = {**RECORD, "spans": spans, "span_tokens": {"last": [-1]}}
    data = PairedDataset.from_records([record, record], TOKENIZER, name="pairs")
    lines, table, saved = (tmp_path / f"pairs.{end}" for end in ("jsonl", "csv", "safetensors"))
    lines.write_text("\n".join([json.dumps(record)] * 2))
    spelled = json.dumps(spans), json.dumps(record["span_tokens"])
    cells = (RECORD["clean"], RECORD["corrupted"], "Mary", "John", *spelled)
    line = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
    table.write_text(f"clean,corrupted,good,bad,spans,span_tokens\n{line}\n{line}\n")
    data.save(saved)
    for path in (lines, table, saved):
        same = PairedDataset.from_file(path, TOKENIZER)
        assert same == data
        assert spans_of(same) == spans_of(data)
    assert spans_of(data[1:]) == spans_of(data)[1:]
    table.write_text('clean,corrupted,good,bad,spans\na,a,Mary,John,"{who: 3}"\n')
    with pytest.raises(InputError, match="row 2, spans: expected JSON"):
        PairedDataset.from_file(table, TOKENIZER)


def test_tokens_bring_numbers_of_spans() -> None:
    clean = torch.tensor([[5, 6, 7, 0], [5, 6, 7, 8]])
    answers, mask = torch.tensor([[3, 4], [3, 4]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    numbers = torch.tensor([[0, -1, 1, 1], [1, 0, -5, -1]])
    data = PairedDataset.from_tokens(clean, clean, None, answers, attention_mask=mask, spans=numbers)
    assert data.span_names == ("span0", "span1")
    assert spans_of(data) == [["span0", "-", "span1"], ["span1", "span0", "-", "-"]]
    for spans, names, message in (
        (numbers[:1], (), "spans: expected shape"),
        (numbers, ("a",), "span.*number below 1.*found 1"),
        (numbers, ("a", "a"), "each name once"),
        (None, ("a",), "span_names: expected none"),
    ):
        with pytest.raises(InputError, match=message):
            PairedDataset.from_tokens(clean, clean, None, answers, attention_mask=mask, spans=spans, span_names=names)


def test_which_spans_come_before_which_and_are_scored() -> None:
    record = {**RECORD, "span_tokens": {"early": [1], "late": [4]}}
    data = PairedDataset.from_records([record], TOKENIZER)
    yes, no = True, False
    names = ("early", "late", "rest")
    sees = ((yes, no, yes), (yes, yes, yes), (yes, yes, yes))
    assert spans_in(data) == Spans(names, sees, (no, no, yes))
    other = {**RECORD, "span_tokens": {"early": [7], "late": [4]}}
    both = spans_in(PairedDataset.from_records([record, other], TOKENIZER))
    assert (both.sees[0], both.scored) == ((yes, yes, yes), (yes, no, yes))
    # What comes after the last scored token does not run.
    cut = spans_in(PairedDataset.from_records([{**record, "scored": [1, 2]}], TOKENIZER))
    assert cut == Spans(names, ((yes, no, yes), (no, no, no), (yes, no, yes)), (yes, no, yes))
    # An answer's tokens are in no named span.
    several = {**record, "answers": [" Mary gave a", " John"], "span_tokens": {"last": [-1]}}
    found = spans_in(PairedDataset.from_records([several], TOKENIZER))
    assert found.scored == (yes, yes)


def test_aligned_prompts_keep_the_clean_ones_spans() -> None:
    record = {**RECORD, "corrupted": "Mary and Kate and Tom gave a book to", "span_tokens": {"who": [3], "last": [-1]}}
    data = PairedDataset.from_records([record], TOKENIZER, align=True)
    assert data.spans is not None
    assert data.spans.shape == data.clean.shape
    assert spans_of(data) == [["-", "-", "-", "who", "-", "-", "-", "last"]]
