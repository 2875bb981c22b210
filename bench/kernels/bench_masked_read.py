"""masked_read against the einsum and the matrix product, over the share of edges that are kept.

Shapes: SmolLM2-135M (S = 301, D = 576), the receivers of one layer (15) and of the model (481). Bars lie
about 20 % under the measured ratio, and never above the lowest seen.
"""

import pytest
import torch

import eap_kernels as ek
from eap_kernels import testing

pytestmark = pytest.mark.benchmark(group="masked_read")
S, D = 301, 576


def inputs(receivers, tokens, density, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    delta = testing.random_tensor((S, tokens, D), dtype, generator)
    base = testing.random_tensor((1, tokens, D), dtype, generator)[0]
    mask = torch.rand(S, receivers, generator=generator) < density
    oracle = testing.masked_read_oracle(base, delta, mask)
    reference = ek.masked_read(base, delta, mask, impl="reference")
    for impl in ("cpu", "auto"):
        testing.assert_close(ek.masked_read(base, delta, mask, impl=impl), reference, oracle)
    return base, delta, mask


@pytest.mark.parametrize(("density", "at_least"), [(0.01, 10.0), (0.1, 2.5)])
def test_auto_against_einsum(speedup, density, at_least):
    base, delta, mask = inputs(15, 100, density)
    soft = mask.float()
    speedup(
        lambda: ek.masked_read(base, delta, mask),
        lambda: base + torch.einsum("sr,snd->rnd", soft, delta),
        at_least,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("receivers", "tokens", "at_least"), [(15, 100, 1.5), (481, 20, 0.9)])
def test_cpu_against_reference_at_the_density_where_auto_changes(speedup, receivers, tokens, at_least, dtype):
    base, delta, mask = inputs(receivers, tokens, 0.28, dtype)
    assert "auto runs cpu" in ek.explain("masked_read", base, delta, mask)
    speedup(
        lambda: ek.masked_read(base, delta, mask, impl="cpu"),
        lambda: ek.masked_read(base, delta, mask, impl="reference"),
        at_least,
    )


def test_reference_against_cpu_on_a_full_mask(speedup):
    base, delta, mask = inputs(481, 20, 1.1)
    assert "auto runs reference" in ek.explain("masked_read", base, delta, mask)
    speedup(
        lambda: ek.masked_read(base, delta, mask),
        lambda: ek.masked_read(base, delta, mask, impl="cpu"),
        1.6,
    )
