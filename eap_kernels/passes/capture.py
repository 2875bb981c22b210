"""The public functions that take what a pass has at norms and their readers into head space; see `ops`."""

from __future__ import annotations

import sys
from numbers import Integral, Real

import torch
from torch import Tensor

from eap_kernels import _dispatch
from eap_kernels.ops import _check_floating, _check_tensor, _check_written, _fail


@_dispatch.in_memory
def normalise_rows(
    x: Tensor,
    eps: float,
    centred: bool = False,
    rows: Tensor | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Gather rows of a norm's input x, write their normalised values into `out`, and return their scale r.

    x̂ = x·r with r = 1/√(mean(x²) + eps), as in RMSNorm; x̂ = (x − mean(x))·r with r = 1/√(var(x) + eps), as in
    LayerNorm, where `centred`. Both without gain and bias. Computed in the accumulation dtype, and rounded once, to the
    dtype of `out`. Deterministic.

    Args:
        x: [M, N, D], M copies of N tokens, floating, any strides.
        eps: what is added to the mean square.
        centred: subtract the mean first.
        rows: int64 [n] on x's device, the tokens that are wanted, in 0 … N − 1; all without it. A kernel on a GPU gives
            NaN for one outside, since to refuse it the host would have to wait.
        out: [M, n, D] in any floating dtype, any strides without overlap: takes x̂. Without it only r is computed.
        impl: "auto", one kernel on a CPU, and on a GPU where it is known to be right, else the reference; or one of
            `backends()`.

    Returns:
        r [M, n], fp64 for fp64 inputs, else fp32. Not differentiable: x is detached.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has been written then.
        RuntimeError: the backend asked for is not available.
        torch.OutOfMemoryError: memory ran out.

    Example:
        >>> import torch, eap_kernels
        >>> x, out = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.empty(1, 1, 2)
        >>> eap_kernels.normalise_rows(x, 0.0, centred=True, rows=torch.tensor([1]), out=out)
        tensor([[1.]])
        >>> out
        tensor([[[-1.,  1.]]])
    """
    op = "normalise_rows"
    _check_floating(op, "x", x, "[M, N, D]")
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= eps <= sys.float_info.max:
        _fail(op, "a finite eps of at least 0", repr(eps))
    _check_flag(op, "centred", centred)
    count = _check_rows(op, rows, x)
    if out is not None:
        _check_operand(op, "out", out, (x.shape[0], count, x.shape[2]), x)
        _check_written(op, "out", out)
    _dispatch.check_impl(op, impl, x.device)
    found: Tensor = torch.ops.eap_kernels.normalise_rows.select(x.detach(), float(eps), bool(centred), rows, out, impl)
    return found


@_dispatch.in_memory
def collapse(
    gradient: Tensor,
    values: Tensor,
    r: Tensor,
    weights: Tensor,
    out: Tensor,
    coefficients: Tensor,
    features: int,
    gathered: bool = False,
    rows: Tensor | None = None,
    constant: Tensor | None = None,
    gain: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """Sum gradients at a norm's readers over path points, and take their products with what the readers give.

        out[n, h]             += Σ_m w_m r[m, n] g[m, n, h]
        coefficients[h, m, n]  = w_m r[m, n] ⟨g[m, n, h], gain ⊙ (y[m, n, h] − constant[h])⟩ / features

    They are ĝ and c of "Gradients in head space" in ARCHITECTURE.md, what `Nodes` takes as values and coefficients.
    For a projection, y is its output and `constant` the part of it that biases give. For a reader of the norm's own
    output, y is x̂ and `gain` the norm's. Deterministic.

    Args:
        gradient: g, [M, N, h, K], floating, any strides: M path points of N tokens.
        values: y, the same shape and any strides; with `gathered`, [M, n, h, K].
        r: [M, n], the norm's scale, as `normalise_rows` gives it.
        weights: [M], the points' weights w.
        out: [n, h, K], fp32 or fp64, added to in place; sums are kept in its dtype.
        coefficients: [h, M, n], overwritten, in the dtype of `out`; both with any strides without overlap.
        features: the width D of the norm.
        gathered: `values` holds the wanted tokens alone.
        rows: int64 [n] on the gradient's device, the tokens that are wanted, in 0 … N − 1; all without it. A kernel on
            a GPU gives NaN for one outside, since to refuse it the host would have to wait.
        constant: [h, K]; zero without it.
        gain: [K]; one without it.
        impl: "auto", one kernel on a CPU, and on a GPU where it is known to be right, else the reference; or one of
            `backends()`.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has been written then.
        RuntimeError: the backend asked for is not available.
        torch.OutOfMemoryError: memory ran out.

    Example:
        >>> import torch, eap_kernels
        >>> g, y = torch.ones(2, 1, 1, 3), torch.arange(3.0).expand(2, 1, 1, 3)
        >>> out, coefficients = torch.zeros(1, 1, 3), torch.empty(1, 2, 1)
        >>> weights = torch.tensor([0.25, 0.75])
        >>> eap_kernels.collapse(g, y, torch.ones(2, 1), weights, out, coefficients, features=3)
        >>> out, coefficients
        (tensor([[[1., 1., 1.]]]), tensor([[[0.2500],
                 [0.7500]]]))
    """
    op = "collapse"
    _check_floating(op, "gradient", gradient, "[M, N, h, K]")
    points, available, heads, width = gradient.shape
    count = _check_rows(op, rows, gradient)
    _check_operand(op, "values", values, (points, count if gathered else available, heads, width), gradient)
    _check_operand(op, "r", r, (points, count), gradient)
    _check_operand(op, "weights", weights, (points,), gradient)
    for name, x, shape in (("out", out, (count, heads, width)), ("coefficients", coefficients, (heads, points, count))):
        _check_operand(op, name, x, shape, gradient)
        _check_written(op, name, x)
        if x.dtype != out.dtype or x.dtype.itemsize < 4:
            _fail(op, "out and coefficients in float32, or both in float64", x.dtype, TypeError)
    if isinstance(features, bool) or not isinstance(features, Integral) or not 1 <= features < 2**63:
        _fail(op, "features to be a number from 1 to 2**63 - 1", repr(features))
    _check_flag(op, "gathered", gathered)
    if constant is not None:
        _check_operand(op, "constant", constant, (heads, width), gradient)
    if gain is not None:
        _check_operand(op, "gain", gain, (width,), gradient)
    _dispatch.check_impl(op, impl, gradient.device)
    read = (gradient.detach(), values.detach(), r.detach(), weights.detach())
    fixed = (None if x is None else x.detach() for x in (constant, gain))
    torch.ops.eap_kernels.collapse.select(*read, out, coefficients, int(features), bool(gathered), rows, *fixed, impl)


def _check_flag(op: str, name: str, value: bool) -> None:
    if value not in (True, False):
        _fail(op, f"{name} to be True or False", repr(value), TypeError)


def _check_rows(op: str, rows: Tensor | None, x: Tensor) -> int:
    """How many tokens of x [M, N, ...] are wanted."""
    if rows is None:
        return x.shape[1]
    _check_tensor(op, "rows", rows)
    if rows.dtype != torch.int64:
        _fail(op, "rows in int64", rows.dtype, TypeError)
    if rows.dim() != 1:
        _fail(op, "rows of shape [n]", list(rows.shape))
    if rows.device != x.device:
        _fail(op, f"rows on {x.device}", rows.device)
    if len(rows) and not x.shape[1]:
        _fail(op, "no rows where there are no tokens", f"{len(rows)}")
    return len(rows)


def _check_operand(op: str, name: str, x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    _check_floating(op, name, x)
    if x.shape != shape:
        _fail(op, f"{name} of shape {list(shape)}", list(x.shape))
    if x.device != like.device:
        _fail(op, f"{name} on {like.device}", x.device)
