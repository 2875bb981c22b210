"""What a dataset says of itself, against counting by hand."""

from __future__ import annotations

import warnings

import pytest
import torch

from eap_circuits import PairedDataset, load_task
from eap_circuits.errors import InputWarning
from tests.circuits.generated.generated_tasks import TOKENIZERS


def test_repeats_and_lengths() -> None:
    clean = torch.tensor([[1, 2, 3], [1, 2, 0], [1, 2, 3], [1, 2, 3]])
    data = PairedDataset.from_tokens(clean, clean + 1, [3, 2, 3, 3], [[5, 6], [5, 6], [5, 6], [6, 5]], name="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        found = data.summary()
    assert (found.pairs, found.different, found.equal) == (4, 3, 0)
    assert found.tokens == found.corrupted_tokens == (2, 3)
    assert found.good is found.prefers_bad is None
    assert str(found) == "mine: 4 pairs of 2 to 3 tokens, 3 different ones."


def test_a_corrupted_prompt_that_is_the_clean_one_is_told() -> None:
    data = PairedDataset.from_tokens([[1, 2], [1, 2]], [[1, 2], [1, 3]], [2, 2], [[5, 6]] * 2)
    with pytest.warns(InputWarning, match="^data: on 1 of 2 pairs the corrupted prompt is the clean one"):
        assert data.summary().equal == 1
    longer = PairedDataset.from_tokens([[1, 2]], [[1, 2, 0]], [2], [[5, 6]], corrupted_lengths=[3])
    assert longer.summary().equal == 0 and longer.summary().corrupted_tokens == (3, 3)


def test_a_generated_task_that_runs_out_of_pairs() -> None:
    data = load_task("gender-bias", TOKENIZERS["single digits"](), n=700)
    assert data.prompts is not None
    assert data.summary().different == len(set(data.prompts)) < 700
