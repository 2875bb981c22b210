"""Rows of the MIB benchmark's datasets (Mueller et al. 2025, arXiv 2504.13151; `mib-bench/…` on the Hugging Face hub).

A row has a `prompt` and, for each kind of counterfactual, a column `…_counterfactual` with the same fields. Its answers
depend on the task, which the columns tell: IOI (`metadata` names the people), MCQA and ARC (`choices` with their
labels, `answerKey`), arithmetic (`label`). Rows are read as in the benchmark's circuit track: it sets the default
counterfactual, takes an answer's first token for the answer, and leaves out the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import expected
from ..texts.encoding import check_text, check_tokenizer, encode_many, encode_plain
from .loading import naming, read_file


@dataclass(frozen=True)
class Layout:
    """One task's rows.

    Args:
        tasks: what the benchmark calls the tasks whose rows these are.
        columns: the columns that identify the task.
        counterfactual: the circuit track's default column.
        answers: (row, counterfactual) -> texts of the good and the bad answer, then texts with as many tokens as these.
        whole: the whole answer must be one token; otherwise its first token stands for it.
    """

    tasks: tuple[str, ...]
    columns: tuple[str, ...]
    counterfactual: str
    answers: Callable[[Mapping[str, Any], Mapping[str, Any]], Sequence[str]]
    whole: bool = False


def _people(row: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [f" {row['metadata'][name]}" for name in ("indirect_object", "subject", "random_c")]


def _labels(row: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [str(side["choices"]["label"][side["answerKey"]]) for side in (row, other)]


def _results(row: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [str(side["label"]) for side in (row, other)]


LAYOUTS = (
    Layout(("ioi",), ("metadata", "s2_io_flip_counterfactual"), "s2_io_flip_counterfactual", _people),
    Layout(("mcqa", "arc-easy", "arc-challenge"), ("choices", "answerKey"), "symbol_counterfactual", _labels),
    Layout(
        ("arithmetic-addition", "arithmetic-subtraction"),
        ("label", "operator"),
        "random_counterfactual",
        _results,
        whole=True,
    ),
)
# The (layers, heads) of what the circuit track calls a model, and for which tasks it takes circuits of each.
MODELS = {"gpt2": (12, 12), "qwen2.5": (24, 14), "gemma2": (26, 8), "llama3": (32, 32)}
ENTRIES = (
    *(f"ioi_{model}" for model in MODELS),
    *(f"mcqa_{model}" for model in ("qwen2.5", "gemma2", "llama3")),
    *(f"arc-easy_{model}" for model in ("gemma2", "llama3")),
    *(f"{task}_llama3" for task in ("arithmetic-addition", "arithmetic-subtraction", "arc-challenge")),
)


def is_mib(row: Any) -> bool:
    return isinstance(row, Mapping) and "prompt" in row and "clean" not in row


def layout_of(rows: Sequence[Any]) -> Layout:
    """The layout of a file's rows; raises InputError if they are of no known task."""
    first = rows[0] if rows else {}
    layout = next((x for x in LAYOUTS if is_mib(first) and all(c in first for c in x.columns)), None)
    if layout is None:
        found = sorted(first) if isinstance(first, Mapping) else type(first).__name__
        raise expected("rows", "columns of MIB's IOI, MCQA, ARC or arithmetic data", found)
    return layout


def mib_records(
    rows: Sequence[Any], labels: Sequence[str], tokenizer: Any, counterfactual: str | None, align: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Records for `PairedDataset.from_records`, and their labels, for the rows that can be compared.

    Rows are left out if they lack the counterfactual, if their answers have unequal lengths or the same first token,
    or, without `align`, if their prompts have unequal lengths.

    Raises:
        InputError: rows of no known task, without the counterfactual's column, or all left out.
    """
    check_tokenizer(tokenizer)
    layout, first = layout_of(rows), rows[0]
    column = counterfactual or layout.counterfactual
    if column not in first:
        offered = sorted(name for name in first if name.endswith("_counterfactual"))
        raise expected("counterfactual", "one of " + ", ".join(map(repr, offered)), repr(column))
    kept, texts, answers = [], [], []
    for row, label in zip(rows, labels, strict=True):
        try:
            other = row[column]
            if other is None or other["prompt"] is None:
                continue
            answers.append(list(layout.answers(row, other)))
            texts.append((str(row["prompt"]), str(other["prompt"])))
        except (KeyError, IndexError, TypeError) as error:
            raise expected(label, "the columns that the first row has", f"something else ({error!r})") from error
        for text in (*texts[-1], *answers[-1]):
            check_text(text, label)
        kept.append(label)
    clean, corrupted = ([len(ids) for ids in encode_many(tokenizer, [pair[i] for pair in texts])] for i in (0, 1))
    pieces = {text: encode_plain(tokenizer, text) for text in sorted({text for group in answers for text in group})}
    records, whose = [], []
    for index, (pair, group) in enumerate(zip(texts, answers, strict=True)):
        ids = [pieces[text] for text in group]
        alike = len({len(x) for x in ids}) == 1 and (not layout.whole or len(ids[0]) == 1)
        if (align or clean[index] == corrupted[index]) and alike and ids[0][:1] != ids[1][:1]:
            records.append({"clean": pair[0], "corrupted": pair[1], "answers": [ids[0][0], ids[1][0]]})
            whose.append(kept[index])
    if not records:
        raise expected("rows", "at least one whose prompts and answers are equally long", f"none of {len(rows)}")
    return records, whose


def mib_tasks(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """The tasks of the benchmark whose rows a file may hold."""
    file = read_file(path)
    with naming(file):
        return layout_of(file.rows).tasks
