"""A family's table bound to one model: its modules and weights under canonical names.

Nothing is copied at binding; weights are read in canonical layout when they are asked for.
Shape letters: H query heads, G key/value heads, K head dim, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import expected
from ..graph import Graph, Heads
from .families import FAMILIES
from .family import Family


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm or LayerNorm in front of receivers."""

    module: nn.Module

    @property
    def centred(self) -> bool:
        """Does it subtract the mean (LayerNorm)?"""
        return isinstance(self.module, nn.LayerNorm)

    @property
    def eps(self) -> float:
        module: Any = self.module
        return float(module.eps if self.centred else module.variance_epsilon)

    def gain(self, like: Tensor) -> Tensor:
        """γ, [D], in the dtype of `like`."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.detach().to(like.dtype)

    @property
    def bias(self) -> Tensor | None:
        """β, [D], or None."""
        return getattr(self.module, "bias", None)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂, r) of x [..., D]: the normalised input without gain, and 1/rms or 1/std [...]."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        r = torch.rsqrt(x.square().mean(-1) + self.eps)
        return x * r[..., None], r

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of x [..., D], past any hook."""
        return self.module.forward(x)


@dataclass(frozen=True, eq=False)
class Projection:
    """The heads' slices of a projection from the normalised residual stream.

    `columns` are the features of the module's output that belong to these heads, in head order.
    """

    module: nn.Module
    columns: slice
    n_heads: int

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[heads, K, D]"""
        weight = linear_weight(self.module)[self.columns]
        return weight.detach().to(dtype).unflatten(0, (self.n_heads, -1))

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[heads, K] or None"""
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        return None if bias is None else bias[self.columns].detach().to(dtype).view(self.n_heads, -1)


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer's sites."""

    attention_norm: Norm
    mlp_norm: Norm
    q: Projection
    k: Projection
    v: Projection
    attention: nn.Module  # reads `num_key_value_groups` where query heads share keys and values
    out: nn.Module
    mlp: nn.Module

    @property
    def projections(self) -> dict[str, Projection]:
        return {"q": self.q, "k": self.k, "v": self.v}

    @property
    def projection_modules(self) -> dict[nn.Module, dict[str, Projection]]:
        """The projections by the module that computes them, in the order of its output's features."""
        modules: dict[nn.Module, dict[str, Projection]] = {}
        for letter, projection in self.projections.items():
            modules.setdefault(projection.module, {})[letter] = projection
        return modules

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.q.n_heads // self.k.n_heads

    def out_weight(self, dtype: torch.dtype) -> Tensor:
        """Each head's slice of the output projection, [H, K, D]."""
        weight = linear_weight(self.out).detach().to(dtype)
        return weight.T.unflatten(0, (self.q.n_heads, -1))


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model's sites under canonical names."""

    model: nn.Module
    family: Family
    layers: list[Layer]
    final_norm: Norm
    device: torch.device
    dtype: torch.dtype

    @property
    def d_model(self) -> int:
        return int(self.final_norm.module.weight.shape[0])  # type: ignore[index]

    @property
    def head_dim(self) -> int:
        return linear_weight(self.layers[0].out).shape[1] // self.layers[0].q.n_heads

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype in which scores are accumulated: float32, or float64 for a float64 model."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def graph(self, heads: Heads) -> Graph:
        return Graph(
            tuple(layer.q.n_heads for layer in self.layers),
            tuple(layer.k.n_heads for layer in self.layers),
            self.d_model,
            heads=heads,
        )

    @cached_property
    def norms(self) -> list[Norm]:
        """Every norm in front of receivers, in order of depth, each once."""
        norms = [norm for layer in self.layers for norm in (layer.attention_norm, layer.mlp_norm)]
        return list({id(norm.module): norm for norm in [*norms, self.final_norm]}.values())


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a Linear or Conv1D as [out, in]."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def bind(model: nn.Module) -> Architecture:
    """Find the sites of a Hugging Face causal language model.

    Raises:
        InputError: not such a model, an unsupported architecture, a missing site, or several devices.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if not isinstance(model, nn.Module) or model_type is None:
        raise expected("model", "a Hugging Face causal language model", type(model).__name__)
    if model_type not in FAMILIES:
        raise expected(
            "model",
            f"an architecture among {', '.join(sorted(FAMILIES))} (config.model_type)",
            f"{model_type!r} ({type(model).__name__})",
        )
    family = FAMILIES[model_type]
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or torch.device("meta") in devices:
        raise expected("model", "all weights on one device", ", ".join(sorted(map(str, devices))) or "none")
    heads = int(config.num_attention_heads)  # type: ignore[union-attr]
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    stack = _site(model, family.layers)
    layers = [_layer(layer, family, heads, kv_heads) for layer in stack.children()]
    return Architecture(
        model,
        family,
        layers,
        _norm(model, family.final_norm),
        devices.pop(),
        next(model.parameters()).dtype,
    )


def _site(root: nn.Module, path: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise expected(type(root).__name__, f"a module at {path!r}", "none there") from None


def _norm(root: nn.Module, path: str) -> Norm:
    module = _site(root, path)
    if not isinstance(module, nn.LayerNorm) and not hasattr(module, "variance_epsilon"):
        raise expected(f"{type(root).__name__}.{path}", "an RMSNorm or LayerNorm", type(module).__name__)
    return Norm(module)


def _linear(root: nn.Module, path: str) -> nn.Module:
    module = _site(root, path)
    if not isinstance(module, (nn.Linear, Conv1D)) or not module.weight.is_floating_point():
        raise expected(f"{type(root).__name__}.{path}", "a Linear or Conv1D layer", type(module).__name__)
    return module


def _layer(layer: nn.Module, family: Family, heads: int, kv_heads: int) -> Layer:
    out = _linear(layer, family.out)
    head_dim = linear_weight(out).shape[1] // heads
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    fused = family.q == family.k == family.v
    starts = [0, widths[0], widths[0] + widths[1]] if fused else [0, 0, 0]
    parts = []
    for path, start, width, count in zip(
        (family.q, family.k, family.v), starts, widths, (heads, kv_heads, kv_heads), strict=True
    ):
        module = _linear(layer, path)
        features = linear_weight(module).shape[0]
        if features != (sum(widths) if fused else width):
            raise expected(
                f"{type(layer).__name__}.{path}",
                f"{sum(widths) if fused else width} output features ({heads} and {kv_heads} heads of {head_dim})",
                features,
            )
        parts.append(Projection(module, slice(start, start + width), count))
    return Layer(
        attention_norm=_norm(layer, family.attention_norm),
        mlp_norm=_norm(layer, family.mlp_norm),
        q=parts[0],
        k=parts[1],
        v=parts[2],
        attention=_site(layer, family.out.rpartition(".")[0]),
        out=out,
        mlp=_site(layer, family.mlp),
    )
