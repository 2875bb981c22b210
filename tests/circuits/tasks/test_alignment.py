"""Which corrupted token is compared with each clean one, and datasets of pairs of unequal lengths."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eap_circuits import InputError, PairedDataset
from eap_circuits.tasks.tokens.alignment import align


@pytest.mark.parametrize(
    ("clean", "corrupted", "wanted"),
    [
        # Equally long: position by position, whatever the tokens.
        ("A B C D", "A X C D", [0, 1, 2, 3]),
        ("A B C D", "B C D A", [0, 1, 2, 3]),
        # A longer or shorter name: its last tokens belong together, what follows is right-aligned.
        ("A N C D", "A X Y C D", [0, 2, 3, 4]),
        ("A X Y C D", "A N C D", [0, 1, 1, 2, 3]),
        ("A X Y Z C D", "A N M C D", [0, 1, 1, 2, 3, 4]),
        # Nothing in its place: the corrupted token before it.
        ("A P Q C D", "A C D", [0, 0, 0, 1, 2]),
        ("P Q C D", "C D", [0, 0, 0, 1]),
        # Words put in: no clean token is compared with them.
        ("A C D", "A P Q C D", [0, 3, 4]),
        # The last has the last, also where tokens were put in or left out there.
        ("A B", "A B C", [0, 2]),
        ("A B C", "A B", [0, 0, 1]),
        ("A B X", "A C B Y", [0, 2, 3]),
        # Between two differing spans, tokens that both have.
        ("A P C R E", "A X Y C S E", [0, 2, 3, 4, 5]),
        ("A P C R T E", "A X C E", [0, 1, 2, 2, 2, 3]),
        ("A", "B C", [1]),
        ("A B C", "Q", [0, 0, 0]),
    ],
)
def test_by_hand(clean: str, corrupted: str, wanted: list[int]) -> None:
    assert align([ord(x) for x in clean.split()], [ord(x) for x in corrupted.split()]) == wanted


TOKENS = st.lists(st.integers(0, 4), min_size=1, max_size=12)
SHARED = st.lists(st.integers(0, 4), max_size=4)


@settings(deadline=None, max_examples=300)
@given(TOKENS, TOKENS)
def test_never_decreasing_and_the_last_has_the_last(clean: list[int], corrupted: list[int]) -> None:
    found = align(clean, corrupted)
    assert len(found) == len(clean) and all(a <= b for a, b in pairwise(found))
    assert found[0] >= 0 and found[-1] == len(corrupted) - 1
    if len(clean) == len(corrupted):
        assert found == list(range(len(clean)))


@settings(deadline=None, max_examples=300)
@given(SHARED, TOKENS, TOKENS, SHARED)
def test_what_both_begin_and_end_with_has_itself(
    before: list[int], middle: list[int], other: list[int], after: list[int]
) -> None:
    clean, corrupted = [*before, 7, *middle, 7, *after], [*before, 8, *other, 8, *after]
    found = align(clean, corrupted)
    assert found[: len(before)] == list(range(len(before)))
    assert found[len(clean) - len(after) :] == list(range(len(corrupted) - len(after), len(corrupted)))
    # The last token of what differs has the last; nothing that differs has what is shared.
    assert found[len(clean) - len(after) - 1] == len(corrupted) - len(after) - 1
    assert found[len(before)] >= len(before)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=5))
def test_a_dataset_begins_to_differ_where_its_prefixes_end(pairs: list[tuple[list[int], list[int]]]) -> None:
    data = dataset(pairs)
    for row, (clean, corrupted) in enumerate(pairs):
        one = data[[row]]
        first, π = int(data.first_difference[row]), align(clean, corrupted)
        assert int(one.first_difference[0]) == first
        assert clean[:first] == corrupted[:first] and π[:first] == list(range(first))
        assert first < min(len(clean), len(corrupted)) and min(π[first:]) >= first
        assert int(data.longer_lengths[row]) == max(len(clean), len(corrupted))
        if len(clean) == len(corrupted):  # as of pairs that are all equally long
            alone = PairedDataset.from_tokens([clean], [corrupted], [len(clean)], [[1, 2]])
            assert alone.first_difference.tolist() == [first] and one.alignment is None is one.corrupted_lengths


def padded(rows: list[list[int]]) -> list[list[int]]:
    width = max(map(len, rows))
    return [[*row, *[-7] * (width - len(row))] for row in rows]


def dataset(pairs: list[tuple[list[int], list[int]]]) -> PairedDataset:
    clean, corrupted = zip(*pairs)
    return PairedDataset.from_tokens(
        padded(list(clean)),
        padded(list(corrupted)),
        list(map(len, clean)),
        [[1, 2]] * len(pairs),
        corrupted_lengths=list(map(len, corrupted)),
    )


def test_tensors_are_padded_to_one_width() -> None:
    data = dataset([([5, 6, 7], [5, 7]), ([1, 2], [1, 3, 4, 2])])
    assert data.clean.tolist() == [[5, 6, 7, 0], [1, 2, 0, 0]]
    assert data.corrupted.tolist() == [[5, 7, 0, 0], [1, 3, 4, 2]]
    assert data.alignment is not None and data.corrupted_lengths is not None
    assert data.alignment.tolist() == [[0, 0, 1, 0], [0, 3, 0, 0]]
    assert (data.lengths.tolist(), data.corrupted_lengths.tolist(), data.n_tokens) == ([3, 2], [2, 4], 5)
    chosen = data[[1]]
    assert chosen.alignment is not None and chosen.alignment.tolist() == [[0, 3, 0, 0]]


def test_pairs_compared_position_by_position_are_as_without_alignment() -> None:
    data = dataset([([5, 6, 7], [5, 7, 6]), ([1, 2], [1, 3])])
    assert data.alignment is None and data.corrupted_lengths is None
    given = PairedDataset.from_tokens([[1, 2, 3]], [[1, 4, 3]], [3], [[1, 2]], alignment=[[0, 1, 2]])
    assert given.alignment is None


def test_an_alignment_of_ones_own() -> None:
    data = PairedDataset.from_tokens([[1, 2, 3, 9]], [[1, 4, 3]], [3], [[1, 2]], "own", "rank", [3], [[0, 0, 2, 9]])
    assert data.alignment is not None and data.alignment.tolist() == [[0, 0, 2, 0]]
    assert data.first_difference.tolist() == [0]  # position 1 is compared with what position 0 gives


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"corrupted_lengths": [3, 1]}, r"^corrupted_lengths: expected shape \[1\], one per example, found \[2\]"),
        ({"corrupted_lengths": [3]}, r"^corrupted_lengths\[0\]: expected 1 to 2, the positions there are, found 3"),
        ({"corrupted_lengths": [0]}, r"^corrupted_lengths\[0\]: expected 1 to 2"),
        ({"corrupted_lengths": [1.0]}, r"^corrupted_lengths: expected an integer dtype"),
        ({"corrupted": [1, 2]}, r"^corrupted: expected shape \[1, positions\], found \[2\]"),
        ({"corrupted": [[1, 2], [3, 4]]}, r"^corrupted: expected shape \[1, positions\], found \[2, 2\]"),
        ({"alignment": [0, 1]}, r"^alignment: expected shape \[1, 3\], the shape of clean, found \[2\]"),
        ({"alignment": [[0, 1, 0]]}, r"^alignment\[0\]: expected positions that never decrease, the last 1, found \["),
        ({"alignment": [[0, 0, 0]]}, r"^alignment\[0\]: expected positions that never decrease, the last 1"),
        ({"alignment": [[-1, 0, 1]]}, r"^alignment\[0\]: expected positions that never decrease, the last 1"),
        ({"alignment": [[0, 1, 2]]}, r"^alignment\[0\]: expected positions that never decrease, the last 1"),
    ],
)
def test_what_cannot_be_aligned(given: dict[str, Any], message: str) -> None:
    fields = {"clean": [[1, 2, 3]], "corrupted": [[1, 2]], "corrupted_lengths": [2], **given}
    with pytest.raises(InputError, match=rf"{message}.*\.$"):
        PairedDataset.from_tokens(lengths=[3], answers=[[1, 2]], **fields)


def test_a_saved_dataset_keeps_its_alignment(tmp_path: Any) -> None:
    data = dataset([([5, 6, 7], [5, 7]), ([1, 2], [1, 3, 4, 2])])
    data.save(tmp_path / "unequal.safetensors")
    again = PairedDataset.from_file(tmp_path / "unequal.safetensors")
    for name in ("clean", "corrupted", "lengths", "corrupted_lengths", "alignment", "answers"):
        assert torch.equal(getattr(again, name), getattr(data, name))
