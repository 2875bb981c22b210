"""edge_scores over the models' whole staircases, against what published code runs, one dense product, a compiled
formula, and the machine's own matrix rate. docs/ops/edge_scores.md shows the results.

In a call every peer covers the whole staircase once. Published code makes one call for each step of integrated
gradients; `edge_scores` is called once, after its steps are summed. So with five steps the ratio is five times that of
one call.
"""

import pytest
import torch

import eap_kernels as ek
from bench import measure
from bench.kernels import shapes
from eap_kernels import testing
from eap_kernels._auto import FEW_RECEIVERS

pytestmark = pytest.mark.benchmark(group="edge_scores")
STEPS = 5
SAMPLED = 24


def sampled_oracle(d, g, seen):
    """testing.edge_scores_oracle computed on the device, because a CPU takes seconds for 2,048 tokens."""
    seen = (torch.arange(len(d), device=d.device)[:, None] < seen.to(d.device)).double()
    value, size = (torch.einsum("snd,rnd->sr", a.double(), b.double()) for a, b in ((d, g), (d.abs(), g.abs())))
    return testing.Oracle((value * seen).cpu(), float(size.max()))


def check(delta, grad, reach, impls):
    """Compare with the float64 oracle at the measured size: the outermost rows and columns, and a random sample."""
    rows, columns = (
        torch.cat([torch.tensor([0, n - 1]), torch.randperm(n)[:SAMPLED]]).unique() for n in (len(delta), len(grad))
    )
    seen = (rows[:, None] < reach[columns]).sum(0)
    d, g = delta[rows.to(delta.device)], grad[columns.to(grad.device)]
    reference, oracle = ek.edge_scores(d, g, seen, impl="reference"), sampled_oracle(d, g, seen)
    staircase = torch.arange(len(delta))[:, None] < reach
    for impl in impls:
        out = torch.full((len(delta), len(grad)), torch.nan, device=delta.device)
        out[staircase.to(out.device)] = 0
        ek.edge_scores(delta, grad, reach, out, impl=impl)
        assert torch.equal(out.isnan().cpu(), ~staircase), "only the staircase may be written, and all of it"
        found = out[rows.to(out.device)][:, columns.to(out.device)].nan_to_num(0.0)
        testing.assert_close(found, reference, oracle, shapes.eps(delta.dtype))


def peers(delta, grad, model, out):
    """Published code: an einsum for each q, k, v and m of a layer and the logits, on [B, T, S, D] buffers."""
    forward = delta.transpose(0, 1).unflatten(0, (2, -1))
    parts, column = [], 0
    for reach, count in model.groups():
        columns = slice(column, column + count)
        backward = grad[columns].transpose(0, 1).unflatten(0, (2, -1)).contiguous()
        parts.append((forward[:, :, :reach], backward, out[:reach, columns]))
        column += count

    def run():
        # batch pos forward hidden, batch pos backward hidden -> forward backward
        for forward_, backward, scores in parts:
            scores += torch.einsum("bpfh,bprh->fr", forward_, backward)

    return run


def dense(delta, grad):
    """The whole rectangle as one matrix product, or as a sum of eight if that is faster."""
    d, g = delta.flatten(1), grad.flatten(1).T
    d8, g8 = d.unflatten(1, (8, -1)).transpose(0, 1), g.unflatten(0, (8, -1))
    runs = {"one": lambda: d @ g, "eight": lambda: torch.bmm(d8, g8).sum(0)}
    times = measure.in_turns(runs, rounds=1)
    return runs[min(times, key=times.get)]


def compiled(delta, grad, reach):
    """torch.compile of the formula and None, or why it failed.

    The formula is one masked einsum. The reference itself unrolls into a product for each block of the staircase, which
    took five minutes to compile for gpt2 and does not end for larger models.
    """
    staircase = (torch.arange(len(delta))[:, None] < reach).to(delta.device)

    def formula(d, g):
        return torch.where(staircase, torch.einsum("snd,rnd->sr", d, g), 0)

    torch._dynamo.reset()
    run = torch.compile(formula, dynamic=False)
    try:
        run(delta, grad)
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return lambda: run(delta, grad), None


def operands(model, dtype, layout, receivers=None):
    dtype = shapes.DTYPES[dtype]
    reach = model.reach if receivers is None else torch.full((receivers,), model.senders)
    tokens = shapes.tokens_for(model.senders + len(reach), model.width, dtype)
    delta, grad = (shapes.normal(n, tokens, model.width, dtype, layout) for n in (model.senders, len(reach)))
    check(delta, grad, reach, shapes.IMPLS)
    out = torch.zeros(len(delta), len(grad), device=delta.device)
    runs = {impl: lambda impl=impl: ek.edge_scores(delta, grad, reach, out, impl=impl) for impl in shapes.IMPLS}
    return delta, grad, reach, out, runs


def over_best(seconds):
    """The fastest backend's time over that of `auto`."""
    return min(1.0, shapes.best(seconds) / shapes.auto(seconds))


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize(("name", "dtype"), shapes.CASES)
def test_edge_scores(in_turns, pytestconfig, name, dtype, layout):
    """Peers keep tokens first, so they run in that layout; a dense product needs each sender's values in one piece."""
    model, missing = shapes.MODELS[name], None
    delta, grad, reach, out, runs = operands(model, dtype, layout)
    if layout == "tokens_first":
        runs["peers"] = peers(delta, grad, model, torch.zeros_like(out))
    else:
        runs["dense"] = dense(delta, grad)
        if not pytestconfig.getoption("--without-compiled"):
            runs["compiled"], missing = compiled(delta, grad, reach)
    runs = {name: run for name, run in runs.items() if run}
    runs["matmul"], matmul_flops = measure.matmul(delta.dtype)
    size = (delta.numel() + grad.numel()) * delta.element_size()
    runs["copy"], copied = measure.copy(size)
    others = [name for name in ("peers", "dense", "compiled") if name in runs]
    tokens = delta.shape[1]

    def ratios(seconds):
        least = model.flops(tokens) / (matmul_flops / seconds["matmul"])
        found = {f"{impl}_of_matrix_rate": least / seconds[impl] for impl in shapes.BACKENDS}
        auto = shapes.auto(seconds)
        found |= {"auto_of_matrix_rate": least / auto}
        found["auto_of_floor"] = max(least, size / (copied / seconds["copy"])) / auto
        found |= {f"over_{name}": seconds[name] / auto for name in others}
        if "peers" in others:
            found["over_peers_five_steps"] = STEPS * found["over_peers"]
        return found | {"auto_over_best": over_best(seconds)}

    bars = {"over_peers": 1.5} if "peers" in others else {"over_dense": 0.8}
    facts = {"model": name, "dtype": dtype, "layout": layout, "receivers": len(grad), "tokens": tokens}
    facts["not_compiled"] = missing
    in_turns(runs, ratios, bars, **facts)


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
@pytest.mark.parametrize("dtype", shapes.DTYPES)
@pytest.mark.parametrize("receivers", FEW_RECEIVERS)
def test_edge_scores_of_few_receivers(in_turns, receivers, dtype, layout):
    """One gradient, one group and one layer of gpt2, for which `auto` has to choose differently."""
    *_, runs = operands(shapes.MODELS["gpt2"], dtype, layout, receivers)
    in_turns(
        runs,
        lambda seconds: {
            "over_reference": seconds["reference"] / shapes.auto(seconds),
            "auto_over_best": over_best(seconds),
        },
        {"auto_over_best": 0.7},
        timing={"budget": 1.0},
        **{"dtype": dtype, "layout": layout, "receivers": receivers},
    )
