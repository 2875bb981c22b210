"""What tensors over edges are looked through for."""

import pytest
import torch

from eap_circuits.edges import finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    about = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    assert finite(torch.tensor([[about.min, 0], [about.max, about.max]], dtype=dtype))
    assert finite(torch.empty(3, 0, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(value: float) -> None:
    for place in range(37):
        values = torch.arange(37.0).repeat(3, 1)
        values[1, place] = value
        assert not finite(values) and not finite(values.T) and finite(values[::2])
