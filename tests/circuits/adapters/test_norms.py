"""Norms as the library's kernels compute them."""

from __future__ import annotations

import torch

from eap_circuits.adapters import bind


def test_the_library_computes_what_a_models_norm_does(family, make_model):
    arch = bind(make_model(family))
    x = torch.randn(3, arch.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for norm in arch.norms:
        torch.testing.assert_close(norm.fused(x), norm(x), rtol=1e-6, atol=1e-6)  # some round to float32 inside
