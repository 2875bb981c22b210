"""What is around a model's layers, from what a forward pass computed: embeddings, their list, and the final norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, expected
from ..modules.norms import is_norm
from .family import Family


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: its path, and its first input and output, [B, T, X] or the module's own shape."""

    path: str
    module: nn.Module
    input: Tensor
    output: Tensor


@dataclass(frozen=True, eq=False)
class Frame:
    """What is around the layers, and one layer of each kind."""

    table: Family  # without the fields on a layer's sites
    calls: list[Call]
    kinds: list[Call]
    end: str  # the path of what reads the residual stream behind the last layer: the final norm, or a head

    def inside(self, layer: Call) -> list[Call]:
        return [call for call in self.calls if inside(call, layer)]


def frame_of(model: nn.Module, calls: Sequence[Call], embeddings: Tensor) -> Frame:
    """What `propose` begins with."""
    config: Any = model.config
    text = config.get_text_config()
    if streams := getattr(text, "altup_num_inputs", 0):
        raise refusal(model, "one residual stream, as Gemma 4's", f"{streams} that every layer mixes anew (AltUp)")
    if getattr(text, "hidden_size_per_layer_input", 0):
        raise refusal(model, "a table that says where per-layer embeddings are, as Gemma 4 has", "none")
    shape = embeddings.shape
    flat = [Call(c.path, c.module, _flat(c.input, shape), _flat(c.output, shape)) for c in calls]
    stack = _stack(model, flat, shape)
    layers = [call for call in flat if call.path.rpartition(".")[0] == stack]
    kinds = {tuple((name, type(part)) for name, part in layer.module.named_modules()): layer for layer in layers}
    outside = [call for call in flat if not call.path.startswith(stack + ".")]
    width = layers[0].input.shape[-1]
    embedding = _embedding(model, outside, layers[0].input, embeddings.flatten(0, 1), shape[0])
    ends = [call for call in outside if call.path and same(call.input, layers[-1].output)]
    ends.sort(key=lambda call: not is_norm(call.module, width))  # or, without a norm, the head itself
    if not ends:
        wanted = "a norm or a head that reads what the last decoder layer gives, as Llama's does"
        raise refusal(model, wanted, f"none behind its {type(layers[-1].module).__name__}")
    table = Family(
        name=config.model_type,
        model_types=(config.model_type,),
        layers=stack,
        final_norm=ends[0].path if is_norm(ends[0].module, width) else "",
        attention_norm=None,
        mlp_norm=None,
        **embedding,
    )
    return Frame(table, flat, list(kinds.values()), ends[0].path)


def inside(call: Call, other: Call) -> bool:
    """Is one call's module inside another's?"""
    return call.path.startswith(other.path + ".")


def refusal(model: nn.Module, wanted: str, found: str) -> InputError:
    """Of a model that no table can describe."""
    return expected(type(model).__name__, wanted, found)


def _stack(model: nn.Module, calls: list[Call], shape: torch.Size) -> str:
    """The path of the longest list of modules that all take and return the residual stream."""
    wide = {c.path for c in calls if c.input.dim() == 2 and c.input.shape == c.output.shape}
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    lengths = {path: len(x) for path, x in lists if all(f"{path}.{index}" in wide for index in range(len(x)))}
    if not any(lengths.values()):
        wanted = "a list of decoder layers that each run once on one residual stream, as Llama's"
        raise refusal(model, wanted, _other_layers(lists, calls, shape))
    return max(lengths, key=lengths.__getitem__)


def _other_layers(lists: list[tuple[str, nn.ModuleList]], calls: list[Call], shape: torch.Size) -> str:
    """What there is in place of layers that take and return the residual stream."""
    firsts = {f"{path}.0": layers[0] for path, layers in lists if len(layers)}
    alike = [c for c in calls if c.path in firsts and c.input.shape == c.output.shape and c.input.dim() > 2]
    if alike:
        return f"{type(alike[0].module).__name__} on {list(alike[0].input.shape)} for embeddings {list(shape)}"
    once = {c.path for c in calls}
    others = [type(layer).__name__ for path, layer in firsts.items() if path not in once]
    others = [name for name in others if "Layer" in name]
    return f"{others[0]}, which does not run once on one tensor" if others else "none"


def _embedding(
    model: nn.Module, calls: list[Call], entered: Tensor, embeddings: Tensor, prompts: int
) -> dict[str, Any]:
    """The table's fields on what is between the token embeddings and the first layer.

    Differences between prompts are compared, as positions add the same to every prompt.
    """

    def apart(x: Tensor) -> Tensor:
        x = x.unflatten(0, (prompts, -1))
        return x[1:] - x[:1]

    for call in [None, *calls]:
        x = embeddings if call is None else call.output
        if x.shape != entered.shape or (call is not None and not same(call.input, embeddings)):
            continue
        factor = float((apart(entered) * apart(x)).sum() / apart(x).square().sum())
        factor = 1.0 if abs(factor - 1) < 1e-5 else factor
        if same(apart(x) * factor, apart(entered)) and (call is None or factor == 1):
            if call is None:
                return {} if factor == 1 else {"embedding_multiplier": factor}
            return {"embedding_norm": call.path}
    for call in calls:
        if same(call.output, entered):  # usually a norm of the sum of tokens and positions
            return {"embedding_norm": call.path, "placed": True}
    wanted = "token embeddings, perhaps scaled or normalised, that start the residual stream, as Llama's and BLOOM's do"
    raise refusal(model, wanted, "something else")


def _flat(x: Tensor, shape: torch.Size) -> Tensor:
    """[B, T, X] -> [B·T, X]; other shapes stay."""
    return x.flatten(0, 1) if x.dim() == 3 and x.shape[:2] == shape[:2] else x


def centred(x: Tensor) -> Tensor:
    """x [N, D] less its mean over the tokens."""
    return x - x.mean(0)


def same(a: Tensor, b: Tensor) -> bool:
    """Up to rounding."""
    return a.shape == b.shape and bool((a - b).norm() <= 1e-4 * b.norm())
