"""Projections between the residual stream and the heads, and the order of a fused projection's features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..shapes import Shape
from .offloading import device_of, read

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Projections = dict[str, "Projection"]  # of one module, by letter: q, k, v


@dataclass(frozen=True, eq=False)
class Projection:
    """The heads' slices of a projection from the normalised residual stream.

    `rows` are the features of the module's output that belong to these heads, in head order.
    """

    module: nn.Module
    rows: slice | Tensor
    n_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return self.n_heads * self.head_dim

    def weight(self, dtype: torch.dtype, features: slice = slice(None)) -> Tensor:
        """[heads, K, D], or some of the D features."""
        return self._weight[:, features][self.rows].to(dtype).unflatten(0, (self.n_heads, -1))

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[heads, K] or None"""
        bias = read(self.module, "bias")
        return None if bias is None else bias[self.rows].to(dtype).view(self.n_heads, -1)

    @cached_property
    def _weight(self) -> Tensor:
        return linear_weight(self.module)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(features out, features in) of a linear module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear module as [out, in], without gradient.

    If the module keeps it in another form (quantised, or beside PEFT adapters), it is the module's output for unit
    vectors.
    """
    weight = read(module, "weight")
    if isinstance(module, (nn.Linear, Conv1D)) and weight is not None and _plain(weight):
        return weight.T if isinstance(module, Conv1D) else weight
    dtype = next((p.dtype for p in module.parameters() if p.dtype in _FLOATS), torch.float32)
    units = torch.eye(linear_shape(module)[1], dtype=dtype, device=device_of(module))
    with torch.no_grad():
        return (module.forward(units) - module.forward(torch.zeros_like(units[:1]))).T


def _plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter, Shape) and weight.dtype in _FLOATS


def grouped_rows(q: int, kv: int, head_dim: int) -> dict[str, Tensor]:
    """Features of "q", "k" and "v" if each key/value head comes with its query heads: int64 [heads·K] each."""
    features = torch.arange((q + 2 * kv) * head_dim).view(kv, q // kv + 2, head_dim)
    return {"q": features[:, :-2].flatten(), "k": features[:, -2].flatten(), "v": features[:, -1].flatten()}


def concatenate(projections: Projections, grouped: bool, repeat_kv: int, y: Tensor) -> Tensor:
    """A projection's output [..., features] as all of q, then k, then v; each key and value `repeat_kv` times."""
    if grouped:
        heads = y.unflatten(-1, (projections["k"].n_heads, -1, projections["k"].head_dim))
        parts = [heads[..., :-2, :].flatten(-3, -2), heads[..., -2, :], heads[..., -1, :]]
    else:
        widths = [projection.width for projection in projections.values()]
        parts = [
            part.unflatten(-1, (projection.n_heads, -1))
            for part, projection in zip(y.split(widths, -1), projections.values(), strict=True)
        ]
    letters = list(projections)
    parts = [
        part.repeat_interleave(repeat_kv, -2) if repeat_kv > 1 and letter != "q" else part
        for letter, part in zip(letters, parts, strict=True)
    ]
    return torch.cat([part.flatten(-2) for part in parts], -1)


def group(projections: Projections, repeat_kv: int, y: Tensor) -> Tensor:
    """The inverse of `concatenate` for grouped features; keys and values stay repeated."""
    kv, head_dim = projections["k"].n_heads * repeat_kv, projections["k"].head_dim
    q, k, v = y.split([projections["q"].width, kv * head_dim, kv * head_dim], -1)
    return torch.cat([x.unflatten(-1, (kv, -1)) for x in (q, k, v)], -1).flatten(-2)
