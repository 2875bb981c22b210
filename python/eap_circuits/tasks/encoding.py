"""Text to token ids: the only place that calls a tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import expected


def check_tokenizer(tokenizer: Any) -> None:
    if not callable(tokenizer) or not hasattr(tokenizer, "bos_token_id"):
        raise expected("tokenizer", "a Hugging Face tokenizer", type(tokenizer).__name__)


def check_text(text: str, label: str) -> None:
    """Refuse text that no tokenizer takes: JSON can hold half of a character, a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise expected(label, "Unicode text", f"a lone surrogate in {text!a}") from error


def encode_prompts(tokenizer: Any, texts: Sequence[str], prepend_bos: bool) -> list[list[int]]:
    """The ids of each prompt with the tokenizer's own special tokens.

    BOS is prepended if the tokenizer has one and did not add it. An EOS that the tokenizer appends is dropped, because
    the scored position is the text's last token.
    """
    prompts = _encode(tokenizer, texts, special=True)
    bos, eos = tokenizer.bos_token_id, getattr(tokenizer, "eos_token_id", None)
    for text, ids in zip(texts, prompts, strict=True):
        if eos is not None and ids[-1:] == [eos] and encode_plain(tokenizer, text)[-1:] != [eos]:
            ids.pop()
        if prepend_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
    return prompts


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text without special tokens."""
    return encode_many(tokenizer, [text])[0]


def encode_many(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text without special tokens."""
    return _encode(tokenizer, texts, special=False)


def next_token(tokenizer: Any, context: str, text: str) -> int | None:
    """The one token that `text` adds after `context`; None if it adds more, changes the context or is unknown."""
    before, after = encode_plain(tokenizer, context), encode_plain(tokenizer, context + text)
    if len(after) != len(before) + 1 or after[:-1] != before or after[-1] == unknown_id(tokenizer):
        return None
    return after[-1]


def single_tokens(tokenizer: Any, context: str, words: Iterable[str]) -> dict[str, int]:
    """The ids of the words that are one token after `context` and a space; no id comes twice."""
    found: dict[int, str] = {}
    for word in words:
        token = next_token(tokenizer, context, f" {word}")
        if token is not None:
            found.setdefault(token, word)
    return {word: token for token, word in found.items()}


def equally_long(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, int]]:
    """Ordered pairs of indices of different texts with equally many tokens, none of them unknown."""
    unknown, by_length = unknown_id(tokenizer), dict[int, list[int]]()
    for index, ids in enumerate(encode_many(tokenizer, texts)):
        if unknown is None or unknown not in ids:
            by_length.setdefault(len(ids), []).append(index)
    return [pair for group in by_length.values() for pair in itertools.permutations(group, 2)]


def unknown_id(tokenizer: Any) -> int | None:
    """The id of the token for text outside the vocabulary, if there is one."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    return None if unknown is None else int(unknown)


def answer_id(tokenizer: Any, answer: str, prompt: str, label: str) -> int:
    """The id of an answer's text: one token by itself, or one token after the prompt.

    The second way is for tokenizers that add a space to every text (Llama 2's).

    Raises:
        InputError: the text is not one token, or is outside the vocabulary.
    """
    alone = encode_plain(tokenizer, answer)
    token = alone[0] if len(alone) == 1 else next_token(tokenizer, prompt, answer)
    if token is None:
        pieces = tokenizer.convert_ids_to_tokens(alone)
        raise expected(label, "an answer of one token", f"{answer!r}, which is {len(alone)} tokens {pieces}")
    if token == unknown_id(tokenizer) and answer.strip() != tokenizer.unk_token:
        raise expected(label, "an answer in the tokenizer's vocabulary", repr(answer))
    return token


def _encode(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=special, padding=False, truncation=False)
    return [list(map(int, ids)) for ids in encoded["input_ids"]]
