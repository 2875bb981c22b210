"""Pairs of prompts with pictures, from a file that names the pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import bind
from ..display import library
from ..errors import expected, flag, known_arguments, reason
from ..files import suffix_of
from ..forward import one_want_of_memory
from ..modules.loans import gives_back
from ..ranks import together
from ..tasks import TEXTS, PairedDataset, naming, own_records, read_file
from ..texts.records import IMAGES, check_equal_lengths, prompt_text, tokenised
from .pictures import paired

_SIDES = ("clean", "corrupted")
_REFUSED = ("scored", "spans", "decoder")  # of what becomes of a record


@together
@gives_back
@one_want_of_memory
@known_arguments
def image_pairs_from_file(
    model: nn.Module, path: str | os.PathLike[str], processor: Any, *, align: bool = False
) -> PairedDataset:
    """Prompt pairs with pictures from a `.jsonl`, `.json`, `.csv` or `.parquet` file; see `image_pairs`.

    Args:
        model: see `image_pairs`.
        path: records as `PairedDataset.from_file` takes them, with `clean_image` and `corrupted_image`: the name of a
            picture's file, or a list of them, from the folder of the records' file on. Prompts are as the processor
            takes them, a text with the mark of a picture in it or messages. Without `corrupted` or without
            `corrupted_image` that of the clean prompt stands there.
        processor: the model's, as `AutoProcessor` loads it. Special tokens are those that it adds.
        align: also take pairs with different numbers of tokens, as pictures of different sizes may have; see
            `PairedDataset.from_records`.

    Raises:
        InputError: names the file and the record whose picture is missing or is none, or whose prompt does not fit the
            processor; or as `image_pairs`.

    Example:
        >>> pairs = eap.image_pairs_from_file(vision_model, "pairs.jsonl", processor)
        >>> scores = eap.attribute(vision_model, pairs, method="eap")
    """
    align = flag("align", align)
    if not callable(processor) or not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise expected("processor", "the model's, which takes texts and pictures", type(processor).__name__)
    arch = bind(model)
    suffix_of(path, TEXTS)
    file = read_file(path)
    with naming(file):
        records, labels = own_records(file.rows, file.labels)
        shown = [_pictures(record, label, file.path.parent) for record, label in zip(records, labels, strict=True)]
        texts = [_texts(record, label, processor) for record, label in zip(records, labels, strict=True)]
        fields = tokenised(texts, labels, processor.tokenizer, True, True)
        for name in (name for name in _REFUSED if fields.get(name) is not None):
            raise expected(labels[0], "prompts with pictures that one answer follows", name)

        def each() -> Iterator[tuple[str, Any, Any]]:
            for prompts, pictures, label in zip(fields["prompts"], shown, labels, strict=True):
                sides = [
                    _processed(processor, text, names, f"{label}, {side}")
                    for side, text, names in zip(_SIDES, prompts, pictures, strict=True)
                ]
                first, second = (inputs["input_ids"].shape[1] for inputs in sides)
                check_equal_lengths(label, first, second, align)
                yield f"{label}, ", sides[0], sides[1]

        kept = {name: fields[name] for name in ("answers", "weights")}
        data = paired(arch, each(), **kept, name=file.path.stem)
        return replace(data, prompts=fields["prompts"], variants=fields["variants"])


def _pictures(record: Any, label: str, folder: Path) -> list[list[Path]]:
    """The files of the clean and of the corrupted prompt's pictures, each of which is one."""
    given = record if isinstance(record, Mapping) else {}
    found = []
    for name in IMAGES:
        names = given.get(name) if given.get(name) is not None else given.get(IMAGES[0])
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, Sequence) or not names or not all(isinstance(each, str) and each for each in names):
            raise expected(f"{label}, {name}", "the name of a picture's file, or a list of them", repr(names))
        found.append([folder / each for each in names])
        for each in found[-1]:
            _open(each, f"{label}, {name}").close()
    return found


def _open(path: Path, label: str, whole: bool = False) -> Any:
    """A picture; if not `whole`, only its beginning has been read."""
    images = library("PIL.Image", "pictures", "pillow")
    try:
        picture = images.open(path)
        return picture.convert("RGB") if whole else picture
    except FileNotFoundError as error:
        raise expected(label, "a file that exists", f"no file {str(path)!r}") from error
    except Exception as error:  # what decodes pictures raises many kinds
        found = f"none that can be read ({type(error).__name__})"
        raise expected(label, f"a picture in {path.name!r}", found) from error


def _texts(record: Mapping[str, Any], label: str, processor: Any) -> dict[str, Any]:
    """The record with the texts that a processor takes, and without pictures."""
    if "clean" not in record:
        raise expected(label, "the key 'clean'", f"only {list(record)}")
    if all(record.get(name) is None for name in ("corrupted", "corrupted_image")):
        raise expected(label, "corrupted or corrupted_image", "neither")
    sides = {side: record["clean"] if record.get(side) is None else record[side] for side in _SIDES}
    texts = {side: prompt_text(prompt, f"{label}, {side}", processor) for side, prompt in sides.items()}
    return {name: each for name, each in record.items() if name not in IMAGES} | texts


def _processed(processor: Any, text: str, names: Sequence[Path], label: str) -> Mapping[str, Any]:
    """What the processor makes of a prompt. A BOS with which the text begins is the only one."""
    pictures = [_open(each, f"{label}_image", whole=True) for each in names]
    bos = processor.tokenizer.bos_token
    if bos and processor.tokenizer(text)["input_ids"][:2] == [processor.tokenizer.bos_token_id] * 2:
        text = text.removeprefix(bos)
    try:
        found: Mapping[str, Any] = processor(text=[text], images=[pictures], return_tensors="pt")
    except Exception as error:  # and so do processors
        raise expected(label, "a prompt that the processor takes", f"another ({reason(error)})") from error
    return found
