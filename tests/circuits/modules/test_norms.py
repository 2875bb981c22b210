"""Norms as the library's kernels compute them."""

from __future__ import annotations

import pytest
import torch

from eap_circuits.adapters import bind, side_by_side


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


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo", "opt"])
def test_norms_side_by_side_do_what_each_of_them_does(family, make_model):
    arch = bind(make_model(family))
    norms = [norm for norm in arch.norms if norm.kind == arch.norms[0].kind]
    rows = torch.randn(len(norms), 5, 1, arch.d_model, generator=torch.Generator().manual_seed(0))
    together, some = side_by_side(norms), slice(3, 9)
    for low in (None, torch.bfloat16):
        right = torch.stack([norm.backwards(x, low=low) for norm, x in zip(norms, rows, strict=True)])
        assert torch.equal(together.backwards(rows, low=low), right)
        found = together.backwards(rows[..., some], features=some, mean=together.mean_backwards(rows), low=low)
        assert torch.equal(found, right[..., some])


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo"])
def test_rows_in_parts_are_those_of_all(family, make_model):
    norm = bind(make_model(family)).norms[0]
    rows = torch.randn(7, 2, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm.backwards(rows[:4], rows[4:5], rows[5:]), norm.backwards(rows))
