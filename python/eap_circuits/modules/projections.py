"""Projections between the residual stream and the heads, and the order of a fused projection's features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .offloading import device_of, forward_of, is_offloaded, read, read_part
from .parts import FLOATS, by_features, in_turn, is_divided, is_shard, own_features, own_part
from .shapes import Shape

# Of a fused projection's features: "concatenated": all of q, then k, then v; "grouped": for each key/value head its
# query heads, its key and its value; "sharded": in each of four equal parts, queries, then values, then keys.
Order = Literal["concatenated", "grouped", "sharded"]
_SHARDS = 4
_TRIED = 8  # random inputs
Projections = dict[str, "Projection"]  # by name: usually q, k and v


@dataclass(frozen=True, eq=False)
class Weight:
    """The weight [out, in] of a linear module that reads or writes the residual stream, whose features are in `dim`."""

    module: nn.Module
    dim: int

    def at(self, features: slice = slice(None)) -> Tensor:
        """All of it, or at some of the stream's features: of a tensor parallel module, some of its `own_features`.

        One that is not at hand is made at each use and never kept: those of all layers are a third of a model.
        """
        if features == slice(None):
            return linear_weight(self.module)
        own = own_features(self.module, linear_shape(self.module)[self.dim])
        if own == slice(None) and not is_at_hand(self.module):
            return linear_part(self.module, self.dim, features)
        if own != slice(None) and is_divided(self.module, 1 - self.dim):
            return by_features(self.module, self.dim, features)
        return linear_weight(self.module).narrow(self.dim, features.start, features.stop - features.start)

    def in_turn(self) -> Iterator[tuple[slice, Tensor]]:
        """(Which of the heads' features, the weight there): all at once, or of a tensor parallel module one rank's
        after another's."""
        if is_divided(self.module, 1 - self.dim):
            return in_turn(self.module, 1 - self.dim)
        return iter([(slice(0, linear_shape(self.module)[1 - self.dim]), linear_weight(self.module))])


@dataclass(frozen=True, eq=False)
class Projection:
    """The heads' slices of a projection from the normalised residual stream.

    `rows` are the features of the module's output that belong to these heads, in head order; `sent` holds them on
    devices, by their number too, for all projections that begin with the same rows. The module reads `factor` times
    what the norm gives.
    """

    module: nn.Module
    rows: slice | Tensor
    n_heads: int
    head_dim: int
    sent: dict[tuple[torch.device, int], Tensor] = field(default_factory=dict, repr=False)
    factor: float = 1.0

    @property
    def width(self) -> int:
        return self.n_heads * self.head_dim

    def weight(self, dtype: torch.dtype, features: slice = slice(None)) -> Tensor:
        """[heads, K, D], or some of the D features."""
        return self._by_head(self._picked(self._weight.at(features)), dtype)

    def of_heads(self, heads: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """`weight` and `bias` of some heads. A weight that a tensor parallel module has on this rank is not sent."""
        own, bias = None, self.bias(dtype)
        if isinstance(self.rows, slice):
            first, last = (self.rows.start + head * self.head_dim for head in (heads.start, heads.stop))
            own = own_part(self.module, 0, slice(first, last))
        weight = self.weight(dtype)[heads] if own is None else self._by_head(own, dtype)
        return weight, None if bias is None else bias[heads]

    def _by_head(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        weight = weight.to(dtype).unflatten(0, (-1, self.head_dim))
        return weight if self.factor == 1 else weight * self.factor

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[heads, K] or None"""
        bias = linear_bias(self.module)
        return None if bias is None else self._picked(bias).to(dtype).view(self.n_heads, -1)

    def _picked(self, x: Tensor) -> Tensor:
        """The heads' rows of x [features, ...]; an index that is sent at each use is a wait for the device."""
        if isinstance(self.rows, slice):
            return x[self.rows]
        key = x.device, len(self.rows)
        if key not in self.sent:
            self.sent[key] = self.rows.to(x.device)
        return x[self.sent[key]]

    @cached_property
    def _weight(self) -> Weight:
        return Weight(self.module, 1)


def joined(projections: Sequence[Projection]) -> Projection:
    """Projections of one module with heads of one width, one after another, as one."""
    first, rows = projections[0], projections[0].rows
    for each in projections[1:]:
        if isinstance(rows, slice) and isinstance(each.rows, slice) and rows.stop == each.rows.start:
            rows = slice(rows.start, each.rows.stop)
        else:
            rows = torch.cat([_numbers(rows), _numbers(each.rows)])
    heads = sum(each.n_heads for each in projections)
    return Projection(first.module, rows, heads, first.head_dim, first.sent, first.factor)


def _numbers(rows: slice | Tensor) -> Tensor:
    return torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


class Together(nn.Module):
    """Modules that read the same, in the order in which they run; what they give counts as the sum of it."""

    parts: tuple[nn.Module, ...]

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.__dict__["parts"] = tuple(modules)  # not children: see `Place`


class Place(nn.Module):
    """The identity that stands where a module reads, or where it writes: for a mixer that is taken as a whole.

    Hooks on its input or output (`forward/hooks.py`) are called there. It runs nothing, and is no part of the model.
    """

    at: nn.Module

    def __init__(self, module: nn.Module, reads: bool, width: int, read: int | None = None) -> None:
        super().__init__()
        self.__dict__["at"] = module  # not a child, so that its weights stay the model's
        self.reads = reads
        self.in_features, self.out_features = width if read is None else read, width
        self.bias = None


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(features out, features in) of a linear module."""
    if isinstance(module, Conv1D):  # to look at a weight may change it: a spectral norm's, in training
        return module.nf, module.nx
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def feature_dim(module: nn.Module, out: bool) -> int:
    """In which dimension of its own weight a linear module has its features: those that come out, or that go in."""
    return int(isinstance(module, Conv1D) == out)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear module as [out, in], without gradient.

    If the module keeps it in another form (quantised, sparse, beside adapters, or with a forward of its own), it is
    what the module gives for unit vectors.
    """
    if isinstance(module, Place):
        like = next((p for p in module.at.parameters() if p.dtype in FLOATS), torch.empty(0))
        return torch.eye(module.in_features, dtype=like.dtype, device=device_of(module.at))
    weight = read(module, "weight")
    if weight is not None and _is_linear(module) and is_plain(weight):
        return weight.T if isinstance(module, Conv1D) else weight
    return _of_units(module, slice(None))


def linear_bias(module: nn.Module) -> Tensor | None:
    """What a linear module adds, [out], without gradient: its output for zeros if it is made of others."""
    if _is_linear(module) or isinstance(module, Place):
        return read(module, "bias")
    return _forward(module, slice(0, 0))[0]


def linear_part(module: nn.Module, dim: int, features: slice) -> Tensor:
    """`linear_weight` at some features of a dimension, of which no more is fetched or kept."""
    own: Any = getattr(module, "weight", None)
    if _is_linear(module) and is_offloaded(module) and is_plain(own):
        turned = isinstance(module, Conv1D)
        weight = read_part(module, "weight", 1 - dim if turned else dim, features)
        return weight.T if turned else weight
    if dim and not isinstance(module, Place):
        return _of_units(module, features)
    return linear_weight(module).narrow(dim, features.start, features.stop - features.start).clone()


def _of_units(module: nn.Module, features: slice) -> Tensor:
    """What a linear module gives for unit vectors, its weight [out, features in]."""
    given = _forward(module, features)
    return (given[1:] - given[:1]).T


def _forward(module: nn.Module, features: slice) -> Tensor:
    """What a linear module gives for zeros, and for unit vectors, [1 + features, out]."""
    units = _for(module, torch.eye(linear_shape(module)[1], dtype=torch.float32)[features])
    with torch.no_grad():
        found: Tensor = module.forward(torch.cat([units.new_zeros(1, units.shape[1]), units]))
    return found


def _for(module: nn.Module, x: Tensor) -> Tensor:
    """x as a linear module takes it: where nothing in it says in which dtype, in the first one in which it runs."""
    x = x.to(device_of(module))
    held = next((p.dtype for p in chain(module.parameters(), module.buffers()) if p.dtype in FLOATS), None)
    for dtype in () if held else (torch.float32, *FLOATS):
        with suppress(RuntimeError), torch.no_grad():
            module.forward(x[:1].to(dtype))
            return x.to(dtype)
    return x.to(held or torch.float32)


def nonlinearity(module: nn.Module) -> tuple[float, float]:
    """How far a module that is not read by its weight alone is from a linear map and a constant, relative to it, for a
    few random inputs: in what it gives, and in the gradients that it passes on, if any."""
    if isinstance(module, Place) or (_is_linear(module) and is_plain(getattr(module, "weight", None))):
        return 0.0, 0.0

    def apart(found: Tensor, right: Tensor) -> float:
        return float((found - right).norm() / right.norm().clamp(min=1e-30))

    generator = torch.Generator().manual_seed(0)
    x = _for(module, torch.randn(_TRIED, linear_shape(module)[1], generator=generator, dtype=torch.float32))
    sums = x + x.roll(1, 0)
    with torch.enable_grad():
        given = torch.cat([x[:1] * 0, x, sums]).requires_grad_()
        y = module.forward(given)
        # In double, so that only the module rounds.
        zero, each, together = y.detach().double().split([1, _TRIED, _TRIED])
        moved = each - zero
        value = apart(together - zero, moved + moved.roll(1, 0))
        if not y.requires_grad:
            return value, 0.0
        g = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y)
        slope: Tensor | None = None
        with suppress(NotImplementedError):
            (slope,) = torch.autograd.grad(y, given, g, allow_unused=True)
    if slope is None:  # there is none to be wrong: circuits run without
        return value, 0.0
    of_x = slice(1, 1 + _TRIED)
    return value, apart(slope[of_x].double() @ x.double().T, g[of_x].double() @ moved.T)


def is_at_hand(module: nn.Module) -> bool:
    """Is `linear_weight` the module's own tensor, or put together from all ranks' parts?"""
    weight = getattr(module, "weight", None)
    return _is_linear(module) and not is_offloaded(module) and (is_shard(weight) or is_plain(weight))


def _is_linear(module: nn.Module) -> bool:
    """Does it compute as linear layers do? A class made from theirs may do something else with its weight, and so may
    what was put in the place of its forward."""
    return forward_of(module) in (nn.Linear.forward, Conv1D.forward)


def is_plain(weight: object) -> bool:
    """Is it a tensor whose numbers are there to be read, rather than quantised, sparse or a part of one?"""
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter, Shape):
        return False
    return weight.layout == torch.strided and weight.dtype in FLOATS


def rows_of(order: Order, q: int, kv: int, head_dim: int) -> dict[str, slice | Tensor]:
    """Features of "q", "k" and "v" in a fused projection of q query heads and kv key/value heads."""
    if order == "concatenated":
        starts = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}
        return {name: slice(at * head_dim, (at + n) * head_dim) for name, (at, n) in starts.items()}
    features = torch.arange((q + 2 * kv) * head_dim)
    if order == "grouped":
        features = features.view(kv, q // kv + 2, head_dim)
        parts = {"q": features[:, :-2], "k": features[:, -2], "v": features[:, -1]}
    else:
        parts = dict(zip("qvk", features.view(_SHARDS, 3, -1).unbind(1), strict=True))
    return {name: part.flatten() for name, part in parts.items()}


def concatenate(projections: Projections, order: Order, repeat_kv: int, y: Tensor) -> Tensor:
    """A projection's output [..., features] as all of q, then k, then v; each key and value `repeat_kv` times."""
    if order == "grouped":
        heads = y.unflatten(-1, (projections["k"].n_heads, -1, projections["k"].head_dim))
        parts = [heads[..., :-2, :].flatten(-3, -2), heads[..., -2, :], heads[..., -1, :]]
    elif order == "sharded":
        shards = y.unflatten(-1, (_SHARDS, 3, -1))
        parts = [
            shards[..., at, :].flatten(-2).unflatten(-1, (p.n_heads, -1))
            for at, p in zip((0, 2, 1), projections.values(), strict=True)
        ]
    else:
        widths = [projection.width for projection in projections.values()]
        parts = [
            part.unflatten(-1, (projection.n_heads, -1))
            for part, projection in zip(y.split(widths, -1), projections.values(), strict=True)
        ]
    parts = [
        part.repeat_interleave(repeat_kv, -2) if repeat_kv > 1 and name in ("k", "v") else part
        for name, part in zip(projections, parts, strict=True)
    ]
    return torch.cat([part.flatten(-2) for part in parts], -1)


def restore(projections: Projections, order: Order, repeat_kv: int, y: Tensor) -> Tensor:
    """The inverse of `concatenate` for other orders; keys and values stay repeated."""
    kv, head_dim = projections["k"].n_heads * repeat_kv, projections["k"].head_dim
    q, k, v = y.split([projections["q"].width, kv * head_dim, kv * head_dim], -1)
    if order == "sharded":
        return torch.stack([x.unflatten(-1, (_SHARDS, -1)) for x in (q, v, k)], -2).flatten(-3)
    return torch.cat([x.unflatten(-1, (kv, -1)) for x in (q, k, v)], -1).flatten(-2)
