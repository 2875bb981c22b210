"""normalise_rows and collapse, each one pass on a CPU, against the reference's steps; `make bench`."""

import pytest
import torch

import eap_kernels as ek
from bench import measure

# M points, n tokens, h heads of K features, D: a layer's queries of two models, and what their MLPs read.
SHAPES = {
    "smollm2-q": (5, 112, 9, 64, 576),
    "smollm2-mlp": (5, 112, 1, 576, 576),
    "llama-3.1-8b-q": (5, 64, 32, 128, 4096),
    "llama-3.1-8b-mlp": (5, 64, 1, 4096, 4096),
}


@pytest.mark.skipif(measure.DEVICE != "cpu", reason="bench of the CPU's kernels")
@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["normalise_rows", "collapse"])
def test_capture(in_turns, op, shape, dtype_name):
    points, tokens, heads, width, features = SHAPES[shape]
    dtype, rows = getattr(torch, dtype_name), torch.arange(tokens)
    x, held = torch.randn(points, tokens, features).to(dtype), torch.empty(points, tokens, features, dtype=dtype)
    g, y = (torch.randn(points, tokens, heads, width).to(dtype) for _ in range(2))
    r, weights, out, c = (
        torch.rand(size) for size in ((points, tokens), points, (tokens, heads, width), (heads, points, tokens))
    )
    runs = {
        "normalise_rows": lambda impl: ek.normalise_rows(x, 1e-5, rows=rows, out=held, impl=impl),
        "collapse": lambda impl: ek.collapse(g, y, r, weights, out, c, features, rows=rows, impl=impl),
    }
    in_turns(
        {impl: lambda impl=impl: runs[op](impl) for impl in ("cpu", "reference")},
        lambda seconds: {"over_reference": seconds["reference"] / seconds["cpu"]},
        {"over_reference": 2.0},
    )
