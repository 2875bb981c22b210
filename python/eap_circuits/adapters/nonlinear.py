"""The nonlinear parts of a decoder layer, its norms and activation functions, told apart by what they compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..modules.norms import Kinds, Norm
from .architecture import Layer


def nonlinear_parts(layer: Layer, width: int, kinds: Kinds) -> tuple[list[Norm], list[nn.Module]]:
    """The layer's norms (of `width` features, of queries, of keys) and activation functions in its present state.

    Raises:
        InputError: a module with one weight per feature is not a norm.
    """
    norms, activations = [], []
    per_head = {(p.n_heads, p.head_dim) for p in layer.projections.values()}
    # An adapter's weight for each feature scales what a linear map gives.
    linear = [each for each in layer.module.modules() if hasattr(each, "in_features")]
    inside = {part for each in linear for part in each.modules() if part is not each}
    for module in layer.module.modules():
        if next(module.children(), None) is not None:
            continue
        # Single numbers do not count: activation functions may have learned ones.
        weights = {name: weight for name, weight in module.named_parameters() if weight.numel() > 1}
        if not weights:
            found = _without_weights(module, width, kinds)
            if isinstance(found, Norm):
                norms.append(found)
            elif found is not None:
                activations.append(found)
            continue
        shape = tuple(weights["weight"].shape) if "weight" in weights else ()
        if module not in inside and (len(shape) == 1 or (shape in per_head and not hasattr(module, "in_features"))):
            norms.append(Norm(module, kinds(module, shape[-1])))
    return norms, activations


def _without_weights(module: nn.Module, width: int, kinds: Kinds) -> Norm | nn.Module | None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x = next((x.to(number) for number in module.parameters()), x)
    y, part = _output(module, x), _output(module, x[:2, :3])
    if y is None or y.shape != x.shape or torch.equal(y, x):
        return None
    if part is not None and torch.allclose(part, y[:2, :3]):
        return module
    try:
        return Norm(module, kinds(module, width))
    except InputError:
        return None


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    """The module's output for x; None unless it takes and returns one tensor."""
    forward: Any = type(module).forward
    try:
        with torch.no_grad():
            y = forward(module, x)
    except Exception:  # a module with other arguments may raise anything
        return None
    return y if isinstance(y, Tensor) else None
