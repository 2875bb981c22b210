"""Helpers for testing a backend: oracles in float64, the tolerance rule, odd inputs, the backends to test."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import eap_kernels
from eap_kernels._registry import BACKENDS

LAYOUTS = ("contiguous", "tokens_first", "reversed", "padded", "expanded")


def available_backends() -> list[str]:
    """Backends that can run here. A backend named in EAP_REQUIRE ("cpu,...") that cannot run is an error."""
    backends = eap_kernels.backends()
    for name in filter(None, os.environ.get("EAP_REQUIRE", "").split(",")):
        if name not in backends:
            raise RuntimeError(f"EAP_REQUIRE: expected one of {', '.join(backends)}, got {name!r}")
        if backends[name] is not None:
            raise RuntimeError(f"EAP_REQUIRE asks for {name}, which is not available: {backends[name]}")
    return [name for name, reason in backends.items() if reason is None]


def backends_on_devices() -> list[tuple[str, str]]:
    """(backend, device type) for every backend that can run here and every device whose tensors it takes."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [(name, d) for name in available_backends() for d in devices if BACKENDS[name].device in (None, d)]


class Oracle(NamedTuple):
    """A result in float64, and the largest sum of absolute terms of any entry: the scale of rounding.

    `eps` is that of intermediate results, where they are rounded to a lower precision than the result's.
    """

    value: Tensor
    scale: float
    eps: float = 0.0


def _oracle(value: Tensor, magnitude: Tensor) -> Oracle:
    return Oracle(value, float(magnitude.max()) if magnitude.numel() else 0.0)


def edge_scores_oracle(
    delta: Tensor, grad: Tensor, reach: Tensor, segments: Tensor | None = None, count: int | None = None
) -> Oracle:
    """Scores in float64, zero outside the staircase: [S, R], or [count, S, R] with segments; on the CPU.

    Without `count`, there are as many segments as the largest number asks for.
    """
    delta, grad, reach = delta.cpu(), grad.cpu(), reach.cpu()
    staircase = torch.arange(delta.shape[0], device="cpu")[:, None] < reach[None]
    segments_ = delta.new_zeros(delta.shape[1], dtype=torch.int64) if segments is None else segments.cpu()
    if segments is None:
        count = 1
    elif count is None:
        count = int(segments_.max()) + 1 if len(segments_) else 0
    shape = (count, delta.shape[0], grad.shape[0])

    def contract(d: Tensor, g: Tensor) -> Tensor:
        per_token = torch.einsum("snd,rnd->nsr", d.double(), g.double())
        scores = per_token.new_zeros(shape).index_add_(0, segments_, per_token) * staircase
        return scores[0] if segments is None else scores

    return _oracle(contract(delta, grad), contract(delta.abs(), grad.abs()))


def expanded(nodes: Sequence[eap_kernels.Nodes]) -> tuple[Tensor, Tensor]:
    """Residual-space rows of nodes in float64, and the sums of their absolute terms: [nodes, N, D] each."""
    rows: list[Tensor] = []
    magnitudes: list[Tensor] = []
    for group in nodes:
        parts = [None if x is None else x.cpu().double() for x in (group.values, group.weight)]
        terms = [None if x is None else x.cpu().double() for x in (group.coefficients, group.normalised)]
        for sign, found in ((1, rows), (-1, magnitudes)):
            values, weight, c, x = (y if y is None or sign == 1 else y.abs() for y in (*parts, *terms))
            assert values is not None
            y = values.transpose(0, 1)
            if weight is not None:
                y = y @ weight.repeat_interleave(len(y) // len(weight), 0)
            if c is not None and x is not None:
                y = y - sign * torch.einsum("hmn,mnd->hnd", c, x)
            found.append(y)
    return torch.cat(rows), torch.cat(magnitudes)


def head_space_scores_oracle(
    senders: Sequence[eap_kernels.Nodes], receivers: Sequence[eap_kernels.Nodes], reach: Tensor
) -> Oracle:
    """Scores in float64, zero outside the staircase: [S, R]; on the CPU."""
    (delta, large), (grad, large_grad) = expanded(senders), expanded(receivers)
    oracle = _oracle(edge_scores_oracle(delta, grad, reach).value, edge_scores_oracle(large, large_grad, reach).value)
    values = senders[0].values
    # On a GPU every backend rounds the expanded rows to the operands' dtype. Each rounds at other places, and the
    # reference's error may by chance be nearly 0. One rounding of both sides' rows costs one eps of the scale.
    return oracle._replace(eps=torch.finfo(values.dtype).eps) if values.is_cuda else oracle


def masked_read_oracle(base: Tensor, delta: Tensor, mask: Tensor) -> Oracle:
    """The read in float64: [R, N, D] or [C, R, N, D], on the CPU."""
    base, delta, mask = base.cpu(), delta.cpu(), mask.cpu()

    def read(b: Tensor, d: Tensor, m: Tensor) -> Tensor:
        return b.double() + torch.einsum("...sr,...snd->...rnd", m.double(), d.double())

    return _oracle(read(base, delta, mask), read(base.abs(), delta.abs(), mask.double().abs()))


# Of operands rounded to tf32, which has 10 bits of mantissa.
TF32_EPS = 2.0**-10


def assert_close(actual: Tensor, reference: Tensor, oracle: Oracle, eps: float | None = None) -> None:
    """The one tolerance rule: error <= 2 x (error of the reference in that dtype + eps x scale).

    `eps` is that of the result's dtype, unless operands or intermediate results are kept in lower precision.
    """
    if actual.shape != oracle.value.shape:
        raise AssertionError(f"shape: expected {list(oracle.value.shape)}, got {list(actual.shape)}")
    if actual.numel() == 0:
        return
    eps = max(oracle.eps, torch.finfo(actual.dtype).eps if eps is None else eps)
    allowed = 2 * (_error(reference, oracle) + eps * oracle.scale)
    error = _error(actual, oracle)
    if not error <= allowed:
        raise AssertionError(f"error {error:.3g} exceeds {allowed:.3g} (eps {eps:.1g}, scale {oracle.scale:.3g})")


def _error(x: Tensor, oracle: Oracle) -> float:
    return float((x.double().cpu() - oracle.value).abs().max())


# Rounding leaves differences of this size; no test here compares smaller values.
NOISE = 1e-9


def relative_error(found: Tensor, right: Tensor) -> float:
    """Relative error of a tensor in the Frobenius norm; raises AssertionError where `right` is rounding noise."""
    size = float(right.double().norm())
    if not size > NOISE:
        raise AssertionError(f"relative error: expected a norm above {NOISE:g} to compare with, got {size:.3g}")
    return float((found.double().cpu() - right.double().cpu()).norm()) / size


def random_tensor(
    shape: Sequence[int],
    dtype: torch.dtype,
    generator: torch.Generator,
    layout: str = "contiguous",
    device: str = "cpu",
) -> Tensor:
    """Normal values in [rows, N, D], laid out in memory as one of LAYOUTS says; the generator is a CPU one."""
    rows, tokens, features = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)

    if layout == "contiguous":
        return normal(rows, tokens, features)
    if layout == "tokens_first":
        return normal(tokens, rows, features).transpose(0, 1)
    if layout == "reversed":
        return normal(features, tokens, rows).permute(2, 1, 0)
    if layout == "padded":
        return normal(rows + 1, tokens + 2, 2 * features + 1)[1:, 1 : tokens + 1, : 2 * features : 2]
    if layout == "expanded":
        return normal(rows, 1, features).expand(rows, tokens, features)
    raise ValueError(f"random_tensor: expected layout to be one of {', '.join(LAYOUTS)}, got {layout!r}")
