"""Does a model do what its table says? Seen on one prompt, before its first run and again after it was changed.

A table is found by the model's type. Code that comes with a model, a subclass, a hook or another configuration may make
something else of the same modules, and results would be wrong in silence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters import Architecture, is_in_parts
from ..errors import expected, out_of_memory
from ..forward import Batch, Hooks, Runner, batch_of, logit_distance, logit_tolerance, once, tried_twice
from ..modules.shapes import Shape
from ..ranks import is_lost
from ..recording import compare_sums, reads_past_receivers
from ..tasks import PairedDataset, different_throughout

_LOGITS = 64  # the most that are computed by themselves and compared
_GROSS = 8  # a rounding may choose other experts, which moves logits by more than roundings do
_PICKED = "some tokens' logits by themselves are not what they are beside all others"


def fitting(arch: Architecture, data: PairedDataset) -> Architecture:
    """The architecture, which computes all logits where some by themselves are not the model's.

    The model must be borrowed. It takes four passes of the longest clean prompt, and of the same with another last
    token. Encoder-decoders, prompts with pictures, and weights that are not there or in parts on ranks are not looked
    at.

    Raises:
        InputError: tokens see later ones, logits are not the model's own, what nodes write does not add up to what
            others read, or they read the residual stream in another way, too.
    """
    without = isinstance(next(arch.model.parameters(), None), Shape)
    if without or arch.encoder or data.pictures is not None or is_in_parts(arch.model):
        return arch
    longest = int(data.lengths.argmax())
    tokens = data.clean[longest, : int(data.lengths[longest])]
    way = "fits", repr(arch.family), arch.after_norms
    why = once(arch.model, way, [], lambda: tried_twice(lambda: _trial(arch, tokens)))
    return arch if why is None else replace(arch, picks=False)


def _trial(arch: Architecture, tokens: Tensor) -> str | None:
    name, graph, tolerance = type(arch.model).__name__, arch.graph("kv"), logit_tolerance(arch)
    batch = _batch(arch, tokens)
    first, own = _own(arch, batch)
    if (
        arch.causal
        and not arch.classifies
        and len(tokens) > 1
        and bool((logit_distance(first[:1], first[1:]) > tolerance).any())
    ):
        raise expected(name, "a causal language model, in which no token sees later ones", "one in which they do")
    last = _vocabulary(arch) - 1
    picked = torch.linspace(0, last, min(_LOGITS, 1 + last // 2)).long().to(arch.device)
    for some in (picked, None) if arch.picks_logits else (None,):
        try:
            sums, sides = compare_sums(Runner(arch, graph, batch, some))
        except Exception as error:  # of what follows the head
            if some is None or out_of_memory(error) or is_lost(error):
                raise
            continue
        found = torch.cat([sides.corrupted_logits, sides.clean_logits])
        apart = logit_distance(found, own if some is None else own[:, some])
        if not bool((apart > _GROSS * tolerance).any()):
            break
    else:
        wanted = f"the model's own logits where its parts run as its table ({arch.family.name!r}) says"
        raise expected(name, wanted, f"others, {float(apart.max()):.2g} of their size away")
    # What enters norms after attention does not add up.
    for site, difference, missing, size in sums if arch.after_norms else ():
        # Each of the senders may have rounded the stream.
        if missing > tolerance * difference + tolerance**2 * size * site.reach**0.5:
            where = graph.receivers[site.receivers.start]
            wanted = f"nodes that add what they write to the residual stream, as its table ({arch.family.name!r}) says"
            share = f"{missing / difference:.2g} of its change"
            raise expected(name, wanted, f"a stream that is {share} away from their sum at {where}")
    if (sender := reads_past_receivers(Runner(arch, graph, batch))) is not None:
        wanted = f"layers that read the residual stream only where its table ({arch.family.name!r}) says"
        raise expected(name, wanted, f"another way from it to {sender}")
    return _PICKED if arch.picks_logits and some is None else None


def _batch(arch: Architecture, tokens: Tensor) -> Batch:
    """A prompt, and the same with another last token as the corrupted one."""
    other, different = tokens.clone(), tokens[tokens != tokens[-1]]
    # One of the prompt's own is no padding, and stands for no picture.
    other[-1] = different[0] if len(different) else (tokens[-1] + 1) % _vocabulary(arch)
    data = PairedDataset(tokens[None], other[None], torch.tensor([len(tokens)]), tokens.new_empty(1, 2, 0))
    return batch_of(data if arch.causal else different_throughout(data), torch.arange(1), False, arch.device)


def _vocabulary(arch: Architecture) -> int:
    model: Any = arch.model
    ends: tuple[Any, Any] = (model.get_input_embeddings(), arch.head)
    return min(len(end.weight) for end in ends if hasattr(end, "weight"))


def _own(arch: Architecture, batch: Batch) -> tuple[Tensor, Tensor]:
    """The plain model's logits behind the first token and behind the last, [2, V] each; a classifier's twice."""
    model: Any = arch.model
    ends = []
    for tokens in (batch.corrupted, batch.clean):  # each by itself, as a classifier looks for padding
        with torch.no_grad(), Hooks(tokens=tokens.shape[1]) as hooks:
            if arch.head is not None and not arch.classifies:
                hooks.on_input(arch.head, lambda x: x[:, [0, -1]])
            logits = model(input_ids=tokens, use_cache=False).logits[0]
        ends.append(logits.view(-1, logits.shape[-1])[[0, -1]])
    first, last = torch.stack(ends, 1)
    return first, last
