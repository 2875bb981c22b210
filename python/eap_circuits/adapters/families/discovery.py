"""Propose tables for unknown architectures from what a forward pass computed.

A layer is assumed to add two contributions to the residual stream, attention's and the MLP's. Whatever the modules are
called, these are the two outputs that add up to what the layer added. A proposal may be wrong: it counts only once the
self-check has passed with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import InputError, expected
from ..norms import kind_of
from .family import Family


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its path, and its first input and output, [B, T, X] or the module's own shape."""

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor


def propose(model: nn.Module, calls: Sequence[Call], embeddings: Tensor) -> list[Family]:
    """Tables that may describe a model, the likeliest first.

    Args:
        model: a causal language model.
        calls: every call of a forward pass over at least two prompts without a token in common, in order of start.
        embeddings: what the model's input embeddings gave, [B, T, D].

    Raises:
        InputError: there are no decoder layers, or they do not add attention and an MLP to a residual stream.
    """
    shape = embeddings.shape
    flat = [Call(c.path, c.module, _flat(c.input, shape), _flat(c.output, shape)) for c in calls]
    stack = _stack(model, flat, shape[-1])
    layers = [call for call in flat if call.path.rpartition(".")[0] == stack]
    middle = layers[len(layers) // 2]
    site = _LayerSites(model, middle, [call for call in flat if call.path.startswith(middle.path + ".")])
    outside = [call for call in flat if not call.path.startswith(stack + ".")]
    norm, multiplier = _embedding(model, outside, layers[0].input, embeddings.flatten(0, 1), shape[0])
    ends = [call for call in outside if _same(call.input, layers[-1].output) and _is_norm(call.module, shape[-1])]
    if not ends:
        raise _refusal(model, "a norm after the last decoder layer", "none")
    config: Any = model.config
    table = Family(
        name=config.model_type,
        model_types=(config.model_type,),
        layers=stack,
        final_norm=ends[0].path,
        embedding_norm=norm,
        embedding_multiplier=multiplier,
        **site.table(),
    )
    if table.q == table.k:
        return [replace(table, fused=fused) for fused in ("concatenated", "grouped")]
    orders = permutations((table.q, table.k, table.v))
    return [replace(table, q=q, k=k, v=v, k_norm=site.k_norms.get(k)) for q, k, v in orders]


class _LayerSites:
    """The sites of one layer, from the calls inside it."""

    def __init__(self, model: nn.Module, layer: Call, calls: list[Call]) -> None:
        self.model, self.layer, self.calls = model, layer, calls
        self.width = layer.output.shape[-1]
        self.attention, self.mlp, self.scale = self._contributions()
        self.k_norms: dict[str, str] = {}  # by the path of the projection whose output they take

    def table(self) -> dict[str, Any]:
        first, out, post = self._attention_output()
        x = self.layer.input
        entered = [c for c in self.calls[:first] if isinstance(c.module, (nn.Linear, Conv1D))]
        norm, linears = self._read(entered, [x])
        if len(linears) not in (1, 3):
            raise _refusal(self.model, "one or three projections before attention", f"{len(linears)}")
        q, k, v = self._letters(linears) if len(linears) == 3 else linears * 3
        self._find_k_norms(linears)
        mlp_post, last = self._before_post_norm(self.mlp)
        after = x + self.scale * self.attention.output
        own = [c for c in self.calls if c not in linears and not _inside(c, out)]
        begins = [c for c in own if _inside(last, c) or c.path == last.path] or own
        mlp_norm, firsts = self._read(begins, [after, x])
        if not firsts:
            mlp_norm, firsts = self._read([c for c in own if not _is_norm(c.module, self.width)], [after, x])
        if not firsts:
            raise _refusal(self.model, "an MLP that reads the residual stream", f"{last.path!r}, which does not")
        reads = mlp_norm.input if mlp_norm is not None else firsts[0].input
        first_path, last_path = self._short(firsts[0]), self._short(last)
        return {
            "attention_norm": None if norm is None else self._short(norm),
            "mlp_norm": None if mlp_norm is None else self._short(mlp_norm),
            "q": self._short(q),
            "k": self._short(k),
            "v": self._short(v),
            "out": self._short(out),
            "mlp": first_path if first_path == last_path else (first_path, last_path),
            "attention_post_norm": None if post is None else self._short(post),
            "mlp_post_norm": None if mlp_post is None else self._short(mlp_post),
            "parallel": _same(reads, x),
            "residual_multiplier": None if self.scale == 1 else self.scale,
        }

    def _short(self, call: Call) -> str:
        return call.path.removeprefix(self.layer.path + ".")

    def _contributions(self) -> tuple[Call, Call, float]:
        """The outermost two calls whose outputs add up to what the layer added, and the factor of their sum."""
        added = self.layer.output - self.layer.input
        candidates = [c for c in self.calls if c.output.shape == added.shape and not isinstance(c.module, nn.Dropout)]
        found: list[tuple[int, int, Call, Call, float]] = []
        for first, second in combinations(candidates, 2):
            both = first.output + second.output
            scale = float((added * both).sum() / both.square().sum().clamp(min=1e-30))
            scale = 1.0 if abs(scale - 1) < 1e-5 else scale
            if _same(both * scale, added) and not _same(first.output, second.output):
                found.append((first.path.count(".") + second.path.count("."), len(found), first, second, scale))
        if not found:
            raise _refusal(self.model, "layers that add attention and an MLP to the residual stream", "no such two")
        *_, first, second, scale = min(found)
        return first, second, scale

    def _before_post_norm(self, call: Call) -> tuple[Call | None, Call]:
        """(the norm, the outermost call before it) if a contribution comes out of a norm, else (None, the call)."""
        if not _is_norm(call.module, self.width):
            return None, call
        before = [c for c in self.calls if c is not call and _same(c.output, call.input)]
        if not before:
            raise _refusal(self.model, f"a module before the norm {call.path!r}", "none")
        return call, min(before, key=lambda c: c.path.count("."))

    def _attention_output(self) -> tuple[int, Call, Call | None]:
        """(the output projection's place among the calls, its call, the call of the norm after it)."""
        post, inner = self._before_post_norm(self.attention)
        for place, call in enumerate(self.calls):
            if isinstance(call.module, (nn.Linear, Conv1D)) and _same(call.output, inner.output):
                return place, call, post
        raise _refusal(self.model, "an output projection of attention", f"{inner.path!r} without one")

    def _read(self, readers: list[Call], residuals: list[Tensor]) -> tuple[Call | None, list[Call]]:
        """(the norm they read through, the readers) for the first of the residuals that any reader reads."""
        for x in residuals:
            for norm in (c for c in self.calls if _same(c.input, x) and _is_norm(c.module, self.width)):
                through = [c for c in readers if c is not norm and _same(c.input, norm.output)]
                if through:
                    return norm, through
            plain = [c for c in readers if _same(c.input, x) and not _is_norm(c.module, self.width)]
            if plain:
                return None, plain
        return None, []

    def _letters(self, linears: list[Call]) -> list[Call]:
        """q, k and v by name if the names tell, else in order of call."""
        named = {}
        for call in linears:
            found = re.search(r"(?:^|_|w|to)([qkv])", call.path.rpartition(".")[2])
            if found:
                named[found.group(1)] = call
        return [named[letter] for letter in "qkv"] if len(named) == 3 else linears

    def _find_k_norms(self, linears: list[Call]) -> None:
        """Find modules with weights that take a projection's output, in any shape."""
        weighted = [call for call in self.calls if any(True for _ in call.module.parameters())]
        for linear in linears:
            values = linear.output.flatten().sort().values
            for call in weighted:
                if call.input.numel() == values.numel() and _same(call.input.flatten().sort().values, values):
                    self.k_norms.setdefault(self._short(linear), self._short(call))


def _flat(x: Tensor, shape: torch.Size) -> Tensor:
    """[B, T, X] -> [B·T, X]; other shapes stay."""
    return x.flatten(0, 1) if x.dim() == 3 and x.shape[:2] == shape[:2] else x


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= 1e-4 * b.norm())


def _inside(call: Call, other: Call) -> bool:
    return call.path.startswith(other.path + ".")


def _is_norm(module: nn.Module, width: int) -> bool:
    try:
        kind_of(module, width)
    except (InputError, TypeError, RuntimeError):
        return False
    return True


def _refusal(model: nn.Module, wanted: str, found: str) -> InputError:
    return expected(type(model).__name__, wanted, found)


def _stack(model: nn.Module, calls: list[Call], width: int) -> str:
    """The path of the longest list of modules that all take and return the residual stream."""
    wide = {c.path for c in calls if c.input.shape[-1:] == c.output.shape[-1:] == (width,)}
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lengths = {path: len(x) for path, x in lists if all(f"{path}.{index}" in wide for index in range(len(x)))}
    if not any(lengths.values()):
        raise _refusal(model, "a list of decoder layers", "none")
    return max(lengths, key=lengths.__getitem__)


def _embedding(
    model: nn.Module, calls: list[Call], entered: Tensor, embeddings: Tensor, prompts: int
) -> tuple[str | None, float | None]:
    """(norm, factor) between the token embeddings and the first layer.

    Differences between prompts are compared, as positions add the same to every prompt.
    """

    def apart(x: Tensor) -> Tensor:
        x = x.unflatten(0, (prompts, -1))
        return x[1:] - x[:1]

    for call in [None, *calls]:
        x = embeddings if call is None else call.output
        if x.shape != entered.shape or (call is not None and not _same(call.input, embeddings)):
            continue
        factor = float((apart(entered) * apart(x)).sum() / apart(x).square().sum())
        factor = 1.0 if abs(factor - 1) < 1e-5 else factor
        if _same(apart(x) * factor, apart(entered)) and (call is None or factor == 1):
            return None if call is None else call.path, None if factor == 1 else factor
    raise _refusal(model, "token embeddings that start the residual stream", "something else")
