"""Propose tables for unknown architectures from what a forward pass computed.

A layer is assumed to add two contributions to the residual stream, a mixer's and the MLP's. Whatever the modules are
called, these are the two outputs that add up to what the layer added, or three if the MLP has a part beside it. A mixer
is proposed as attention with queries, keys and values, then as one with inputs of any kind before an output projection,
then as a whole. A proposal may be wrong: it counts only once the self-check has passed with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, combinations, permutations
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..modules.norms import is_norm
from .around import Call, centred, frame_of, inside, refusal, same
from .family import Family, Mixer

# Attributes in which mixers keep their number of heads.
_HEADS = ("num_v_heads", "num_heads", "n_heads", "num_attention_heads")


_REWRITES = {
    **dict.fromkeys(("beside", "mlp_post_norm", "residual_multiplier")),
    **{"parallel": False, "rewrites": True},
}


def propose(model: nn.Module, calls: Sequence[Call], embeddings: Tensor) -> list[Family]:
    """Tables that may describe a model, the likeliest first.

    Args:
        model: a causal or masked language model, or a classifier.
        calls: every call of a forward pass over at least two prompts without a token in common, in order of start.
        embeddings: what the model's input embeddings gave, [B, T, D].

    Raises:
        InputError: there are no decoder layers, or they do not add attention and an MLP to a residual stream.
    """
    frame = frame_of(model, calls, embeddings)
    sites = [_LayerSites(model, one, frame.inside(one)) for one in frame.kinds]
    table = replace(frame.table, **_merged(model, [site.common() for site in sites]))
    mixers = [site.mixers() for site in sites]
    proposals: list[Family] = []
    # What has queries, keys and values by name, or at least as many projections, is the likeliest attention.
    for attention in sorted(sites, key=lambda site: (not site.named, len(site.linears) < 3)):
        fields = attention.attention_fields()
        if fields is None:
            continue
        others = [m[0] for site, m in zip(sites, mixers, strict=True) if site.attention_fields() != fields]
        table_of = replace(table, mixers=tuple(others), **fields)
        if table_of.q == table_of.k:
            proposals += [replace(table_of, fused=fused) for fused in ("concatenated", "grouped", "sharded")]
        else:
            orders = permutations((table_of.q, table_of.k, table_of.v))
            proposals += [replace(table_of, q=q, k=k, v=v, k_norm=attention.k_norms.get(k)) for q, k, v in orders]
    proposals = list({repr(table): table for table in proposals}.values())
    for least in range(max(map(len, mixers))):
        proposals.append(replace(table, mixers=tuple(each[min(least, len(each) - 1)] for each in mixers)))
    return proposals


def whole_layers(model: nn.Module, calls: Sequence[Call], embeddings: Tensor) -> list[Family]:
    """Tables in which each layer is one node: its only block, or whatever the layer does to the residual stream.

    The arguments are those of `propose`.
    """
    frame = frame_of(model, calls, embeddings)
    blocks = {_only_block(one, frame.inside(one)) for one in frame.kinds}
    found = blocks.pop() if len(blocks) == 1 else None
    one = [] if found is None else [replace(frame.table, mlp_norm=found[0], mlp=found[1])]
    # What a whole layer gives is changed where it is written, so it is read where it goes.
    return [*one, replace(frame.table, final_norm=frame.end, mlp=("", ""), rewrites=True)]


def _only_block(layer: Call, calls: list[Call]) -> tuple[str | None, str | tuple[str, str]] | None:
    """(the norm through which it reads, its module or its first and last) if one call adds all that a layer adds."""
    added, width = centred(layer.output - layer.input), layer.output.shape[-1]
    adds = [c for c in calls if c.output.shape == added.shape and same(centred(c.output), added)]
    norms = [c for c in calls if same(c.input, layer.input) and is_norm(c.module, width)]
    read = norms[0].output if norms else layer.input
    first = next((c for c in calls if c not in norms and same(c.input, read)), None)
    if first is None or not adds:
        return None
    last = min(adds, key=lambda c: c.path.count("."))

    def path(call: Call) -> str:
        return call.path.removeprefix(layer.path + ".")

    norm = path(norms[0]) if norms else None
    return norm, path(first) if first is last else (path(first), path(last))


def _merged(model: nn.Module, tables: list[dict[str, Any]]) -> dict[str, Any]:
    """What layers of all kinds have; paths that differ are tried one after another."""
    merged = {}
    for name in tables[0]:
        found = list(dict.fromkeys(table[name] for table in tables))
        paths = all(isinstance(value, str) for value in found) and name.endswith("norm")
        if name in ("attention_norm", "mlp_norm") and None in found and len(found) == 2:
            found.remove(None)  # an identity may stand in its place
        if len(found) > 1 and not paths:
            raise refusal(model, f"one {name.replace('_', ' ')} in all layers", " and ".join(map(repr, found)))
        merged[name] = found[0] if len(found) == 1 else tuple(found)
    return merged


class _LayerSites:
    """The sites of one layer, from the calls inside it."""

    def __init__(self, model: nn.Module, layer: Call, calls: list[Call]) -> None:
        self.model, self.layer, self.calls = model, layer, calls
        self.width = layer.output.shape[-1]
        self.first: Call | None = None  # the norm with which a block begins that takes the residual stream's place
        self.attention, self.mlp, self.beside, self.scale = self._contributions()
        self.k_norms: dict[str, str] = {}  # by the path of the projection whose output they take
        self.post, self.inner = self._before_post_norm(self.attention)
        place = next((i for i, c in enumerate(self.calls) if _is_linear(c) and same(c.output, self.inner.output)), None)
        self.out = None if place is None else self.calls[place]
        before = self.calls[: self.calls.index(self.inner) if place is None else place]
        self.norm, self.linears = self._read([c for c in before if _is_linear(c)], [layer.input])
        if self.norm is None and not self.linears:
            self.norm, _ = self._read([c for c in self.calls if not is_norm(c.module, self.width)], [layer.input])
        self._find_k_norms(self.linears)

    def attention_fields(self) -> dict[str, Any] | None:
        """The table's fields on queries, keys and values; None if there are not as many projections."""
        linears = self.linears
        if self.out is None or len(linears) in (0, 2):
            return None
        q, k, v = (self.named or linears[:3]) if len(linears) > 2 else linears * 3
        more = [self._short(c) for c in linears if c not in (q, k, v)]
        return {
            "q": self._short(q),
            "k": self._short(k),
            "v": self._short(v),
            "out": self._short(self.out),
            "more": {path.rpartition(".")[2]: path for path in more},
        }

    def mixers(self) -> list[Mixer]:
        """What the mixer may be, if not attention with queries, keys and values."""
        found = []
        if self.out is not None and self.linears:
            reads = {path.rpartition(".")[2]: path for path in map(self._short, self.linears)}
            module = self.model.get_submodule(self.out.path.rpartition(".")[0])
            width = self.out.input.shape[-1]
            numbers = [
                name for name in _HEADS if isinstance(n := getattr(module, name, 0), int) and n and not width % n
            ]
            found.append(Mixer(out=self._short(self.out), reads=reads, heads=tuple(numbers[:1])))
        read = self.layer.input if self.norm is None else self.norm.output
        readers = [c for c in self.calls if same(c.input, read) and not is_norm(c.module, self.width)]
        if readers:
            found.append(Mixer(module=(self._short(readers[0]), self._short(self.inner))))
        if not found:
            raise refusal(self.model, "a mixer that reads the residual stream", f"{self.inner.path!r}, which does not")
        return found

    def common(self) -> dict[str, Any]:
        """The table's fields that all layers share."""
        x = self.layer.input
        out = self.inner if self.out is None else self.out
        linears, norm, post = self.linears, self.norm, self.post
        attention = {
            "attention_norm": None if norm is None else self._short(norm),
            "attention_post_norm": None if post is None else self._short(post),
        }
        if self.first is not None:
            return {**attention, "mlp_norm": None, "mlp": (self._short(self.first), self._short(self.mlp)), **_REWRITES}
        mlp_post, last = self._before_post_norm(self.mlp)
        after = self.layer.output - self.scale * self.mlp.output
        if self.beside is not None:
            after = after - self.scale * self.beside.output
        own = [c for c in self.calls if c not in linears and not inside(c, out)]
        begins = [c for c in own if inside(last, c) or c.path == last.path] or own
        mlp_norm, firsts = self._read(begins, [after, x])
        if not firsts:
            mlp_norm, firsts = self._read([c for c in own if not is_norm(c.module, self.width)], [after, x])
        if not firsts:
            raise refusal(self.model, "an MLP that reads the residual stream", f"{last.path!r}, which does not")
        reads = mlp_norm.input if mlp_norm is not None else firsts[0].input
        first_path, last_path = self._short(firsts[0]), self._short(last)
        return {
            **attention,
            "mlp_norm": None if mlp_norm is None else self._short(mlp_norm),
            "beside": None if self.beside is None else self._short(self.beside),
            "mlp": first_path if first_path == last_path else (first_path, last_path),
            "mlp_post_norm": None if mlp_post is None else self._short(mlp_post),
            "parallel": same(reads, x),
            "residual_multiplier": None if self.scale == 1 else self.scale,
        }

    def _short(self, call: Call) -> str:
        return call.path.removeprefix(self.layer.path + ".")

    def _contributions(self) -> tuple[Call, Call, Call | None, float]:
        """The outermost two or three calls whose outputs add up to what the layer added, and the factor of the sum."""
        added = centred(self.layer.output - self.layer.input)
        candidates = [c for c in self.calls if c.output.shape == added.shape and not isinstance(c.module, nn.Dropout)]
        found: list[tuple[int, int, Call, Call, Call | None, float]] = []
        outer = [c for c in candidates if "." not in self._short(c)]
        for first, second, *third in chain(combinations(candidates, 2), combinations(outer, 3)):
            # A bias may be added outside of any module.
            both = centred(sum((c.output for c in third), first.output + second.output))
            scale = float((added * both).sum() / both.square().sum().clamp(min=1e-30))
            # Rounded, so that it is the same in all layers.
            scale = 1.0 if abs(scale - 1) < 1e-5 else float(f"{scale:.13g}")
            if same(both * scale, added) and not same(first.output, second.output):
                depth = sum(c.path.count(".") for c in (first, second, *third))
                found.append((depth, len(found), first, second, third[0] if third else None, scale))
        found = found or self._post_norm(candidates)
        if not found:
            wanted = "layers that add a mixer's and an MLP's output to the residual stream, as Llama's and Jamba's do"
            raise refusal(self.model, wanted, self._instead(added))
        return min(found, key=lambda one: one[:2])[2:]

    def _post_norm(self, candidates: list[Call]) -> list[tuple[int, int, Call, Call, Call | None, float]]:
        """The same of a layer that ends in a norm of the residual stream: its mixer, and the last norm."""
        norms = [c for c in self.calls if is_norm(c.module, self.width)]
        ends = [c for c in norms if same(c.output, self.layer.output)]
        for first in norms if ends else ():
            mixed = centred(first.input - self.layer.input)
            mixers = [c for c in candidates if c not in norms and same(centred(c.output), mixed)]
            if first is not ends[0] and mixers:
                self.first = first
                mixer = min(mixers, key=lambda c: c.path.count("."))
                return [(0, 0, mixer, ends[0], None, 1.0)]
        return []

    def _instead(self, added: Tensor) -> str:
        """What a layer does that adds no such contributions."""
        norms = [c for c in self.calls if is_norm(c.module, self.width)]
        if any(same(c.output, self.layer.output) for c in norms):
            return "a norm of the residual stream itself at their end (post-norm)"
        if any(same(centred(c.output), added) for c in self.calls if c.output.shape == added.shape):
            return "layers with only one of them"
        return "a residual stream that is also scaled, gated or normalised"

    def _before_post_norm(self, call: Call) -> tuple[Call | None, Call]:
        """(the norm, the outermost call before it) if a contribution comes out of a norm, else (None, the call)."""
        if not is_norm(call.module, self.width):
            return None, call
        before = [c for c in self.calls if c is not call and same(c.output, call.input)]
        if not before:
            raise refusal(self.model, f"a module before the norm {call.path!r}", "none")
        return call, min(before, key=lambda c: c.path.count("."))

    def _read(self, readers: list[Call], residuals: list[Tensor]) -> tuple[Call | None, list[Call]]:
        """(the norm they read through, the readers) for the first of the residuals that any reader reads."""
        for x in residuals:
            for norm in (c for c in self.calls if same(c.input, x) and is_norm(c.module, self.width)):
                through = [c for c in readers if c is not norm and same(c.input, norm.output)]
                if through:
                    return norm, through
            plain = [c for c in readers if same(c.input, x) and not is_norm(c.module, self.width)]
            if plain:
                return None, plain
        return None, []

    @property
    def named(self) -> list[Call]:
        """q, k and v if the projections' names tell."""
        named = {}
        for call in self.linears:
            found = re.search(r"(?:^|_|w|to)([qkv])", call.path.rpartition(".")[2])
            if found:
                named[found.group(1)] = call
        return [named[letter] for letter in "qkv"] if len(named) == 3 else []

    def _find_k_norms(self, linears: list[Call]) -> None:
        """Find modules with weights that take a projection's output, in any shape."""
        weighted = [call for call in self.calls if any(True for _ in call.module.parameters())]
        for linear in linears:
            values = linear.output.flatten().sort().values
            for call in weighted:
                if call.input.numel() == values.numel() and same(call.input.flatten().sort().values, values):
                    self.k_norms.setdefault(self._short(linear), self._short(call))


def _is_linear(call: Call) -> bool:
    return isinstance(call.module, (nn.Linear, Conv1D))
