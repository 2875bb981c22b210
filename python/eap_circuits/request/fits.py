"""Does a model do what its table says? Seen on one prompt, before its first run and again after it was changed.

A table is found by the model's type. Code that comes with a model, a subclass, a hook or another configuration may make
something else of the same modules, and results would be wrong in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from ..adapters import Architecture, departure, is_built_in, is_in_parts, runs_tested_code
from ..errors import InputError, expected, out_of_memory, reason
from ..forward import (
    Batch,
    Hooks,
    Runner,
    batch_of,
    logit_distance,
    logit_tolerance,
    of_rounding,
    once,
    tried_twice,
    two_sides,
    why_not_reused,
)
from ..graph import Heads
from ..modules.shapes import Shape
from ..ranks import is_lost
from ..recording import compare_sums, reads_past_receivers
from ..tasks import PairedDataset, different_throughout

_LOGITS = 64  # the most that are computed by themselves and compared
_GROSS = 8  # a rounding may choose other experts, which moves logits by more than roundings do
_PICKED = "some tokens' logits by themselves are not what they are beside all others"


def tried(
    arch: Architecture, heads: Heads, data: PairedDataset, reuse_prefix: bool = True
) -> tuple[Architecture, str | None]:
    """`fitting`, and `why_not_reused`.

    Raises:
        InputError: as these, or the model does not run on a prompt's tokens.
    """
    with told(arch):
        why = why_not_reused(arch, heads, data, reuse_prefix)
        return fitting(arch, data), why


@contextmanager
def told(arch: Architecture) -> Iterator[None]:
    """For a model's first runs: its own errors, of any kind, are told in a sentence; those of hooks are the user's."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if arch.hooked or out_of_memory(error) or is_lost(error):
            raise
        raise expected(type(arch.model).__name__, "a model that runs on a prompt's tokens", reason(error)) from error


def fitting(arch: Architecture, data: PairedDataset) -> Architecture:
    """The architecture, which computes all logits where some by themselves are not the model's.

    The model must be borrowed. It takes four passes of the longest clean prompt, and of the same with another last
    token. Weights that are not there or in parts on ranks are not looked at, nor, off the CPU, where few tokens take as
    long as many, a model whose code and table the tests run; of prompts with pictures only projections are, and of
    encoder-decoders not what they read.

    Raises:
        InputError: a projection is not linear, tokens see later ones, logits are not the model's own, what nodes write
            does not add up to what others read, or they read the residual stream in another way, too.
    """
    if isinstance(next(arch.model.parameters(), None), Shape) or is_in_parts(arch.model):
        return arch
    if arch.device.type != "cpu" and _is_tested(arch):
        return arch
    once(arch.model, ("linear", repr(arch.family)), [], lambda: _check_linear(arch))
    if data.pictures is not None:
        return arch
    way = "fits", repr(arch.family), arch.after_norms, arch.around and ref(arch.around)
    why = once(arch.model, way, [], lambda: tried_twice(lambda: _trial(arch, data)))
    return arch if why is None else replace(arch, picks=False)


def _is_tested(arch: Architecture) -> bool:
    own = is_built_in(arch.family) and not arch.hooked and arch.around is None
    return own and runs_tested_code(arch.model)


def _check_linear(arch: Architecture) -> None:
    """Refuse projections that are not what their weights say, with which scores and circuits count, and any linear
    layer with other gradients than those of what it computes."""
    names, tolerance = {module: name for name, module in arch.model.named_modules()}, logit_tolerance(arch)
    read = dict.fromkeys(each for layer in arch.layers for each in (*layer.projection_modules, layer.out))
    others = [each for layer in arch.layers for each in layer.module.modules() if hasattr(each, "in_features")]
    for module in dict.fromkeys([*read, *others]):
        try:
            value, slope = departure(module)
        except Exception as error:
            if module in read or out_of_memory(error):
                raise
            continue  # some take more than one tensor
        name = f"{type(arch.model).__name__}.{names.get(module, 'a projection')}"
        if module in read and value > tolerance:
            wanted = "a linear layer, as its weights are read from what it gives for unit vectors"
            raise expected(name, wanted, f"a {type(module).__name__} that is {value:.2g} away from one")
        if value <= tolerance < slope:
            found = f"others, {slope:.2g} away, in {type(module).__name__}"
            raise expected(name, "the gradients of what it computes", found)


def _trial(arch: Architecture, data: PairedDataset) -> str | None:
    name, graph, tolerance = type(arch.model).__name__, arch.graph("kv"), logit_tolerance(arch)
    batch = _batch(arch, data)
    (other, first), own = torch.stack([_own(arch, batch, tokens) for tokens in (batch.corrupted, batch.clean)], 1)
    said = "language model"
    if batch.decoder is not None:
        said, changed = "decoder", _with_another_end(batch.decoder.clean[0], arch.vocabulary(decoder=True))
        other = _own(arch, replace(batch, decoder=replace(batch.decoder, clean=changed[None])), batch.clean)[0]
    looks_ahead = not of_rounding(logit_distance(other[None], first[None]), tolerance)
    if (arch.causal or arch.encoder) and not arch.classifies and batch.end.clean.numel() > 1 and looks_ahead:
        raise expected(name, f"a causal {said}, in which no token sees later ones", "one in which they do")
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
        if of_rounding(apart, _GROSS * tolerance):
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
    if not arch.encoder and (sender := reads_past_receivers(Runner(arch, graph, batch))) is not None:
        wanted = f"layers that read the residual stream only where its table ({arch.family.name!r}) says"
        raise expected(name, wanted, f"another way from it to {sender}")
    return _PICKED if arch.picks_logits and some is None else None


def _batch(arch: Architecture, data: PairedDataset) -> Batch:
    """The longest prompt, and the same with another last token as the corrupted one; the most that a decoder reads."""
    longest = int(data.lengths.argmax())
    tokens, read = data.clean[longest, : int(data.lengths[longest])], None
    if data.decoder is not None:
        most = data.decoder[int((data.decoder >= 0).sum(1).argmax())]
        read = most[None, most >= 0]
    other = _with_another_end(tokens, _vocabulary(arch))
    size, answers = torch.tensor([len(tokens)]), tokens.new_empty(1, 2, 0)
    pair = PairedDataset(tokens[None], other[None], size, answers, decoder=read)
    return batch_of(pair if arch.causal else different_throughout(pair), torch.arange(1), False, arch.device)


def _with_another_end(tokens: Tensor, vocabulary: int) -> Tensor:
    other, different = tokens.clone(), tokens[tokens != tokens[-1]]
    # One of the prompt's own is no padding, and stands for no picture.
    other[-1] = different[0] if len(different) else (tokens[-1] + 1) % vocabulary
    return other


def _vocabulary(arch: Architecture) -> int:
    head = getattr(arch.head, "weight", None)
    return min(arch.vocabulary(), len(head)) if isinstance(head, Tensor) else arch.vocabulary()


def _own(arch: Architecture, batch: Batch, tokens: Tensor) -> Tensor:
    """The plain model's logits behind the first token and behind the last, [2, V]; a classifier's twice.

    Clean and corrupted tokens run by themselves, as a classifier looks for padding.
    """
    model: Any = arch.model if arch.around is None else arch.around
    given = {"input_ids": tokens} if batch.decoder is None else two_sides(batch, tokens)
    with torch.no_grad(), Hooks(tokens=batch.end.clean.shape[1]) as hooks:
        if arch.head is not None and not arch.classifies:
            hooks.on_input(arch.head, lambda x: x[:, [0, -1]])
        logits = model(**given, use_cache=False).logits[0]
    return logits.view(-1, logits.shape[-1])[[0, -1]]
