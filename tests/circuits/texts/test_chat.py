"""Messages as prompts, and special tokens that a text has already."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eap_circuits import InputError, PairedDataset

WORDS = ["<unk>", "<s>", "</s>", "user", "assistant", "hello", "world", "Mary", "John", "well", "system"]
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% if not loop.last or m.role != 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tokenizer(bos: bool = True, adds: bool = True, template: str | None = TEMPLATE) -> Any:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = template
    return made


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def messages(content: str, *more: tuple[str, str]) -> list[dict[str, str]]:
    turns = [("user", content), *more]
    return [{"role": role, "content": text} for role, text in turns]


def record(clean: Any, corrupted: Any) -> dict[str, Any]:
    return {"clean": clean, "corrupted": corrupted, "answers": ["Mary", "John"]}


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_messages_are_the_templates_own_ids(prepend_bos: bool, adds: bool) -> None:
    made = tokenizer(adds=adds)
    chats = messages("hello world"), messages("hello Mary")
    data = PairedDataset.from_records([record(*chats)], made, prepend_bos)
    for found, chat in zip((data.clean, data.corrupted), chats, strict=True):
        wanted = made.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert found[0].tolist() == wanted
    assert data.clean[0].tolist() == ids("<s> user hello world </s> assistant")
    assert data.prompts is not None and data.prompts[0][0].endswith("</s> assistant ")
    # The same as text: the template's BOS is the only one.
    texts = PairedDataset.from_records([record(*data.prompts[0])], made, prepend_bos)
    assert texts.clean.tolist() == data.clean.tolist()


def test_a_template_without_bos_gets_none() -> None:
    made = tokenizer(template=TEMPLATE.replace("{{ bos_token }} ", ""))
    data = PairedDataset.from_records([record(messages("hello"), messages("world"))], made)
    assert data.clean[0].tolist() == ids("user hello </s> assistant")


def test_a_last_message_of_the_assistant_goes_on() -> None:
    chats = (messages(name, ("assistant", "well hello")) for name in ("Mary", "John"))
    data = PairedDataset.from_records([record(*chats)], tokenizer())
    assert data.clean[0].tolist() == ids("<s> user Mary </s> assistant well hello")


def test_messages_in_files_beside_texts(tmp_path: Path) -> None:
    row = record(messages("hello world"), "user hello Mary </s> assistant")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    data = PairedDataset.from_file(tmp_path / "a.jsonl", tokenizer())
    assert data.corrupted[0].tolist() == ids("<s> user hello Mary </s> assistant")


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_in_cells_of_a_table(write: Any, tmp_path: Path) -> None:
    cells = [write(messages(name)) for name in ("Mary", "John")]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows(
            [["clean", "corrupted", "good", "bad"], [*cells, "hello", "world"], ["[", "]", "hello", "world"]]
        )
    data = PairedDataset.from_file(tmp_path / "a.csv", tokenizer())
    alone = PairedDataset.from_records([record(messages("Mary"), messages("John"))], tokenizer())
    assert data.prompts == (*(alone.prompts or ()), ("[", "]"))


@pytest.mark.parametrize(
    ("prompt", "template", "message"),
    [
        (messages("hello"), None, "clean: expected a text, as the tokenizer has no chat template, found messages"),
        (messages("hello", ("tool", "world")), TEMPLATE, "clean: expected messages that fit the .*, found .*no tools"),
        (messages("hello"), "{{ messages[", "clean: expected messages that fit the chat template, found others"),
        (messages("hello"), " ", "expected at least one token"),
        ([], TEMPLATE, r"clean: expected messages, each with role and content, found \[\]"),
        ([{"role": "user"}], TEMPLATE, "clean: expected messages, each with role and content, found"),
        (["hello"], TEMPLATE, r"clean: expected messages, each with role and content, found \['hello'\]"),
        ({"role": "user", "content": "hello"}, TEMPLATE, "clean: expected a prompt, found dict"),
    ],
)
def test_messages_that_cannot_be(prompt: Any, template: str | None, message: str) -> None:
    with pytest.raises(InputError, match=rf"^records\[0\](, )?:? ?{message}") as caught:
        PairedDataset.from_records([record(prompt, "hello")], tokenizer(template=template), align=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_a_bos_that_the_text_holds_is_the_only_one(adds: bool, prepend_bos: bool) -> None:
    data = PairedDataset.from_records([record("<s> hello", "<s> world")], tokenizer(adds=adds), prepend_bos)
    assert data.clean[0].tolist() == [1, WORDS.index("hello")]
    twice = PairedDataset.from_records([record("<s> <s> hello", "<s> <s> world")], tokenizer(adds=adds), prepend_bos)
    assert twice.clean[0].tolist() == [1, 1, WORDS.index("hello")]


def test_a_tokenizer_without_bos() -> None:
    data = PairedDataset.from_records([record("hello", "world")], tokenizer(bos=False, adds=False))
    assert data.clean[0].tolist() == [WORDS.index("hello")]
