"""Every operator on small odd shapes by the named backends, for compute-sanitizer in `make gpu`.

Expected results are computed on the CPU where possible, so that the sanitizer has less to check.

python bench/sanitize.py triton cuda
python bench/sanitize.py triton --few    # the first shape in the first layout
"""

from __future__ import annotations

import os
import sys

# Out-of-bounds accesses show only if each tensor is its own allocation. Torch reads this when it is loaded.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

import eap_kernels as ek
from eap_kernels import testing
from eap_kernels._registry import BACKENDS

# S, R, N, D: nothing a multiple of anything; more than one tile each way, where rows start at 16 bytes; one token.
SHAPES = ((37, 21, 19, 67), (150, 140, 5, 64), (3, 1, 1, 130))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LAYOUTS = ("contiguous", "tokens_first")


def edge_scores(impl, device, shape, dtype, layout, generator):
    senders, receivers, tokens, width = shape
    delta, grad = (
        testing.random_tensor((rows, tokens, width), dtype, generator, layout) for rows in (senders, receivers)
    )
    on_device = delta.to(device), grad.to(device)
    reach = torch.randint(0, senders + 1, (receivers,), generator=generator)
    # Once without segments, and once with two segments out of order.
    for segments in (None, torch.arange(tokens) % 2):
        count = None if segments is None else int(segments.max()) + 1
        oracle = testing.edge_scores_oracle(delta, grad, reach, segments, count)
        reference = ek.edge_scores(delta, grad, reach, segments=segments, impl="reference")
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            torch.backends.cuda.matmul.fp32_precision = precision
            scores = ek.edge_scores(*on_device, reach, segments=segments, impl=impl)
            testing.assert_close(scores, reference, oracle, testing.TF32_EPS if precision == "tf32" else None)
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def masked_read(impl, device, shape, dtype, layout, generator):
    senders, receivers, tokens, width = shape
    delta = testing.random_tensor((senders, tokens, width), dtype, generator, layout)
    base = testing.random_tensor((receivers, tokens, width), dtype, generator, layout)
    draw = torch.rand(senders, receivers, generator=generator)
    for mask in (draw < 0.05, draw.to(dtype)):
        oracle = testing.masked_read_oracle(base, delta, mask)
        reference = ek.masked_read(base, delta, mask, impl="reference")
        read = ek.masked_read(base.to(device), delta.to(device), mask.to(device), impl=impl)
        testing.assert_close(read, reference, oracle)
        inputs = [x.to(device, dtype).detach().requires_grad_() for x in (base, delta, mask)]
        ek.masked_read(*inputs, impl=impl).sum().backward()


def head_space_scores(impl, device, shape, dtype, layout, generator):
    """Senders: residual rows, and two heads per weight. Receivers: heads with the norm's second term."""
    _, _, tokens, width = shape

    def normal(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    normalised = normal(3, tokens, width)
    senders = [
        ek.Nodes(normal(tokens, 1, width)),
        ek.Nodes(normal(tokens, 6, 9), normal(3, 9, width)),
    ]
    receivers = [
        ek.Nodes(normal(tokens, 4, 7), normal(4, 7, width), normal(4, 3, tokens), normalised),
        ek.Nodes(normal(tokens, 1, width), None, normal(1, 3, tokens), normalised),
    ]
    given = senders, receivers, torch.tensor([1, 1, 5, 7, 7])
    oracle = testing.head_space_scores_oracle(*given)
    reference = ek.head_space_scores(*given, impl="reference")
    testing.assert_close(ek.head_space_scores(*given, impl=impl, workspace=5000), reference, oracle)


def capture(impl, device, shape, dtype, layout, generator):
    """normalise_rows and collapse, with rows gathered and without."""
    points, _, tokens, width = shape
    x, g = (testing.random_tensor((points, tokens, width), dtype, generator, layout) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for rows in (None, torch.randint(0, tokens, (3,), generator=generator)):
        count = tokens if rows is None else len(rows)
        results = []
        for where, name in (("cpu", "reference"), (device, impl)):
            chosen = None if rows is None else rows.to(where)
            normalised = torch.full((points, count, width), torch.nan, dtype=dtype, device=where)
            r = ek.normalise_rows(x.to(where), 1e-5, True, chosen, normalised, name)
            out = torch.zeros(count, 1, width, dtype=wide, device=where)
            along = torch.full((1, points, count), torch.nan, dtype=wide, device=where)
            weights = torch.ones(points, dtype=wide, device=where)
            four = (y.to(where).unsqueeze(2) for y in (g, x))
            ek.collapse(*four, r, weights, out, along, width, rows=chosen, impl=name)
            results.append([y.cpu().to(wide) for y in (r, normalised, out, along)])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


OPERATORS = (edge_scores, masked_read, head_space_scores, capture)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    few = "--few" in sys.argv
    runs = 0
    for impl in (word for word in sys.argv[1:] if word != "--few"):
        reason = ek.backends()[impl]
        if reason is not None:
            sys.exit(f"{impl}: {reason}")
        for operator in OPERATORS:
            for shape in SHAPES[:1] if few else SHAPES:
                for dtype in DTYPES:
                    for layout in LAYOUTS[:1] if few else LAYOUTS:
                        operator(impl, BACKENDS[impl].device or "cpu", shape, dtype, layout, generator)
                        runs += 1
            print(f"{impl} {operator.__name__}: {runs} runs", flush=True)


if __name__ == "__main__":
    main()
