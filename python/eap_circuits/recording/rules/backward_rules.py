"""Backward rules: what takes the place of the gradient in the parts of a model that are not linear.

A forward pass gives the same values under any rules; only the backward pass changes, in four kinds of places.

Norms (RelP's LN-rule, GIM): the scale r is a constant; subtracting the mean stays as it is.
Activation functions (RelP's identity rule): a(x) counts as x·c with the constant c = a(x)/x, and c = 0 at x = 0.
Products of two activations, as in gated MLPs (RelP's half rule, GIM): each factor takes half of its gradient.
Attention: as it is ("relp"); its pattern is a constant ("relp-ah", the AH-rule); or (GIM) the products with the values
and of queries with keys are products as above, and softmax(s) has the gradient s̃ ⊙ (g − ⟨g, s̃⟩), s̃ = softmax(s/2).

Sources: RelP, Jafari et al. 2025, arXiv 2508.21258, and its code (github.com/FarnoushRJ/RelP), which leaves the AH-rule
out unless asked; GIM, Edin et al. 2025, arXiv 2505.17630, and its code (github.com/corticph/gim).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...adapters import Architecture, Kinds, Layer, Norm, nonlinear_parts
from ...errors import expected
from ...forward import Hooks
from ...modules.loans import FunctionMode
from .gradients import ATTENTION, Attention, Changed, half, halved_copy, is_slope, normalise, slope


@dataclass(frozen=True)
class Rules:
    """What rules do besides what all do: hold the scales of norms constant, and halve the gradients of products.

    Args:
        name: what they are called.
        description: one line.
        identity: activation functions are products with a constant.
        constant_pattern: the attention pattern is a constant.
        temperature: that of the softmax whose gradient attention takes, while its products halve theirs; None leaves
            both as they are.
    """

    name: str
    description: str
    identity: bool = False
    constant_pattern: bool = False
    temperature: float | None = None


RULES: dict[str, Rules] = {
    rules.name: rules
    for rules in (
        Rules("relp", "relevance patching: activation functions as products with a constant", identity=True),
        Rules("relp-ah", "relevance patching, attention patterns constant too", identity=True, constant_pattern=True),
        Rules("gim", "gradient interaction modifications: softer attention, products by halves", temperature=2.0),
    )
}
_PRODUCTS = (torch.Tensor.mul, torch.mul, torch.Tensor.mul_)
_SOFTMAX = (functional.softmax, torch.softmax, torch.Tensor.softmax)
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class BackwardRules:
    """Rules for the forward passes of one model.

    Args:
        rules: which.
        arch: the bound model.
    """

    def __init__(self, rules: Rules, arch: Architecture) -> None:
        self._rules, self._arch = rules, arch
        self._patterns = self._activations = 0  # found so far in the layer that is running
        self._active = False  # is an activation function running?

    def register(self, hooks: Hooks) -> None:
        """Apply the rules to one forward pass, of which gradients are taken.

        Raises:
            InputError: a norm of unknown kind; in the pass itself, a layer without an activation function or attention
                pattern that can be recognised.
        """
        outer = dict.fromkeys([*(x.memory for x in self._arch.layers if x.memory), self._arch.final_norm])
        norms = [replace(norm, unit=1.0) for norm in outer]  # of what the module itself reads
        for index, (layer, (found, activations)) in enumerate(zip(self._arch.layers, self._parts, strict=True)):
            if not index or layer.module is not self._arch.layers[index - 1].module:  # else a part of the one before
                norms += found
                for module in activations:
                    hooks.replace_forward(module, partial(self._activate, module.forward))
                hooks.replace_forward(layer.module, partial(self._run_layer, index, layer.module.forward))
            if self._changes_attention and layer.n_heads:
                module = _attending(layer)
                hooks.replace_forward(module, partial(self._attend, index, module.forward))
            if self._rules.temperature is not None and layer.n_heads:
                hooks.on_input(layer.out, halved_copy)
        for norm in norms:
            hooks.replace_forward(norm.module, partial(normalise, norm, norm.module.forward))

    @cached_property
    def _parts(self) -> list[tuple[list[Norm], list[nn.Module]]]:
        """Each layer's norms and activation functions: found by running them, so once for all passes."""
        kinds = Kinds()
        return [nonlinear_parts(layer, self._arch.d_model, kinds) for layer in self._arch.layers]

    @property
    def _changes_attention(self) -> bool:
        return self._rules.constant_pattern or self._rules.temperature is not None

    def _run_layer(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._activations = 0
        with _Products(self):
            out = forward(*args, **kwargs)
        if not self._activations:
            name = type(self._arch.layers[index].mlp_in).__name__
            raise expected("rules", "activation functions that are modules", f"none in layer {index} ({name})")
        return out

    def _attend(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._patterns = 0
        with _Patterns(self):
            out = forward(*args, **kwargs)
        if not self._patterns:
            name = type(_attending(self._arch.layers[index])).__name__
            raise expected("rules", 'attn_implementation "sdpa" or "eager"', f"neither in layer {index} ({name})")
        return out

    def _activate(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self._activations += 1
        if self._rules.identity:
            y: Tensor = Changed.apply(x, forward, slope)
            return y
        self._active = True  # products inside it are no gates
        try:
            return forward(x)
        finally:
            self._active = False

    def multiplied(self, product: Tensor, a: Any, b: Any) -> Tensor:
        """The product of a and b; where both depend on the input, with the gradients of the rules."""
        both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.requires_grad and b.requires_grad
        # A router's or a shared expert's weight is one number per token: not a gate of features.
        if not both or a.shape != b.shape or self._active:
            return product
        if is_slope(b, a):
            self._activations += 1
            return a * b.detach() if self._rules.identity else product
        product.register_hook(half)
        return product

    def attended(self, **given: Any) -> Tensor:
        """scaled_dot_product_attention under the rules."""
        self._patterns += 1
        q, k, v = (given.pop(name) for name in _ARGUMENTS[:3])
        z: Tensor = Attention.apply(q, k, v, given, self._pattern)
        return z

    def softened(self, pattern: Tensor, scores: Tensor, dim: int) -> Tensor:
        """The same attention pattern, softmax(scores), with the gradient of the rules."""
        self._patterns += 1
        return self._pattern(pattern, scores, dim)

    def _pattern(self, pattern: Tensor, scores: Tensor, dim: int) -> Tensor:
        if self._rules.constant_pattern:
            return pattern.detach()
        temperature = self._rules.temperature
        assert temperature is not None
        # Half, as queries and keys share the gradient of their product.
        soft = torch.softmax(scores / temperature, dim, pattern.dtype) / 2 * temperature
        return pattern.detach() + (soft - soft.detach())


def _attending(layer: Layer) -> nn.Module:
    """The module that computes the attention pattern: the one with the queries, where `attention` has none (BERT)."""
    read = next(iter(layer.projections.values())).module
    if any(module is read for module in layer.attention.modules()):
        return layer.attention
    holders = (x for x in layer.module.modules() if any(child is read for child in x.children()))
    return next(holders, layer.attention)


class _Products(FunctionMode):
    def __init__(self, rules: BackwardRules) -> None:
        super().__init__()
        self._rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _PRODUCTS and torch.is_grad_enabled():
            a, b = (*args, *kwargs.values())[:2]
            return self._rules.multiplied(out, a, b)
        return out


class _Patterns(FunctionMode):
    def __init__(self, rules: BackwardRules) -> None:
        super().__init__()
        self._rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ATTENTION and torch.is_grad_enabled():
            return self._rules.attended(**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs)
        out = func(*args, **kwargs)
        if func in _SOFTMAX and torch.is_grad_enabled():
            scores = args[0] if args else kwargs["input"]
            return self._rules.softened(out, scores, args[1] if len(args) > 1 else kwargs["dim"])
        return out
