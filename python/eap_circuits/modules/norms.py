"""Norms between the residual stream and its readers or writers, told apart by what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from eap_kernels import normalise_rows

from ..errors import InputError, expected
from .offloading import device_of, forward_of, read
from .parts import is_shard

_EPS = ("eps", "variance_epsilon", "epsilon")
_USUAL_EPS = (1e-5, 1e-6, 1e-8, 1e-12)


@dataclass(frozen=True)
class Kind:
    """y = γ ⊙ x̂ + β, with x̂ = x·r, or (x − mean)·r where `centred`, and γ = weight + offset."""

    centred: bool
    offset: float
    eps: float


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of the residual stream; if `kind` is None there is no norm, and `module` reads the stream itself.

    One without parameters (OLMo's) computes where its `layer` does, or the last layer. Where layers have scaled the
    stream, the module reads `unit` times what all else here calls its input x: the stream as if it was never scaled.
    """

    module: nn.Module
    kind: Kind | None
    layer: nn.Module | None = None
    unit: float = 1.0

    @cached_property
    def device(self) -> torch.device:
        """The device on which it computes."""
        return device_of(self.module, *([] if self.layer is None else [self.layer]))

    def gain(self, like: Tensor) -> Tensor | float:
        """γ, [D], in the dtype of `like`; 1 if there is none."""
        weight = read(self.module, "weight") if self.kind else None
        if self.kind is None or weight is None:
            return 1.0
        return weight.to(like.dtype) + self.kind.offset if self.kind.offset else weight.to(like.dtype)

    @property
    def bias(self) -> Tensor | None:
        """β, [D], or None."""
        return read(self.module, "bias") if self.kind else None

    def scale(self, x: Tensor) -> Tensor:
        """r of x [..., N, D], 1/rms or 1/std, [..., N] in fp32, or fp64; in one launch where no gradient is wanted."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.kind is None:
            return x.new_ones(x.shape[:-1], dtype=wide)
        if x.requires_grad and torch.is_grad_enabled():
            return torch.rsqrt(self._centre(x.to(wide)).square().mean(-1) + self._eps)
        rows = x.reshape(-1, *x.shape[-2:])
        return normalise_rows(rows, self._eps, self.kind.centred).view(x.shape[:-1])

    def capture(self, x: Tensor, rows: Tensor | None, normalised: Tensor) -> Tensor:
        """r [M, n] of rows [n], or all, of x [M, N, D], without gradient; x̂ is written into `normalised` [M, n, D]."""
        if self.kind is None:
            normalised.copy_(x if rows is None else x[:, rows])
            return torch.ones_like(normalised[..., 0])
        return normalise_rows(x, self._eps, self.kind.centred, rows, normalised)

    @property
    def _eps(self) -> float:
        """Of a norm of x itself."""
        return self.kind.eps / self.unit**2 if self.kind else 0.0

    @property
    def in_steps(self) -> bool:
        """Does the module's own code compute step by step what `fused` does at once, from the same input?"""
        own: Any = self.module
        # A wrapper's forward may do more, and of a weight in parts only a pass makes a whole.
        wrapped = "forward" in vars(own) or any(map(is_shard, own.parameters()))
        plain = self.kind is not None and not self.kind.offset and self.unit == 1
        return plain and not wrapped and not isinstance(own, (nn.LayerNorm, nn.RMSNorm))

    @property
    def centred(self) -> bool:
        """Does it subtract the mean over the features?"""
        return self.kind is not None and self.kind.centred

    def forwards(self, rows: Tensor, features: slice = slice(None)) -> Tensor:
        """γ ⊙ P y of rows y [..., D]: what the norm does to a part of its input, except r; P subtracts the mean.

        If it is not `centred`, rows may be only these features of y.
        """
        return self._centre(rows) * self._gain(rows, features)

    def backwards(
        self,
        *rows: Tensor,
        features: slice = slice(None),
        mean: Tensor | None = None,
        low: torch.dtype | None = None,
    ) -> Tensor:
        """P(γ ⊙ y) of rows y [..., D]: the transpose of `forwards`. Rows may come in parts, one after another.

        Of rows that are only some features of y, those; `mean` is then `mean_backwards` of all. Rows in any dtype are
        rounded once to a `low` one, and nothing is widened before.
        """
        scaled = self._scaled(rows, features, low)
        if not self.centred:
            return scaled
        mean = scaled.mean(-1, keepdim=True) if mean is None else mean
        if low is None:
            return scaled.sub_(mean)
        return torch.sub(scaled, mean, out=torch.empty_like(scaled, dtype=low))

    def mean_backwards(self, *rows: Tensor) -> Tensor | None:
        """The mean of γ ⊙ y over all features, [..., 1], if P subtracts one."""
        return self._scaled(rows, slice(None), None).mean(-1, keepdim=True) if self.centred else None

    def _scaled(self, parts: Sequence[Tensor], features: slice, low: torch.dtype | None) -> Tensor:
        """γ ⊙ y of rows in parts: in their dtype, or in a `low` one unless their mean is subtracted afterwards."""
        first = parts[0]
        dtype, like = first.dtype, first
        if low is not None:
            dtype = torch.float32 if self.centred else low
            # Of two numbers in low precision the product is exact before it is rounded.
            exact = first.dtype == dtype and not (self.kind and self.kind.offset)
            like = first if exact else first.new_empty(0, dtype=torch.float32)
        gain = self._gain(like, features)
        if len(parts) == 1:
            return torch.mul(first, gain, out=torch.empty_like(first, dtype=dtype))
        sizes = [len(part) for part in parts]
        out = first.new_empty((sum(sizes), *first.shape[1:]), dtype=dtype)
        for part, to in zip(parts, out.split(sizes), strict=True):
            torch.mul(part, gain, out=to)
        return out

    def _gain(self, like: Tensor, features: slice) -> Tensor | float:
        gain = self.gain(like)
        return gain[..., features] if isinstance(gain, Tensor) else gain

    def _centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of x [..., D], without running hooks."""
        if self.kind is None:
            return x
        return self.module.forward(x if self.unit == 1 else x * self.unit)

    def fused(self, x: Tensor) -> Tensor:
        """The same from x's own precision by the library's one kernel, where modules run half a dozen on a GPU."""
        if self.kind is None:
            return x
        gain, shape = self.gain(x), x.shape[-1:]
        weight = gain if isinstance(gain, Tensor) else None
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.kind.centred:
            return functional.layer_norm(x, shape, weight, bias, self._eps)
        y = functional.rms_norm(x, shape, weight, self._eps)
        return y if bias is None else y + bias


def _check_replaced(module: nn.Module, width: int, kind: Kind) -> None:
    """Refuse a norm whose forward was replaced by one that computes something else than its class's."""
    like, norm = next(module.parameters(), torch.empty(0)).detach(), Norm(module, kind)
    shape = like.shape if like.numel() else (width,)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device_of(module))
    x = x.to(like.dtype)
    normalised = torch.empty_like(x.view(4, -1, width))
    norm.capture(x.view(4, -1, width), None, normalised)
    with torch.no_grad():
        y = module.forward(x)
        right = normalised.view_as(x) * norm.gain(x) + (0 if norm.bias is None else norm.bias)
    if not (y - right).norm() <= max(torch.finfo(x.dtype).eps, 2.0**-20) ** 0.5 * right.norm():
        raise expected(type(module).__name__, "a forward that computes what its class's does", "another")


def side_by_side(norms: Sequence[Norm]) -> Norm:
    """Norms of one kind, all with a gain or none, as one for `backwards` of the rows of each, [norms, n, h, D]."""
    together = nn.Module()
    gains = [gain for norm in norms if norm.kind and (gain := read(norm.module, "weight")) is not None]
    if gains:
        together.weight = nn.Parameter(torch.stack(gains)[:, None, None], requires_grad=False)
    return replace(norms[0], module=together)


class Kinds:
    """`kind_of`, called once for all norms of the same class, settings and weights."""

    def __init__(self) -> None:
        self._found: dict[object, Kind] = {}

    def __call__(self, module: nn.Module, width: int) -> Kind:
        said = {name: x for name, x in vars(module).items() if isinstance(x, (bool, int, float, str))}
        weights = tuple(name for name, weight in module._parameters.items() if weight is not None)
        key = (type(module), tuple(said.items()), weights, width)
        if key not in self._found:
            self._found[key] = kind_of(module, width)
        if forward_of(module) is not type(module).forward:
            _check_replaced(module, width, self._found[key])
        return self._found[key]


def norm_inside(module: nn.Module, width: int) -> nn.Module:
    """The norm that a wrapper runs and that gives what the wrapper does; else the module itself."""
    if next(module.children(), None) is None:
        return module
    ran: list[nn.Module] = []
    like = next(module.parameters(), torch.empty(0))
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(like)
    hooks = [part.register_forward_hook(lambda part, *_: ran.append(part)) for part in module.modules()]
    try:
        with torch.no_grad():
            y = module.forward(x)
            return next((part for part in ran if is_norm(part, width) and torch.equal(part.forward(x), y)), module)
    except Exception:  # one that takes something else may raise anything
        return module
    finally:
        for hook in hooks:
            hook.remove()


def is_norm(module: nn.Module, width: int) -> bool:
    """Is it an RMSNorm or a LayerNorm of `width` features?"""
    try:
        kind_of(module, width)
    except (InputError, TypeError, RuntimeError, LookupError):
        return False
    return True


def kind_of(module: nn.Module, width: int) -> Kind:
    """What a norm of `width` features computes, found by running a copy of it with random weights.

    Raises:
        InputError: the module is neither an RMSNorm nor a LayerNorm, with or without gain and bias.
    """
    weights = {name: tuple(p.shape) for name, p in module.named_parameters()}
    wanted = f"an RMSNorm or LayerNorm of {width} features"
    refusal = expected(type(module).__name__, wanted, type(module).__name__)
    if others := sorted(set(weights) - {"weight", "bias"}):  # of parametrisations, say
        raise expected(type(module).__name__, f"{wanted}, with plain weights", f"one with {', '.join(others)}")
    if any(shape[-1:] != (width,) for shape in weights.values()):
        raise refusal
    said = [float(getattr(module, name)) for name in _EPS if isinstance(getattr(module, name, None), float)]
    generator = torch.Generator().manual_seed(0)
    probe: Any = object.__new__(type(module))  # as copying one that `fully_shard` has changed would make a new module
    vars(probe).update(vars(module))
    vars(probe).pop("_hf_hook", None)  # it would fetch offloaded weights, but these are random
    random = {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32), requires_grad=False)
        for name, shape in weights.items()
    }
    probe._parameters = {**module._parameters, **random}
    # Rows range from far below to far above eps and have means other than zero; heads with own weights have own rows.
    shape = next(iter(weights.values()), (width,))
    x = (
        torch.randn(6, *shape, generator=generator, dtype=torch.float32)
        * torch.tensor([1e-4, 2e-3, 0.03, 0.4, 6.0, 100.0], dtype=torch.float32).view(-1, *[1] * len(shape))
        + 1e-3
    )
    try:
        with torch.no_grad():
            y = type(module).forward(probe, x)
    except TypeError as error:  # a norm that takes a gate, too
        raise refusal from error
    rows = x.view(len(x), -1, width)
    normalised = torch.empty_like(rows)
    for eps, centred, offset in product(said or _USUAL_EPS, (False, True), (0.0, 1.0)):
        kind = Kind(centred, offset, eps)
        norm = Norm(probe, kind)
        norm.capture(rows, None, normalised)
        right = normalised.view_as(x) * norm.gain(x) + (0 if norm.bias is None else norm.bias)
        if torch.allclose(y, right, rtol=1e-3, atol=1e-4):
            return kind
    raise refusal
