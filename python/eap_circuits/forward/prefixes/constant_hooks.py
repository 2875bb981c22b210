"""Hooks of others, tried: between what adds up, and on what is known by its weights, they have to add constants."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ...adapters import Architecture, Place, Together, foreign_hooks
from ...errors import expected
from ...tasks import PairedDataset
from ..batches import Batch, batch_of
from ..hooks import Hooks

_IN, _OUT = "on_input", "on_output"
_KINDS = {_IN: ("_forward_pre_hooks",), _OUT: ("_forward_hooks",)}


def refuse_hooks(arch: Architecture, data: PairedDataset, tolerance: float) -> None:
    """Refuse hooks of others that do more to the residual stream, to what norms or projections read or give, or to what
    attention gives, than add the same whatever it is: contributions would not add up, or gradients not be those of the
    weights.

    The model must be borrowed. It takes a pass of one prompt, and beside it of other tokens.
    """
    batch = batch_of(data[[int(data.longer_lengths.argmax())]], torch.arange(1), False, arch.device)
    tokens = _beside_others(batch, arch.vocabulary())
    given = {"input_ids": tokens}
    if batch.decoder is not None:
        given["decoder_input_ids"] = _beside_others(batch.decoder, arch.vocabulary(decoder=True))
    names = {module: name for name, module in arch.model.named_modules()}
    seen: dict[tuple[nn.Module, str], list[Tensor]] = {}
    with torch.no_grad(), Hooks(tokens.shape[1]) as hooks:
        for module, side in _places(arch):
            changes = seen[module, side] = []
            getattr(hooks, side)(module, partial(_keep, changes), first=True)
            getattr(hooks, side)(module, partial(_keep, changes))
        arch.model(**given, use_cache=False)
    for (module, side), (before, after) in seen.items():
        one, other = (after - before).double().flatten(1)
        if (one - other).norm() > tolerance * before.double().norm():
            where = f"{'before' if side == _IN else 'on'} {names.get(module, type(module).__name__)}"
            raise expected("model", f"a hook {where} that adds the same to whatever it is given", "another")


def _beside_others(batch: Batch, vocabulary: int) -> Tensor:
    return torch.cat([batch.clean, batch.clean + 1]) % vocabulary


def _keep(changes: list[Tensor], x: Tensor) -> None:
    changes.append(x.clone())


def _places(arch: Architecture) -> list[tuple[nn.Module, str]]:
    """The modules before or behind which there are hooks of others that have to add constants."""
    found: dict[tuple[nn.Module, str], None] = {}
    for layer in arch.layers:
        through = (layer.attention_norm, layer.mlp_norm, layer.post_norm, layer.memory)
        norms = [each.module for each in through if each is not None]
        both = (layer.module, layer.attention, *layer.projection_modules, *norms, arch.final_norm.module)
        found |= dict.fromkeys([*((each, side) for each in both for side in (_IN, _OUT)), (layer.mlp_in, _IN)])
        # What enters it is what heads write.
        found |= {(layer.out, _OUT): None}
    plain = [(module, side) for module, side in found if not isinstance(module, (Place, Together))]
    return [(module, side) for module, side in plain if foreign_hooks(module, _KINDS[side])]
