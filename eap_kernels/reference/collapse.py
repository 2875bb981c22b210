"""Gradients in head space, summed over path points, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def collapse(
    gradient: Tensor,
    values: Tensor,
    r: Tensor,
    weights: Tensor,
    out: Tensor,
    coefficients: Tensor,
    features: int,
    gathered: bool,
    rows: Tensor | None,
    constant: Tensor | None,
    gain: Tensor | None,
) -> None:
    """out += sum_m w_m r_m g_m and coefficients[h, m, n] = w r <g, gain * (y - constant)> / features, in place.

    gradient g [M, N, h, K] is read at rows [n]; so is values y, unless it is `gathered`: [M, n, h, K]. r [M, n],
    weights [M], out [n, h, K], coefficients [h, M, n], constant [h, K], gain [K]. Sums are kept in out's dtype.
    """

    def at_rows(x: Tensor) -> Tensor:
        return (x if rows is None else x[:, rows]).to(out.dtype)

    scaled = at_rows(gradient) * (r.to(out.dtype) * weights[:, None])[..., None, None]
    y = values if gathered else at_rows(values)
    products = scaled * (y if constant is None else y - constant.to(out.dtype))
    if gain is not None:
        products = products * gain
    out += scaled.sum(0)
    coefficients.copy_(products.sum(-1).permute(2, 0, 1) / features)
