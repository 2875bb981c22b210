"""Every operator on small odd shapes, held to the tolerance rule: before a backend is timed, and under a sanitizer.

What is expected is computed on the CPU where possible, so that a device does no more than the backend itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import eap_kernels as ek
from eap_kernels import testing
from eap_kernels._schemas import accumulation_dtype

# S, R, N, D: nothing a multiple of anything; more than one tile each way, where rows start at 16 bytes; one token.
SHAPES = ((37, 21, 19, 67), (300, 270, 5, 64), (3, 1, 1, 130))
# More than 32,768 products of a pair, in several units of work.
LONG = (150, 140, 521, 64)
# Torch's dtype, and its switch for fp32 products on a GPU.
ARITHMETICS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float64": (torch.float64, "ieee"),
}


@contextlib.contextmanager
def arithmetic(name: str) -> Iterator[torch.dtype]:
    """Inside, products on a GPU are computed in one of ARITHMETICS, in operands of the dtype that it gives."""
    dtype, precision = ARITHMETICS[name]
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield dtype
    finally:
        matmul.fp32_precision = before


Shape = tuple[int, int, int, int]
Check = Callable[[str, str, Shape, str, str, torch.Generator], None]


def _eps(name: str) -> float | None:
    return testing.TF32_EPS if name == "tf32" else None


def edge_scores(impl: str, device: str, shape: Shape, name: str, layout: str, generator: torch.Generator) -> None:
    senders, receivers, tokens, width = shape
    with arithmetic(name) as dtype:
        delta, grad = (
            testing.random_tensor((rows, tokens, width), dtype, generator, layout) for rows in (senders, receivers)
        )
        on_device = delta.to(device), grad.to(device)
        reach = torch.randint(0, senders + 1, (receivers,), generator=generator)
        # Once without segments, and once with two segments out of order.
        for segments in (None, torch.arange(tokens) % 2):
            oracle = testing.edge_scores_oracle(delta, grad, reach, segments)
            reference = ek.edge_scores(delta, grad, reach, segments=segments, impl="reference")
            scores = ek.edge_scores(*on_device, reach, segments=segments, impl=impl)
            testing.assert_close(scores, reference, oracle, _eps(name))


def masked_read(impl: str, device: str, shape: Shape, name: str, layout: str, generator: torch.Generator) -> None:
    senders, receivers, tokens, width = shape
    with arithmetic(name) as dtype:
        delta = testing.random_tensor((senders, tokens, width), dtype, generator, layout)
        base = testing.random_tensor((receivers, tokens, width), dtype, generator, layout)
        draw = torch.rand(senders, receivers, generator=generator)
        for mask in (draw < 0.05, draw.to(dtype)):
            oracle = testing.masked_read_oracle(base, delta, mask)
            reference = ek.masked_read(base, delta, mask, impl="reference")
            read = ek.masked_read(base.to(device), delta.to(device), mask.to(device), impl=impl)
            testing.assert_close(read, reference, oracle, _eps(name))
            # Its gradients are operators that are held to the rule by themselves; here they need only run.
            base_, delta_, mask_ = (x.to(device, dtype).detach().requires_grad_() for x in (base, delta, mask))
            ek.masked_read(base_, delta_, mask_, impl=impl).sum().backward()


def head_space_scores(impl: str, device: str, shape: Shape, name: str, layout: str, generator: torch.Generator) -> None:
    """Senders: residual rows, and two heads per weight. Receivers: heads with the norm's second term."""
    _, _, tokens, width = shape
    with arithmetic(name) as dtype:

        def normal(*size: int) -> Tensor:
            return testing.random_tensor(size, dtype, generator, layout, device)

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
        found = ek.head_space_scores(*given, impl=impl, workspace=5000)
        testing.assert_close(found, reference, oracle, _eps(name))


def normalise_rows(impl: str, device: str, shape: Shape, name: str, layout: str, generator: torch.Generator) -> None:
    points, _, tokens, width = shape
    with arithmetic(name) as dtype:
        x = testing.random_tensor((points, tokens, width), dtype, generator, layout)
        for rows in (None, torch.randint(0, tokens, (3,), generator=generator)):
            found = []
            for values, where, by in ((x.double(), "cpu", "reference"), (x, "cpu", "reference"), (x, device, impl)):
                out = torch.full((points, tokens if rows is None else 3, width), torch.nan, dtype=values.dtype)
                out = out.to(where)
                chosen = None if rows is None else rows.to(where)
                found.append((ek.normalise_rows(values.to(where), 1e-5, True, chosen, out, by), out))
            (r, y), reference, actual = found
            oracles = testing.Oracle(r, float(r.max())), testing.Oracle(y, 2 * float(x.abs().max()) * float(r.max()))
            for each, right, oracle in zip(actual, reference, oracles, strict=True):
                testing.assert_close(each, right, oracle)


def collapse(impl: str, device: str, shape: Shape, name: str, layout: str, generator: torch.Generator) -> None:
    points, _, tokens, width = shape
    with arithmetic(name) as dtype:
        g, y = (testing.random_tensor((points, tokens, width), dtype, generator, layout) for _ in range(2))
        for rows in (None, torch.randint(0, tokens, (3,), generator=generator)):
            count = tokens if rows is None else 3
            r, weights = (
                torch.rand(size, generator=generator).to(accumulation_dtype(dtype))
                for size in ((points, count), (points,))
            )
            given = g, y, r, weights
            double = [z.double() for z in given]
            value, scale = (_collapse("reference", "cpu", rows, *z) for z in (double, [z.abs() for z in double]))
            expected, found = (_collapse(*by, rows, *given) for by in (("reference", "cpu"), (impl, device)))
            for actual, reference, right, size in zip(found, expected, value, scale, strict=True):
                testing.assert_close(actual, reference, testing.Oracle(right, float(size.max())))


def _collapse(impl: str, device: str, rows: Tensor | None, *operands: Tensor) -> tuple[Tensor, Tensor]:
    g, y, r, weights = (z.to(device) for z in operands)
    (points, _, width), count = g.shape, r.shape[1]
    out = torch.zeros(count, 1, width, dtype=r.dtype).to(device)
    along = torch.full((1, points, count), torch.nan, dtype=r.dtype).to(device)
    rows = None if rows is None else rows.to(device)
    ek.collapse(g.unsqueeze(2), y.unsqueeze(2), r, weights, out, along, width, rows=rows, impl=impl)
    return out, along


CHECKS: dict[str, Check] = {
    "edge_scores": edge_scores,
    "masked_read": masked_read,
    "head_space_scores": head_space_scores,
    "normalise_rows": normalise_rows,
    "collapse": collapse,
}
