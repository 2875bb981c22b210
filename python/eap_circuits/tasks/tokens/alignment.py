"""Match the clean prompt's tokens with the corrupted prompt's, for pairs of unequal lengths."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import expected


def align(clean: Sequence[int], corrupted: Sequence[int]) -> list[int]:
    """π: the position in the corrupted prompt that is compared with each position of the clean one.

    π never decreases, and the last tokens, where the prompts are scored, are matched. Prompts of equal lengths are
    compared position by position. Otherwise tokens before the first and after the last difference are matched with
    themselves, and so are those in between that a longest-match comparison finds in both. If a span is replaced by
    another, their tokens are matched from the right, starting with the last of each, because models read the meaning of
    a span off its last token (Meng et al. 2022). Clean tokens left over are matched with the corrupted span's first
    token. Clean tokens that the corrupted prompt has nothing for are matched with the corrupted token before the gap,
    which has seen only what stands before the gap in both.

    Args:
        clean: token ids, at least one.
        corrupted: token ids, at least one.
    """
    if len(clean) == len(corrupted):
        return list(range(len(clean)))
    *clean, _ = clean
    *corrupted, _ = corrupted
    last = len(corrupted)
    first, behind = 0, 0
    shorter = min(len(clean), len(corrupted))
    while first < shorter and clean[first] == corrupted[first]:
        first += 1
    while behind < shorter - first and clean[-1 - behind] == corrupted[-1 - behind]:
        behind += 1
    found = list(range(first))
    differing = clean[first : len(clean) - behind], corrupted[first : len(corrupted) - behind]
    for _, start, stop, other_start, other_stop in SequenceMatcher(None, *differing, autojunk=False).get_opcodes():
        # For matching spans, which are equally long, this is one to one.
        nearest = other_start if other_stop > other_start else other_start - 1
        found += [max(0, first + max(nearest, other_stop - (stop - t))) for t in range(start, stop)]
    return [*found, *range(last - behind, last), last]


def aligned(
    clean: Tensor, corrupted: Tensor, lengths: Tensor, corrupted_lengths: Tensor, alignment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(clean, corrupted, corrupted lengths, alignment) of a dataset whose prompts may have unequal lengths.

    All except the lengths are [E, T], where T is the larger of the two widths. The last two are None if every pair
    turns out to be compared position by position.

    Raises:
        InputError: the given alignment has another shape than clean, points outside a corrupted prompt, decreases, or
            does not match the last tokens.
    """
    width = max(clean.shape[1], corrupted.shape[1])
    position = torch.arange(width)
    real = position < lengths[:, None]
    if alignment is None:
        found = torch.zeros(len(clean), width, dtype=torch.int64)
        for row, (n, m) in enumerate(zip(lengths.tolist(), corrupted_lengths.tolist(), strict=True)):
            found[row, :n] = torch.tensor(align(clean[row, :n].tolist(), corrupted[row, :m].tolist()))
    else:
        found = _checked(alignment, clean, lengths, corrupted_lengths)
        found = functional.pad(found, (0, width - found.shape[1])).masked_fill(~real, 0)
    clean, corrupted = (functional.pad(ids, (0, width - ids.shape[1])) for ids in (clean, corrupted))
    if torch.equal(lengths, corrupted_lengths) and bool(((found == position) | ~real).all()):
        return clean, corrupted, None, None
    return clean, corrupted, corrupted_lengths, found


def _checked(alignment: Tensor, clean: Tensor, lengths: Tensor, corrupted_lengths: Tensor) -> Tensor:
    if alignment.shape != clean.shape:
        raise expected("alignment", f"shape {list(clean.shape)}, the shape of clean", list(alignment.shape))
    for row, (n, m) in enumerate(zip(lengths.tolist(), corrupted_lengths.tolist(), strict=True)):
        own = alignment[row, :n]
        if own[0] < 0 or (own.diff() < 0).any() or own[-1] != m - 1:
            raise expected(f"alignment[{row}]", f"positions that never decrease, the last {m - 1}", own.tolist())
    return alignment
