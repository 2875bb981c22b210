"""Norms as the library's kernels compute them."""

from __future__ import annotations

import pytest
import torch

from eap_circuits.adapters import bind


def test_the_library_computes_what_a_models_norm_does(family, make_model):
    arch = bind(make_model(family))
    x = torch.randn(3, arch.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for norm in arch.norms:
        torch.testing.assert_close(norm.fused(x), norm(x), rtol=1e-6, atol=1e-6)  # some round to float32 inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_through_a_norm_are_rounded_once(dtype, family, make_model):
    arch = bind(make_model(family, dtype))
    rows = torch.randn(3, arch.d_model, generator=torch.Generator().manual_seed(0))
    for norm in arch.norms:
        for x in (rows, rows.to(dtype)):
            wide = norm.backwards(x.double())
            torch.testing.assert_close(norm.backwards(x, low=torch.bfloat16).double(), wide, rtol=2**-8, atol=2**-16)
            right = norm.backwards(x.float()).bfloat16()
            assert torch.equal(norm.backwards(x, low=torch.bfloat16), right)
