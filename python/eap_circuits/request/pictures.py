"""Pairs of prompts with pictures, from what a model's processor makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..adapters import Architecture, bind
from ..errors import expected, instance, known_arguments
from ..forward import Hooks, Runner, batch_of, borrowed, logit_distance, logit_tolerance, one_want_of_memory
from ..modules.loans import gives_back
from ..ranks import together
from ..tasks import PairedDataset, Pictures

# Arguments of a forward with which a processor marks pictures' tokens by 1.
_TYPES = ("token_type_ids", "mm_token_type_ids")
_WANTED = "a model in which pictures only stand in place of tokens, as in Gemma 3, LLaVA and Qwen2.5-VL"
_FAR = 1e-3  # by this share a picture's token differs from the embedding of the token in whose place it stands


@together
@gives_back
@one_want_of_memory
@known_arguments
def image_pairs(
    model: nn.Module,
    clean: Mapping[str, Tensor],
    corrupted: Mapping[str, Tensor],
    answers: object,
    *,
    name: str = "data",
) -> PairedDataset:
    """Prompt pairs with pictures, which may differ in the picture, in the text or in both.

    The model sees each picture once, here. What it makes of it are embeddings that stand in the prompt in place of
    tokens: in the pairs they are tokens with ids of their own, and part of `input`. So everything that takes pairs
    takes these, with this model; prompts run whole.

    Args:
        model: a vision-language model, whose pictures are such embeddings (Gemma 3, LLaVA, Qwen2.5-VL, Qwen3-VL).
        clean, corrupted: what the model's processor returns for the prompts of one side: `input_ids` and, if there is
            padding, `attention_mask`, int64 [E, T]; the pictures (`pixel_values`), and whatever else the model takes.
        answers: int64 [E, 2] (good, bad) token ids, or sets of them; see `PairedDataset`.
        name: see `PairedDataset`.

    Raises:
        InputError: prompts without pictures; or a model in which pictures do more than stand in place of tokens, as in
            cross-attention.

    Example:
        >>> pairs = eap.image_pairs(vision_model, clean_inputs, corrupted_inputs, answers=[[3, 4], [4, 3], [5, 3]])
        >>> scores = eap.attribute(vision_model, pairs, method="eap")
    """
    return paired(bind(model), [("", clean, corrupted)], answers=answers, name=name)


def paired(
    arch: Architecture, given: Iterable[tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]]], **fields: Any
) -> PairedDataset:
    """Pairs of what a processor returns for clean and corrupted prompts.

    Args:
        given: (what errors put before the side, clean, corrupted); each of these runs by itself.
        fields: further ones of `PairedDataset.from_tokens`.
    """
    if arch.per_layer is not None or arch.encoder or arch.family.placed:
        raise expected("model", _WANTED, f"{type(arch.model).__name__}, which reads tokens in other ways too")
    with borrowed(arch.model), torch.no_grad():
        ran = [
            (_seen(arch, f"{label}clean", clean), _seen(arch, f"{label}corrupted", corrupted))
            for label, clean, corrupted in given
        ]
        sides = [_joined(side) for side in zip(*ran, strict=True)]
        shown, shifts = torch.cat([side.shown for side in sides]), torch.cat([side.shifts for side in sides])
        # In float64, which holds both exactly, they are told apart together.
        alike = torch.cat([shown.flatten(1).double(), shifts.flatten(1).double()], 1)
        distinct, which = alike.unique(dim=0, return_inverse=True)
        for side, own in zip(sides, which.split([len(side.shown) for side in sides]), strict=True):
            side.ids[side.places] = arch.vocabulary() + own
        written, places = distinct.tensor_split([shown[0].numel()], 1)
        written, places = (
            written.to(shown.dtype).unflatten(1, shown.shape[1:]),
            places.long().unflatten(1, shifts.shape[1:]),
        )
        pictures = Pictures(
            written[:, 0],
            arch.vocabulary(),
            sides[0].types,
            shifts=places if places.numel() else None,
            stacked=written[:, 1:] if arch.stacked else None,
        )
        data = PairedDataset.from_tokens(
            sides[0].ids,
            sides[1].ids,
            attention_mask=sides[0].mask,
            corrupted_attention_mask=sides[1].mask,
            pictures=pictures,
            **fields,
        )
        _check_logits(arch, data, [side.logits for side in sides], max(len(one.ids) for one, _ in ran))
    return data


@dataclass(frozen=True)
class _Side:
    """Prompts of one side, and a plain run of them.

    Attributes: `ids` and `mask`, int64 [E, T]; `places` bool [E, T], where pictures stand; `shown` [N, 1 + L, D], what
    is there, and what is added behind each of the first L layers; `shifts` [N, A, 2], see `Pictures`, where A may be 0;
    `logits` [E, V] behind the last tokens; `types`, see `Pictures`. All on the CPU.
    """

    ids: Tensor
    mask: Tensor
    places: Tensor
    shown: Tensor
    shifts: Tensor
    logits: Tensor
    types: str


def _joined(sides: Sequence[_Side]) -> _Side:
    """Prompts that ran apart, padded on the right."""
    widest = max(side.ids.shape[1] for side in sides)
    found = {name: [getattr(side, name) for side in sides] for name in ("ids", "mask", "places")}
    padded = {name: torch.cat([pad(x, (0, widest - x.shape[1])) for x in each]) for name, each in found.items()}
    others = {name: torch.cat([getattr(side, name) for side in sides]) for name in ("shown", "shifts", "logits")}
    return _Side(**padded, **others, types=sides[0].types)


def _seen(arch: Architecture, label: str, given: Mapping[str, Tensor]) -> _Side:
    instance(label, given, Mapping)  # type: ignore[type-abstract]
    ids = instance(f"{label}'s input_ids", given.get("input_ids"), Tensor)
    mask = given.get("attention_mask", torch.ones_like(ids)).cpu()
    there = {key: x.to(arch.device) if isinstance(x, Tensor) else x for key, x in given.items()}
    began: list[Tensor] = []
    positions: list[object] = []
    stacked: list[Any] = []
    rows, last = torch.arange(len(ids)), ids.shape[1] - 1 - mask.flip(1).argmax(1)
    with Hooks(tokens=ids.shape[1]) as hooks:
        hooks.on_input(arch.layers[0].module, began.append)
        for module in arch.model.modules():
            if hasattr(module, "rope_deltas"):  # where a run leaves positions for the next one
                hooks.set_attribute(module, "rope_deltas", None)
        stack = arch.model.get_submodule(arch.family.layers.rpartition(".")[0])
        hooks.on_argument(stack, "position_ids", positions.append)
        if arch.family.stacked is not None:
            hooks.on_argument(stack, arch.family.stacked[1], stacked.append)
        if arch.head is not None:
            hooks.on_input(arch.head, lambda x: x[rows.to(x.device), last.to(x.device)][:, None])
        logits = arch.model(**there, use_cache=False).logits
    ids, known, real = ids.cpu().clone(), arch.vocabulary(), mask.bool()
    text = arch.embed(ids.clamp(max=known - 1).to(arch.device))
    far = (began[0] - text).norm(dim=-1) > _FAR * text.norm(dim=-1)
    places = real & ((ids >= known) | far.cpu())
    if not places.any() or torch.isin(ids[real & ~places], ids[places]).any():
        wanted = "prompts in which pictures stand in place of some tokens, the same ones everywhere"
        raise expected(label, wanted, "none" if not places.any() else "embeddings that differ elsewhere")
    marks = {key: there[key].cpu().bool() & real for key in _TYPES if key in given}
    return _Side(
        ids,
        mask,
        places,
        shown=torch.stack([began[0].cpu()[places], *(x.to(began[0]).cpu() for each in stacked for x in each or ())], 1),
        shifts=_shifts(positions[0], mask, places)[places],
        logits=(logits[:, 0] if logits.shape[1] == 1 else logits[rows, last]).cpu(),
        types=next((key for key, mark in marks.items() if torch.equal(mark, places)), ""),
    )


def _shifts(positions: object, mask: Tensor, places: Tensor) -> Tensor:
    """`Pictures.shifts` of every token, [E, T, A, 2], from positions on several axes, [A, E, T]; else A is 0."""
    if not isinstance(positions, Tensor) or positions.dim() != 3:
        return torch.zeros(*mask.shape, 0, 2, dtype=torch.int64)
    own = positions.cpu().movedim(0, 2) - (mask.cumsum(1) - 1)[..., None]
    last = mask.shape[1] - 1
    text = torch.arange(last + 1).where(mask.bool() & ~places, last)
    behind = text.flip(1).cummin(1).values.flip(1)  # the token of text at or behind each
    return torch.stack([own, own.gather(1, behind[..., None].expand_as(own))], -1)


def _check_logits(arch: Architecture, data: PairedDataset, right: list[Tensor], most: int) -> None:
    """Refuse pictures that do more than stand in place of tokens; `most` prompts run at once."""
    every = data.scored_last()
    for index in torch.arange(len(every)).split(most):
        batch = batch_of(every, index, False, arch.device)
        runner = Runner(arch, arch.graph("kv"), batch)
        for corrupted, tokens in enumerate((batch.clean, batch.corrupted)):
            found = runner.logits(runner.embed(tokens), None, corrupted).cpu()
            if not logit_distance(found, right[corrupted][index]).max() <= logit_tolerance(arch):
                raise expected(
                    "model", _WANTED, f"{type(arch.model).__name__}, whose logits depend on them in other ways too"
                )
