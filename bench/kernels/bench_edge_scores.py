"""edge_scores against the einsum that published code uses, and each backend against the other.

Shapes: SmolLM2-135M (S = 301, D = 576); R = 15 are the attention receivers of one layer. Bars lie about 20 %
under the measured ratio, and never above the lowest seen.
"""

import pytest
import torch

import eap_kernels as ek
from eap_kernels import testing

pytestmark = pytest.mark.benchmark(group="edge_scores")
S, D = 301, 576


def inputs(receivers, tokens, dtype, layout):
    generator = torch.Generator().manual_seed(0)
    delta, grad = (testing.random_tensor((n, tokens, D), dtype, generator, layout) for n in (S, receivers))
    reach = torch.full((receivers,), S)
    oracle = testing.edge_scores_oracle(delta, grad, reach)
    reference = ek.edge_scores(delta, grad, reach, impl="reference")
    for impl in ("cpu", "auto"):
        testing.assert_close(ek.edge_scores(delta, grad, reach, impl=impl), reference, oracle)
    return delta, grad, reach, torch.zeros(S, receivers)


def staircase(layers=30, heads=9, kv_heads=3):
    """reach of every receiver of SmolLM2-135M."""
    reach = []
    for layer in range(layers):
        seen = 1 + layer * (heads + 1)
        reach += [seen] * (heads + 2 * kv_heads) + [seen + heads]
    return torch.tensor([*reach, 1 + layers * (heads + 1)])


@pytest.mark.parametrize(("receivers", "at_least"), [(15, 1.9), (48, 1.25)])
def test_auto_against_einsum_on_a_tokens_first_buffer(speedup, receivers, at_least):
    delta, grad, reach, out = inputs(receivers, 60, torch.float32, "tokens_first")
    d, g = delta.transpose(0, 1), grad.transpose(0, 1)  # [N, S, D], as peers keep it
    speedup(
        lambda: ek.edge_scores(delta, grad, reach, out),
        lambda: out.add_(torch.einsum("nsd,nrd->sr", d, g)),
        at_least,
    )


def test_auto_against_einsum_on_the_whole_staircase(speedup):
    reach = staircase()
    delta, grad, _, out = inputs(len(reach), 16, torch.float32, "tokens_first")
    d, g = delta.transpose(0, 1), grad.transpose(0, 1)
    speedup(
        lambda: ek.edge_scores(delta, grad, reach, out),
        lambda: out.add_(torch.einsum("nsd,nrd->sr", d, g)),
        1.7,
    )


@pytest.mark.parametrize(
    ("receivers", "dtype", "layout", "at_least"),
    [
        (4, torch.float32, "contiguous", 0.95),
        (9, torch.float32, "contiguous", 0.95),
        (9, torch.float32, "tokens_first", 1.2),
        (15, torch.float32, "tokens_first", 1.0),
        (15, torch.bfloat16, "contiguous", 1.1),
        (15, torch.bfloat16, "tokens_first", 1.4),
    ],
    ids=str,
)
def test_cpu_against_reference_where_auto_takes_it(speedup, receivers, dtype, layout, at_least):
    delta, grad, reach, out = inputs(receivers, 100, dtype, layout)
    assert "auto runs cpu" in ek.explain("edge_scores", delta, grad, reach)
    speedup(
        lambda: ek.edge_scores(delta, grad, reach, out, impl="cpu"),
        lambda: ek.edge_scores(delta, grad, reach, out, impl="reference"),
        at_least,
    )


def test_reference_on_flat_memory_is_one_matrix_product(speedup):
    delta, grad, reach, out = inputs(48, 60, torch.float32, "contiguous")
    assert "auto runs reference" in ek.explain("edge_scores", delta, grad, reach)
    speedup(
        lambda: ek.edge_scores(delta, grad, reach, out),
        lambda: out.add_(delta.flatten(1) @ grad.flatten(1).T),
        0.85,
    )
