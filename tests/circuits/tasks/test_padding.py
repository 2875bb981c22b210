"""Token batches with attention masks, padded on either side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eap_circuits import InputError, PairedDataset
from eap_circuits.errors import InputWarning

Rows = list[list[int]]


def padded(rows: Rows, left: bool, pad: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = [], []
    for row in rows:
        fill = width - len(row)
        ids.append([*[pad] * fill, *row] if left else [*row, *[pad] * fill])
        mask.append([*[0] * fill, *[1] * len(row)] if left else [*[1] * len(row), *[0] * fill])
    return torch.tensor(ids), torch.tensor(mask)


TOKENS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=4), st.integers(0, 12), st.booleans(), st.booleans())
def test_a_mask_says_which_tokens_are_real(pairs: list[Any], pad: int, left: bool, other_left: bool) -> None:
    clean, corrupted = ([pair[side] for pair in pairs] for side in (0, 1))
    ids, mask = padded(clean, left, pad, 7)
    others, other_mask = padded(corrupted, other_left, pad, 8)
    data = PairedDataset.from_tokens(
        ids,
        others,
        answers=[[10, 11]] * len(pairs),
        attention_mask=mask.bool(),
        corrupted_attention_mask=other_mask.tolist(),
    )
    assert data.lengths.tolist() == [len(row) for row in clean]
    lengths = data.lengths if data.corrupted_lengths is None else data.corrupted_lengths
    assert lengths.tolist() == [len(row) for row in corrupted]
    for row in range(len(pairs)):
        assert data.clean[row, : data.lengths[row]].tolist() == clean[row]
        assert data.corrupted[row, : lengths[row]].tolist() == corrupted[row]


def test_one_mask_for_both_prompts_and_lengths_that_agree() -> None:
    clean, mask = padded([[1, 2, 3], [1, 4]], True, 0, 3)
    corrupted, _ = padded([[1, 5, 3], [1, 6]], True, 0, 3)
    given: dict[str, Any] = {"answers": [[7, 8]] * 2, "attention_mask": mask}
    for lengths in (None, [3, 2]):
        data = PairedDataset.from_tokens(clean, corrupted, lengths, **given)
        assert data.clean.tolist() == [[1, 2, 3], [1, 4, 0]] and data.corrupted.tolist() == [[1, 5, 3], [1, 6, 0]]
        assert data.lengths.tolist() == [3, 2] and data.corrupted_lengths is None
    with pytest.raises(InputError, match=r"^lengths: expected those of the mask, \[3, 2\], found \[3, 3\]"):
        PairedDataset.from_tokens(clean, corrupted, [3, 3], **given)


@pytest.mark.parametrize("left", [False, True])
def test_one_mask_for_prompts_that_are_padded_otherwise(left: bool) -> None:
    clean, mask = padded([[1, 2, 3], [1, 4]], left, 0, 4)
    longer, own = padded([[1, 5, 3, 2], [1, 6]], left, 0, 4)
    given: dict[str, Any] = {"answers": [[7, 8]] * 2, "attention_mask": mask}
    with pytest.raises(
        InputError, match=r"^corrupted\[0\]: expected padding .* corrupted_attention_mask, found tokens"
    ):
        PairedDataset.from_tokens(clean, longer, **given)
    data = PairedDataset.from_tokens(clean, longer, **given, corrupted_attention_mask=own)
    assert data.corrupted_lengths is not None and data.corrupted_lengths.tolist() == [4, 2]
    shorter, _ = padded([[1, 5, 3], [6]], left, 0, 4)
    with pytest.warns(InputWarning, match=r"^corrupted\[1\] begins or ends with the padding, 0, as the mask"):
        PairedDataset.from_tokens(clean, shorter, **given)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"attention_mask": [[1, 1, 1], [1, 0, 1]]}, r"^attention_mask\[1\]: expected real tokens side by side"),
        ({"attention_mask": "left"}, "^attention_mask: expected a tensor of integers, found str"),
        ({"attention_mask": [[1, 1], [1, 0]]}, r"^attention_mask: expected shape \[2, 3\], .* found \[2, 2\]"),
        ({"attention_mask": [[1, 1, 1], [1, 2, 0]]}, r"^attention_mask: expected 0 and 1, found other numbers"),
        ({"attention_mask": [[1, 1, 1], [0, 0, 0]]}, r"^lengths\[1\]: expected 1 to 3, .* found 0"),
        (
            {"attention_mask": None},
            "^lengths: expected each prompt's number of .* found neither",
        ),
        ({"corrupted_attention_mask": [[1, 1, 1]]}, r"^corrupted_attention_mask: expected shape \[2, 3\]"),
        ({"answers": None}, "^answers: expected a tensor of integers, found NoneType"),
    ],
)
def test_masks_that_cannot_be(wrong: dict[str, Any], message: str) -> None:
    ids = [[1, 2, 3], [1, 4, 0]]
    fields: dict[str, Any] = {"answers": [[7, 8]] * 2, "attention_mask": [[1, 1, 1], [1, 1, 0]], **wrong}
    with pytest.raises(InputError, match=message):
        PairedDataset.from_tokens(ids, ids, **fields)


@pytest.mark.parametrize("given", [{"lengths": [2]}, {"lengths": [0]}, {"attention_mask": torch.empty(1, 0).bool()}])
def test_prompts_without_positions(given: dict[str, Any]) -> None:
    some, none = torch.tensor([[2, 3]]), torch.empty(1, 0, dtype=torch.int64)
    with pytest.raises(InputError, match=r"^clean: expected .* at least one position, found \[1, 0\]\.$"):
        PairedDataset.from_tokens(none, none, answers=[[7, 8]], **given)
    with pytest.raises(InputError, match=r"^corrupted: expected .* at least one position, found \[1, 0\]\.$"):
        PairedDataset.from_tokens(some, none, [2], [[7, 8]], corrupted_lengths=given.get("lengths", [1]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(2, 9), min_size=2, max_size=6), min_size=1, max_size=4), st.integers(0, 12), st.data()
)
def test_left_padding_is_refused_by_name_and_right_padding_is_not(middles: Rows, pad: int, draw: st.DataObject) -> None:
    """Prompts begin with BOS (20) and end in the same word (30), the longest of them whole; 0 to 12 pad."""
    rows = [[20, *middle, 30] for middle in middles]
    longest = max(map(len, rows))
    ids, _ = padded(rows, False, pad, longest)
    lengths, answers = [len(row) for row in rows], [[40, 41]] * len(rows)
    PairedDataset.from_tokens(ids, ids, lengths, answers)
    ids, _ = padded(rows, True, pad, longest)
    short = [row for row, length in enumerate(lengths) if length < longest]
    if short:
        with pytest.raises(InputError, match=rf"^clean\[{short[0]}\]: expected .* found padding on"):
            PairedDataset.from_tokens(ids, ids, lengths, answers)


def test_anything_may_stand_for_padding_on_the_right() -> None:
    ids = [[1, 2, 3, 4, 5], [6, 6, 7, 8, 9], [1, 3, 2, 8, 9]]
    with pytest.raises(InputError, match=r"^clean\[1\]: expected padding on the right"):
        PairedDataset.from_tokens(ids[:2], ids[:2], [5, 3], [[7, 8]] * 2)
    PairedDataset.from_tokens(ids, ids, [5, 3, 3], [[7, 8]] * 3)  # whose last row is padded with 8 and 9


def test_files_of_others_may_hold_a_mask(tmp_path: Path) -> None:
    clean, mask = padded([[1, 2, 3, 4], [1, 4]], True, 0, 4)
    answers = torch.tensor([[7, 8]] * 2)
    tensors = {"clean": clean, "corrupted": clean + 0, "answers": answers}
    torch.save({**tensors, "attention_mask": mask}, tmp_path / "a.pt")
    data = PairedDataset.from_file(tmp_path / "a.pt")
    assert data.clean.tolist() == [[1, 2, 3, 4], [1, 4, 0, 0]] and data.name == "a"
    torch.save({**tensors, "lengths": mask.sum(1)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: clean\[1\]: expected padding on the right"):
        PairedDataset.from_file(tmp_path / "a.pt")


def test_weights_in_a_list_are_not_rounded():
    pairs = [[1, 2]] * 2, [[1, 3]] * 2, [2, 2], [[4, 5]] * 2
    assert PairedDataset.from_tokens(*pairs, weights=[0.1, 1e300]).weights.tolist() == [0.1, 1e300]
