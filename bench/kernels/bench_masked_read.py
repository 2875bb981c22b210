"""masked_read by share of edges kept, against the einsum that it replaces and against its floor: the larger of its
useful operations over the machine's matrix rate, and its bytes over the machine's bandwidth. docs/ops/masked_read.md
shows the results.
"""

import pytest
import torch

import eap_kernels as ek
from bench import measure
from bench.kernels import shapes
from eap_kernels import testing

pytestmark = pytest.mark.benchmark(group="masked_read")
DENSITIES = (0.01, 0.1, 0.5, 1.0)


def masks(model, receivers):
    """{density: bool [S, R]}, a random choice of the edges that receivers can see."""
    reach = model.reach[-1 - receivers : -1] if receivers == model.layer_receivers else model.reach
    staircase = torch.arange(model.senders)[:, None] < reach
    draw = torch.rand(staircase.shape)
    return {density: ((draw < density) & staircase).to(measure.DEVICE) for density in DENSITIES}


def check(base, delta, mask):
    """Compare every backend with the float64 oracle on the first two tokens; tokens are independent of each other."""
    base, delta = base[:2], delta[:, :2]
    oracle = testing.masked_read_oracle(base, delta, mask)
    reference = ek.masked_read(base, delta, mask, impl="reference")
    for impl in shapes.IMPLS:
        testing.assert_close(ek.masked_read(base, delta, mask, impl=impl), reference, oracle, shapes.eps(delta.dtype))


@pytest.mark.parametrize("receivers", ["layer", "all"])
@pytest.mark.parametrize(("name", "dtype_name"), shapes.CASES)
def test_masked_read(in_turns, name, dtype_name, receivers):
    model, dtype = shapes.MODELS[name], shapes.DTYPES[dtype_name]
    count = model.layer_receivers if receivers == "layer" else model.receivers
    tokens = shapes.tokens_for(model.senders + count, model.width, dtype)
    delta = shapes.normal(model.senders, tokens, model.width, dtype)
    base = shapes.normal(1, tokens, model.width, dtype)[0]
    kept = masks(model, count)
    for mask in kept.values():
        check(base, delta, mask)
    soft = kept[1.0].to(dtype)
    runs = {
        f"{impl}@{density}": lambda impl=impl, mask=mask: ek.masked_read(base, delta, mask, impl=impl)
        for density, mask in kept.items()
        for impl in shapes.IMPLS
    }
    runs["einsum"] = lambda: base + torch.einsum("sr,snd->rnd", soft, delta)
    row = tokens * model.width * dtype.itemsize
    runs["matmul"], matmul_flops = measure.matmul(dtype)
    runs["copy"], copied = measure.copy(row * (model.senders + count))
    work = {
        density: (
            2.0 * int(mask.sum()) * tokens * model.width,
            row * (int(mask.any(1).sum()) + 1 + count),  # senders read, the base, the reads written
        )
        for density, mask in kept.items()
    }

    def ratios(seconds):
        found = {}
        for density, (flops, size) in work.items():
            floor = max(flops / (matmul_flops / seconds["matmul"]), size / (copied / seconds["copy"]))
            auto = shapes.auto(seconds, f"@{density}")
            found[f"of_floor@{density}"] = floor / auto
            found[f"over_einsum@{density}"] = seconds["einsum"] / auto
            found[f"auto_over_best@{density}"] = min(1.0, shapes.best(seconds, f"@{density}") / auto)
        return found | {"sparse_over_dense": shapes.auto(seconds, "@1.0") / shapes.auto(seconds, "@0.01")}

    # A GPU's matrix units make dense reads nearly as fast, and small ones wait for launches.
    least = (1.2, 0.9) if measure.DEVICE == "cuda" else (5.0, 2.0)
    bars = dict(zip(("sparse_over_dense", "over_einsum@0.01"), least, strict=True)) if receivers == "layer" else {}
    facts = {"model": name, "dtype": dtype_name, "receivers": receivers, "tokens": tokens}
    facts["kept"] = {density: int(mask.sum()) / mask.numel() for density, mask in kept.items()}
    in_turns(runs, ratios, bars, **facts)
