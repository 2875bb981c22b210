"""Pairs of prompts with pictures, from what a model's processor makes of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..adapters import Architecture, bind
from ..errors import expected, instance, known_arguments
from ..forward import Hooks, Runner, batch_of, borrowed, logit_distance, logit_tolerance, one_want_of_memory
from ..modules.loans import gives_back
from ..ranks import together
from ..tasks import PairedDataset, Pictures
from .asked import vocabulary

# Arguments of a forward with which a processor marks pictures' tokens by 1.
_TYPES = ("token_type_ids", "mm_token_type_ids")
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
        model: a vision-language model, whose pictures are such embeddings (Gemma 3, LLaVA, Qwen2.5-VL).
        clean, corrupted: what the model's processor returns for the prompts of one side: `input_ids` and, if there is
            padding, `attention_mask`, int64 [E, T]; the pictures (`pixel_values`), and whatever else the model takes.
        answers: int64 [E, 2] (good, bad) token ids, or sets of them; see `PairedDataset`.
        name: see `PairedDataset`.

    Raises:
        InputError: prompts without pictures; or a model in which pictures do more than stand in place of tokens, as in
            cross-attention, or where later layers read them again (Qwen3-VL).

    Example:
        >>> pairs = eap.image_pairs(vision_model, clean_inputs, corrupted_inputs, answers=[[3, 4], [4, 3], [5, 3]])
        >>> scores = eap.attribute(vision_model, pairs, method="eap")
    """
    arch = bind(model)
    with borrowed(arch.model), torch.no_grad():
        sides = [_Side(arch, *given) for given in (("clean", clean), ("corrupted", corrupted))]
        shown, shifts = torch.cat([side.shown for side in sides]), torch.cat([side.shifts for side in sides])
        # In float64, which holds both exactly, they are told apart together.
        alike = torch.cat([shown.double(), shifts.flatten(1).double()], 1)
        distinct, which = alike.unique(dim=0, return_inverse=True)
        for side, own in zip(sides, which.split([len(side.shown) for side in sides]), strict=True):
            side.ids[side.places] = vocabulary(arch.model) + own
        embeddings, places = distinct.tensor_split([shown.shape[1]], 1)
        places = places.long().unflatten(1, shifts.shape[1:])
        pictures = Pictures(
            embeddings.to(shown.dtype), vocabulary(arch.model), sides[0].types, places if places.numel() else None
        )
        data = PairedDataset.from_tokens(
            sides[0].ids,
            sides[1].ids,
            answers=answers,
            name=name,
            attention_mask=sides[0].mask,
            corrupted_attention_mask=sides[1].mask,
            pictures=pictures,
        )
        _check_logits(arch, data, [side.logits for side in sides])
    return data


class _Side:
    """The prompts of one side, and a plain run of them.

    Attributes: `ids` and `mask`, int64 [E, T]; `places` bool [E, T], where pictures stand; `shown` [N, D], what is
    there; `types`, see `Pictures`; `shifts` [N, A, 2], likewise, where A may be 0; `logits` [E, V] behind the last
    tokens. All on the CPU.
    """

    def __init__(self, arch: Architecture, label: str, given: Mapping[str, Tensor]) -> None:
        instance(label, given, Mapping)  # type: ignore[type-abstract]
        ids = instance(f"{label}'s input_ids", given.get("input_ids"), Tensor)
        mask = given.get("attention_mask", torch.ones_like(ids))
        self.ids, self.mask = ids.cpu().clone(), mask.cpu()
        there = {key: x.to(arch.device) if isinstance(x, Tensor) else x for key, x in given.items()}
        began: list[Tensor] = []
        positions: list[object] = []
        rows, last = torch.arange(len(ids)), ids.shape[1] - 1 - self.mask.flip(1).argmax(1)
        with Hooks(tokens=ids.shape[1]) as hooks:
            hooks.on_input(arch.layers[0].module, began.append)
            for module in arch.model.modules():
                if hasattr(module, "rope_deltas"):  # where a run leaves positions for the next one
                    hooks.set_attribute(module, "rope_deltas", None)
            stack = arch.model.get_submodule(arch.family.layers.rpartition(".")[0])
            hooks.on_argument(stack, "position_ids", positions.append)
            if arch.head is not None:
                hooks.on_input(arch.head, lambda x: x[rows.to(x.device), last.to(x.device)][:, None])
            logits = arch.model(**there, use_cache=False).logits
        self.logits = (logits[:, 0] if logits.shape[1] == 1 else logits[rows, last]).cpu()
        known, real = vocabulary(arch.model), self.mask.bool()
        text = arch.embed(self.ids.clamp(max=known - 1).to(arch.device))
        far = (began[0] - text).norm(dim=-1) > _FAR * text.norm(dim=-1)
        self.places = real & ((self.ids >= known) | far.cpu())
        if not self.places.any() or torch.isin(self.ids[real & ~self.places], self.ids[self.places]).any():
            wanted = "prompts in which pictures stand in place of some tokens, the same ones everywhere"
            raise expected(label, wanted, "none" if not self.places.any() else "embeddings that differ elsewhere")
        self.shown = began[0].cpu()[self.places]
        self.shifts = self._shifts(positions[0])[self.places]
        marks = {key: there[key].cpu().bool() & real for key in _TYPES if key in given}
        self.types = next((key for key, mark in marks.items() if torch.equal(mark, self.places)), "")

    def _shifts(self, positions: object) -> Tensor:
        """`Pictures.shifts` of every token, [E, T, A, 2], from positions on several axes, [A, E, T]; else A is 0."""
        if not isinstance(positions, Tensor) or positions.dim() != 3:
            return torch.zeros(*self.ids.shape, 0, 2, dtype=torch.int64)
        own = positions.cpu().movedim(0, 2) - (self.mask.cumsum(1) - 1)[..., None]
        last = self.ids.shape[1] - 1
        text = torch.arange(last + 1).where(self.mask.bool() & ~self.places, last)
        behind = text.flip(1).cummin(1).values.flip(1)  # the token of text at or behind each
        return torch.stack([own, own.gather(1, behind[..., None].expand_as(own))], -1)


def _check_logits(arch: Architecture, data: PairedDataset, right: list[Tensor]) -> None:
    """Refuse pictures that do more than stand in place of tokens."""
    every = data.scored_last()
    batch = batch_of(every, torch.arange(len(every)), False, arch.device)
    runner = Runner(arch, arch.graph("kv"), batch)
    for corrupted, tokens in enumerate((batch.clean, batch.corrupted)):
        found = runner.logits(runner.embed(tokens), None, corrupted).cpu()
        if not logit_distance(found, right[corrupted]).max() <= logit_tolerance(arch):
            wanted = "a model in which pictures only stand in place of tokens, as in Gemma 3, LLaVA and Qwen2.5-VL"
            found_is = f"{type(arch.model).__name__}, whose logits depend on them in other ways too"
            raise expected("model", wanted, found_is)
