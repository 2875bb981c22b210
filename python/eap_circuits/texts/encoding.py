"""Text to token ids: the only place that calls a tokenizer."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import expected, reason

# Marks that a space follows; a number that may go on; scripts without spaces between words (Thai to Khmer, kana, Han);
# how byte-level BPE and SentencePiece write a token's leading space.
_CLOSING = re.compile(r"([.,:;!?)\]}=%…”»]|[-=]>)\Z")
_NUMBER = re.compile(r"\d[.,:]?\Z")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_PUNCTUATION = "".join(c for c in map(chr, range(0x3000)) if unicodedata.category(c)[0] in "PS")
_SPACES = ("Ġ", "▁")


def check_tokenizer(tokenizer: Any) -> None:
    if not callable(tokenizer) or not hasattr(tokenizer, "bos_token_id"):
        raise expected("tokenizer", "a Hugging Face tokenizer", type(tokenizer).__name__)


class _Target:
    """A tokenizer that takes texts for a target's; all else is its own."""

    def __init__(self, tokenizer: Any) -> None:
        self._own = tokenizer

    def __call__(self, texts: Sequence[str], **given: Any) -> Any:
        return self._own(text_target=texts, **given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def of_decoder(tokenizer: Any) -> Any:
    """The tokenizer as it reads a decoder's texts, for which some have other pieces (Marian's).

    Those that know a target's language (`tgt_lang`) change only special tokens, and fail where it is not set.
    """
    changes = hasattr(tokenizer, "_switch_to_target_mode") and not hasattr(tokenizer, "tgt_lang")
    return _Target(tokenizer) if changes else tokenizer


def check_text(text: str, label: str) -> None:
    """Refuse text that no tokenizer takes: JSON can hold half of a character, a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise expected(label, "Unicode text", f"a lone surrogate in {text!a}") from error


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]], label: str) -> str:
    """What the tokenizer's chat template makes of messages, up to where the model answers.

    A last message of the assistant is the beginning of its answer.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise expected(label, "a text, as the tokenizer has no chat template", "messages")
    begun = messages[-1]["role"] == "assistant"
    try:
        # Templates are programs, which raise what they like.
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
    except Exception as error:
        raise expected(label, "messages that fit the chat template", f"others ({reason(error)})") from error
    return str(text)


def encode_prompts(
    tokenizer: Any, texts: Sequence[str], special: Sequence[bool], encoder: bool = False
) -> list[list[int]]:
    """The ids of each prompt; where `special`, with the tokenizer's own special tokens and BOS in front.

    A BOS that the text begins with is the only one. An EOS that the tokenizer appends is dropped, because the scored
    position is the text's last token; but not if there is a mask token, as encoders expect it. The prompts of an
    encoder-decoder's encoder have the tokenizer's own special tokens and no others.
    """
    if encoder:
        with_theirs = _encode(tokenizer, texts, special=True)
        every = zip(encode_many(tokenizer, texts), with_theirs, special, strict=True)
        return [whole if wanted else alone for alone, whole, wanted in every]
    plain = encode_many(tokenizer, texts)
    bos, eos = tokenizer.bos_token_id, getattr(tokenizer, "eos_token_id", None)
    prompts = []
    for own, ids, wanted in zip(plain, _encode(tokenizer, texts, special=True), special, strict=True):
        if not wanted or (bos is not None and own[:1] == [bos]):
            ids = own
        elif bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        if mask_id(tokenizer) is None and eos is not None and _at_end(ids, eos) > _at_end(own, eos):
            ids.pop()
        prompts.append(ids)
    return prompts


def _at_end(ids: Sequence[int], token: int) -> int:
    """How often a token stands at the end."""
    return next((n for n, found in enumerate(reversed(ids)) if found != token), len(ids))


def character_ranges(tokenizer: Any, text: str, ids: list[int], label: str) -> list[tuple[int, int]]:
    """Which characters of a text each of the prompt's tokens is made of; (0, 0) of special tokens.

    Raises:
        InputError: the tokenizer cannot tell.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise expected(
            label, "span_tokens, as only fast tokenizers tell characters of tokens", type(tokenizer).__name__
        )
    for special in (False, True):
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        own, ranges = list(encoded["input_ids"]), [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
        for first in range(len(ids) - len(own) + 1):
            if ids[first : first + len(own)] == own:
                rest = len(ids) - first - len(own)
                return [*[(0, 0)] * first, *ranges, *[(0, 0)] * rest]
    raise expected(
        label, "span_tokens, as the tokenizer does not tell which characters a token is made of", "characters"
    )


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


def mask_id(tokenizer: Any) -> int | None:
    """The id of the token that stands for one to be predicted, if there is one."""
    mask = getattr(tokenizer, "mask_token_id", None)
    return None if mask is None else int(mask)


def answer_in_place(tokenizer: Any, answer: str, prompt: str, label: str) -> int:
    """The id of the one token that an answer's text is in the place of the prompt's only mask token.

    Raises:
        InputError: it is several tokens, outside the vocabulary, or changes its neighbours' tokens.
    """
    before, mask, after = prompt.partition(tokenizer.mask_token)
    # After white space, which may be part of the mask token, the answer brings none.
    text = (answer.removeprefix(" ") or answer) if before[-1:].isspace() else answer
    masked, filled = encode_many(tokenizer, [prompt, before + text + after])
    place = masked.index(tokenizer.mask_token_id)
    token = filled[place] if len(filled) == len(masked) else None
    if (
        token in (None, unknown_id(tokenizer))
        or [*filled[:place], *masked[place : place + 1], *filled[place + 1 :]] != masked
    ):
        pieces = tokenizer.convert_ids_to_tokens(filled[place : place + 1 + max(0, len(filled) - len(masked))])
        raise expected(label, f"one token of the vocabulary in the place of {mask}", f"{answer!r}, there {pieces}")
    return token


def continuation(prompt: str, answer: str) -> str:
    """An answer's text as it continues the prompt: with or without a leading space.

    A prompt that ends in white space needs no other. After a word a word brings its own space, but not inside a number
    or in a script without spaces; after a mark, where the prompt itself goes on with a space after that mark, or, if it
    has no other, where text usually does. All else is left as it is.
    """
    bare = answer.removeprefix(" ")
    if prompt[-1:].isspace():
        return bare or answer
    if not _in_word(answer[:1]) or _UNSPACED.search(prompt[-1:] + answer[:1]):
        return answer
    if answer[:1].isdigit() and _NUMBER.search(prompt):
        return answer
    mark = prompt[len(prompt.rstrip(_PUNCTUATION)) :]
    shown = re.findall(re.escape(mark) + r"( ?)[^\W_]", prompt) if mark else []
    if shown:
        return f"{shown[-1]}{answer}"
    return f" {answer}" if (_CLOSING.search(prompt) if mark else _in_word(prompt[-1:])) else answer


def _in_word(character: str) -> bool:
    """A letter, a digit, or a mark that belongs to a letter (Hindi's vowels)."""
    return character != "" and unicodedata.category(character)[0] in "LNM"


def answer_ids(tokenizer: Any, answer: str, prompt: str, label: str) -> tuple[list[int], str | None]:
    """The ids of an answer's text, and what is odd about them.

    These are the tokens which the text adds to the prompt, with or without a leading space (`continuation`). Failing
    that, it is the token of the text by itself, and odd.

    Raises:
        InputError: the text's tokens are not apart from the prompt's, or it is empty or outside the vocabulary.
    """
    text = continuation(prompt, answer)
    token = next_token(tokenizer, prompt, text)
    if token is not None:
        return [token], None
    for spelling in (text, answer):
        alone = _alone(tokenizer, spelling)
        unknown = alone == [unknown_id(tokenizer)] and answer.strip() != tokenizer.unk_token
        if len(alone) == 1 and not unknown:
            *_, taken = tokenizer.convert_ids_to_tokens(alone)
            pieces = tokenizer.convert_ids_to_tokens(encode_plain(tokenizer, prompt + text))[-3:]
            return alone, f"{label}: {(prompt + text)[-20:]!r} ends in the tokens {pieces}, but {taken!r} was taken"
    if unknown:
        raise expected(label, "an answer in the tokenizer's vocabulary", repr(answer))
    before, after = encode_many(tokenizer, [prompt, prompt + text])
    own = after[len(before) :]
    if own and after[: len(before)] == before and unknown_id(tokenizer) not in own:
        return own, None
    if not alone:
        raise expected(label, "an answer of at least one token", repr(answer))
    pieces = tokenizer.convert_ids_to_tokens(after)[max(0, len(before) - 2) :]
    wanted = "an answer in the vocabulary whose tokens come after the prompt's"
    raise expected(label, wanted, f"{answer!r}, with which the prompt ends in the tokens {pieces}")


def _alone(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text on a line of its own: to a text by itself some tokenizers add a space (Llama 2's)."""
    before, after = encode_many(tokenizer, ["\n", "\n" + text])
    return after[len(before) :] if after[: len(before)] == before else encode_plain(tokenizer, text)


def respelled(tokenizer: Any, token: int) -> int:
    """The token's twin with, or without, a leading space; -1 if there is none."""
    try:
        piece = tokenizer.convert_ids_to_tokens(token)
        for space in _SPACES if isinstance(piece, str) else ():
            twin = piece.removeprefix(space) if piece.startswith(space) else space + piece
            found = tokenizer.convert_tokens_to_ids(twin) if twin else None
            if found is not None and tokenizer.convert_ids_to_tokens(found) == twin:
                return int(found)
    except (IndexError, OverflowError):  # an id that the tokenizer does not have
        pass
    return -1


def _encode(tokenizer: Any, texts: Sequence[str], special: bool) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=special, padding=False, truncation=False)
    return [list(map(int, ids)) for ids in encoded["input_ids"]]
