"""Prompt pairs as token tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..display import Result, library
from ..errors import expected, flag, listed
from ..texts.records import tokenised
from .loading import PairsFile, Records, naming, own_records, read_csv, read_file, read_rows, write_tokens
from .mib import is_mib, mib_records
from .scoring.checks import check_answers, check_pair_weights, check_scored, check_shapes
from .scoring.continuations import Rows, rows_of
from .scoring.spans import checked_spans
from .summary import Summary, columns_of, summary_of
from .tokens.alignment import aligned
from .tokens.padding import check_shared_mask, integers, real_numbers, unpadded
from .tokens.pictures import Pictures, first_difference

_GIVEN = ("clean", "corrupted", "lengths", "answers")
_IDS = (*_GIVEN, "corrupted_lengths", "alignment", "variants", "scored", "targets", "spans", "decoder")
_OF_PAIRS = (*_IDS, "scored_weights", "weights")


@dataclass(frozen=True, eq=False)
class PairedDataset(Result):
    """Clean and corrupted prompts, and the answers that a metric compares.

    The tensors are copied to the CPU and their padding is set to 0; prompts of unequal lengths are padded to the same
    width.

    Args:
        clean: int64 [E, T] token ids, right padded.
        corrupted: int64 [E, T]; of any width if `corrupted_lengths` are given.
        lengths: int64 [E] real tokens of each prompt, 1 to T; position `lengths - 1` is scored.
        answers: int64 [E, 2] (good, bad), or [E, 2, A] sets of ids padded with -1, or [E, 2, A, L] sets of answers of
            several tokens, padded likewise, or [E, 2, 0] if there are none.
        prompts: (clean, corrupted) texts of each pair for display, or None.
        name: the name of the data in results.
        metric: the metric these data are usually measured by.
        corrupted_lengths: int64 [E] real tokens of each corrupted prompt; None if they equal `lengths`.
        alignment: int64 [E, T], the corrupted position that each clean position is compared with. It never decreases
            and matches the last tokens; by default `align` computes it. None if all pairs are compared position by
            position.
        variants: int64, shaped as `answers`: each answer's token with, or without, a leading space; -1 where there is
            none. If the model finds these far likelier than the answers, runs warn. None if not known.
        seed: that of the generator that made the prompts, or None.
        scored: int64 [E, P], the positions of the clean prompt that are scored, growing, padded with -1; None: the
            last. Corrupted prompts are scored at the positions that are compared with these.
        targets: int64, shaped as `scored`: the token that should follow each; by default the clean prompt's next.
        scored_weights: float64, shaped as `scored`: how much each position counts; by default all alike.
        weights: float64 [E], how much each pair counts in means over pairs; by default all alike.
        alone: `corrupted` repeats `clean`, as there are no corrupted prompts; edges are ablated to constants.
        spans: int64 [E, T], which of the named spans each token of the clean prompt is in, or -1.
        span_names: their names; by default span0, span1 …
        decoder: int64 [E, T'], what the decoder of an encoder-decoder reads behind its start token, padded with -1; the
            token that follows is scored. None for other models.
        pictures: what tokens beyond the model's own write (`image_pairs`).

    Raises:
        InputError: no examples, a wrong shape or dtype, lengths, positions or alignment out of range, negative ids or
            weights, or answers that are empty, repeated, or both good and bad. Whether ids are in the vocabulary is
            checked with the model.
    """

    clean: Tensor
    corrupted: Tensor
    lengths: Tensor
    answers: Tensor
    prompts: tuple[tuple[str, str], ...] | None = None
    name: str = "data"
    metric: str = "logit_diff"
    corrupted_lengths: Tensor | None = None
    alignment: Tensor | None = None
    variants: Tensor | None = None
    seed: int | None = None
    scored: Tensor | None = None
    targets: Tensor | None = None
    scored_weights: Tensor | None = None
    weights: Tensor | None = None
    alone: bool = False
    spans: Tensor | None = None
    span_names: tuple[str, ...] = ()
    decoder: Tensor | None = None
    pictures: Pictures | None = None

    def __post_init__(self) -> None:
        for field in _OF_PAIRS:
            if getattr(self, field) is not None or field in _GIVEN:
                read = integers if field in _IDS else real_numbers
                object.__setattr__(self, field, read(field, getattr(self, field)))
        check_shapes(self)
        corrupted_lengths = self.lengths if self.corrupted_lengths is None else self.corrupted_lengths
        for field, lengths in (("clean", self.lengths), ("corrupted", corrupted_lengths)):
            ids: Tensor = getattr(self, field)
            ids = ids.masked_fill(torch.arange(ids.shape[1]) >= lengths[:, None], 0)
            if (ids < 0).any():
                row, column = (ids < 0).nonzero()[0].tolist()
                raise expected(f"{field}[{row}, {column}]", "a token id of 0 or more", ids[row, column].item())
            object.__setattr__(self, field, ids)
        if self.corrupted_lengths is not None or self.alignment is not None:
            found = aligned(self.clean, self.corrupted, self.lengths, corrupted_lengths, self.alignment)
            for field, tensor in zip(("clean", "corrupted", "corrupted_lengths", "alignment"), found, strict=True):
                object.__setattr__(self, field, tensor)
        check_answers(self.answers)
        check_scored(self)
        if self.scored is not None and self.targets is None:
            following = (self.scored + 1).clamp(max=self.clean.shape[1] - 1)
            there = (self.scored >= 0) & (self.scored + 1 < self.lengths[:, None])
            object.__setattr__(self, "targets", self.clean.gather(1, following).where(there, -1))
        for field, value in zip(("spans", "span_names"), checked_spans(self), strict=True):
            object.__setattr__(self, field, value)
        if self.weights is not None:
            check_pair_weights(self.weights, len(self))
        if self.prompts is not None:
            pairs = tuple((str(clean), str(corrupted)) for clean, corrupted in self.prompts)
            if len(pairs) != len(self):
                raise expected("prompts", f"{len(self)} pairs of texts, one per example", len(pairs))
            object.__setattr__(self, "prompts", pairs)

    # Making one.

    @classmethod
    def from_records(
        cls,
        records: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        prepend_bos: bool = True,
        name: str = "data",
        metric: str = "logit_diff",
        align: bool = False,
    ) -> PairedDataset:
        """Tokenise text pairs.

        Args:
            records: `{"clean": prompt, "corrupted": prompt, "answers": [good, bad]}`. A prompt is a text, or messages
                with role and content, which the tokenizer's chat template turns into one. An answer is a token id, a
                text of one token, or a list of these (a set); the space between it and the prompt may be left out.
                docs/data.md has what else they may hold: `scored`, `scored_weights`, `weight`, `spans`, `span_tokens`.
            tokenizer: a Hugging Face tokenizer; its own special tokens are added.
            prepend_bos: prepend BOS if the tokenizer has one, did not add it, and the text does not begin with it. If
                False, prompts get no special tokens. What a chat template writes is left as it is.
            name: see `PairedDataset`.
            metric: see `PairedDataset`.
            align: also take pairs with different numbers of tokens. The corrupted prompt runs as it is and is read at
                the positions that match the clean prompt's (`align`). By default such pairs are refused.

        Raises:
            InputError: names the record and the part of it that is missing, empty, of unequal length or not one token.

        Warns if an answer is not the token that its text adds to the prompt.
        """
        prepend_bos, align = flag("prepend_bos", prepend_bos), flag("align", align)
        records = listed("records", records, "a list of records")
        labels = [f"records[{i}]" for i in range(len(records))]
        return cls(**tokenised(records, labels, tokenizer, prepend_bos, align), name=name, metric=metric)

    @classmethod
    def from_tokens(
        cls,
        clean: Any,
        corrupted: Any,
        lengths: Any = None,
        answers: Any = None,
        name: str = "data",
        metric: str = "logit_diff",
        corrupted_lengths: Any = None,
        alignment: Any = None,
        *,
        attention_mask: Any = None,
        corrupted_attention_mask: Any = None,
        scored: Any = None,
        targets: Any = None,
        scored_weights: Any = None,
        weights: Any = None,
        spans: Any = None,
        span_names: Sequence[str] = (),
        decoder: Any = None,
        pictures: Pictures | None = None,
    ) -> PairedDataset:
        """Prompt pairs given as tokens; see `PairedDataset`. The arguments are not changed.

        Args:
            corrupted: None if there are no corrupted prompts.
            lengths: not needed with a mask.
            answers: None if there are none; then `scored` is needed.
            scored, targets, scored_weights, weights, spans, span_names, decoder, pictures: positions count from a
                prompt's first token.
            attention_mask: [E, T], 1 or True for the clean prompts' real tokens. Padding may then be on the left, too.
            corrupted_attention_mask: that of the corrupted prompts, if theirs is another one.

        Raises:
            InputError: as `PairedDataset`; a mask with gaps or of another shape; corrupted prompts that the clean
                ones' mask would cut short; or, without a mask, rows whose padding is visibly on the left.
        """
        alone = corrupted is None
        if alone:
            corrupted = clean
        shared = attention_mask is not None and corrupted_attention_mask is None and corrupted_lengths is None
        if shared:
            corrupted_attention_mask = attention_mask
        other = lengths if corrupted_lengths is None else corrupted_lengths
        clean, lengths = unpadded("clean", clean, lengths, attention_mask)
        corrupted, other = unpadded("corrupted", corrupted, other, corrupted_attention_mask)
        if shared:
            check_shared_mask(clean, corrupted, lengths)
        wider = corrupted_attention_mask is not None and corrupted.shape != clean.shape
        if corrupted_lengths is not None or wider or not torch.equal(lengths, other):
            corrupted_lengths = other
        if answers is None and scored is not None:
            answers = torch.empty(len(clean), 2, 0, dtype=torch.int64)
        where = {"scored": scored, "targets": targets, "scored_weights": scored_weights, "weights": weights}
        where |= {"spans": spans, "span_names": span_names, "decoder": decoder, "pictures": pictures}
        pairs = clean, corrupted, lengths, answers, None, name, metric, corrupted_lengths, alignment
        return cls(*pairs, **where, alone=alone)

    @classmethod
    def from_csv(
        cls, path: str | os.PathLike[str], tokenizer: Any, prepend_bos: bool = True, align: bool = False
    ) -> PairedDataset:
        """Read a table of prompt pairs; see `from_records`.

        Columns: clean, corrupted, and two columns of answers: correct_idx and incorrect_idx (ids, as in EAP-IG's
        tables), good and bad, answer and wrong_answer, or correct and incorrect (texts). A cell may hold a list: a set
        of answers. Errors number rows as a spreadsheet does: the header is row 1.
        """
        return cls._from_rows(read_file(path, read_csv), own_records, tokenizer, prepend_bos, align)

    @classmethod
    def from_jsonl(
        cls, path: str | os.PathLike[str], tokenizer: Any, prepend_bos: bool = True, align: bool = False
    ) -> PairedDataset:
        """Read one JSON record per line, or a JSON list of records, as for `from_records` or `from_csv`."""
        return cls._from_rows(read_file(path, read_rows), own_records, tokenizer, prepend_bos, align)

    @classmethod
    def from_mib(
        cls,
        path: str | os.PathLike[str],
        tokenizer: Any,
        counterfactual: str | None = None,
        prepend_bos: bool = True,
        align: bool = False,
    ) -> PairedDataset:
        """Read rows of the MIB benchmark's IOI, MCQA, ARC or arithmetic data (arXiv 2504.13151).

        Args:
            path: `.json` (a list of rows), `.jsonl` or `.parquet`, as on the hub or as `datasets` writes them.
            tokenizer: the model's; rows whose prompts or answers have unequal numbers of its tokens are left out.
            counterfactual: the column of the corrupted prompts; by default the circuit track's
                ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual").
            prepend_bos: see `from_records`.
            align: keep rows whose prompts have unequal lengths; see `from_records`.

        Raises:
            InputError: names the file and what is missing in it.
        """

        def records(rows: list[Any], labels: list[str]) -> Records:
            return mib_records(rows, labels, tokenizer, counterfactual, align)

        return cls._from_rows(read_file(path, read_rows), records, tokenizer, prepend_bos, align)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], tokenizer: Any = None, prepend_bos: bool = True, align: bool = False
    ) -> PairedDataset:
        """Read texts from `.csv`, `.json`, `.jsonl`, `.parquet`, or tensors (named as here) from `.safetensors`, `.pt`.

        Rows with `prompt` and without `clean` are MIB's (`from_mib`). Nothing is unpickled. Only texts need a tokenizer
        and are aligned; tensors bring their own alignment.

        Raises:
            InputError: one sentence that names the file and, if possible, the row or line.
        """
        file = read_file(path)
        if file.tokens is not None:
            with naming(file):
                return cls(**file.tokens) if "prompts" in file.tokens else cls.from_tokens(**file.tokens)
        if file.rows and is_mib(file.rows[0]):
            return cls.from_mib(file, tokenizer, None, prepend_bos, align)
        return cls._from_rows(file, own_records, tokenizer, prepend_bos, align)

    @classmethod
    def _from_rows(
        cls,
        file: PairsFile,
        records: Callable[[list[Any], list[str]], Records],
        tokenizer: Any,
        prepend_bos: bool,
        align: bool,
    ) -> PairedDataset:
        prepend_bos, align = flag("prepend_bos", prepend_bos), flag("align", align)
        with naming(file):
            found = records(file.rows, file.labels)
            return cls(**tokenised(*found, tokenizer, prepend_bos, align), name=file.path.stem)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `.safetensors` file for `from_file`, whole or not at all."""
        found: dict[str, Tensor | None] = {name: getattr(self, name) for name in _OF_PAIRS}
        texts = {name: getattr(self, name) for name in ("name", "metric", "prompts", "seed", "alone", "span_names")}
        if self.pictures is not None:
            found |= {f"picture_{name}": getattr(self.pictures, name) for name in ("embeddings", "shifts", "stacked")}
            texts["pictures"] = {"first": self.pictures.first, "types": self.pictures.types}
        write_tokens(path, found, texts)

    # Using one.

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> PairedDataset:
        """The examples at an index, slice, list or tensor of indices or bool mask, as a dataset."""
        if isinstance(index, slice):
            index = range(len(self))[index]
        if isinstance(index, Integral):
            index = int(index)
        if not isinstance(index, (int, Tensor)):
            members = list(index)
            index = torch.as_tensor(members, dtype=None if members else torch.int64)
        chosen = torch.arange(len(self))[index].reshape(-1)
        prompts = None if self.prompts is None else tuple(self.prompts[i] for i in chosen.tolist())
        every = {name: getattr(self, name) for name in _OF_PAIRS}
        found: dict[str, Any] = {name: None if x is None else x[chosen] for name, x in every.items()}
        return replace(self, **found, prompts=prompts)

    def summary(self) -> Summary:
        """How many pairs there are, how long, how many different ones. `eap.summarise` adds what a model makes of them.

        Warns if the corrupted prompt is the clean one on a quarter of the pairs or more: they have no effect to find.
        """
        return summary_of(self)

    @property
    def n_tokens(self) -> int:
        """Real tokens of all clean prompts together."""
        return int(self.lengths.sum())

    @cached_property
    def first_difference(self) -> Tensor:
        """The first position where clean and corrupted differ; `lengths - 1` if they never do. int64 [E].

        In aligned pairs it is the first position that is compared with another token or position, or that other
        position if it is earlier.
        """
        return first_difference(self)

    @cached_property
    def first_needed(self) -> Tensor:
        """The first position that differs or is scored: what comes before can be taken from a prefix. int64 [E]."""
        return self.first_difference if self.scored is None else self.first_difference.minimum(self.scored[:, 0])

    @cached_property
    def rows(self) -> Rows:
        """The prompts that run: the pairs', or these followed by each of their answers of several tokens."""
        return rows_of(self)

    @property
    def run_lengths(self) -> Tensor:
        """Tokens that run of each clean prompt with the longest of its answers, less that answer's last. int64 [E]."""
        if self.answers.dim() < 4:
            return self.lengths
        return self.lengths + (self.answers >= 0).sum(3).amax((1, 2)) - 1

    @property
    def longer_lengths(self) -> Tensor:
        """The same of the longer prompt of each pair. int64 [E]."""
        if self.corrupted_lengths is None:
            return self.run_lengths
        return self.run_lengths + (self.corrupted_lengths - self.lengths).clamp(min=0)

    def scored_last(self) -> PairedDataset:
        """The same prompts without answers, scored at their last tokens."""
        answers = self.answers.new_empty(len(self), 2, 0)
        return replace(self, answers=answers, variants=None, scored=None, targets=None, scored_weights=None)

    def to_dict(self) -> dict[str, list[Any]]:
        """The pairs by column: clean and corrupted, as texts or else as token ids; what a decoder reads, as ids; good
        and bad answers' ids, lists of them for sets; and the number of tokens of the clean prompt."""
        return columns_of(self)

    def to_pandas(self) -> Any:
        """A pandas DataFrame of `to_dict`."""
        return library("pandas", "to_pandas()").DataFrame(self.to_dict())

    def __repr__(self) -> str:
        return f"PairedDataset({self.name!r}, {len(self)} pairs, {self.n_tokens} tokens, {self.metric})"
