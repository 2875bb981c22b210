"""Everything that can be wrong with a model, its data and a metric is said here, before any work is done."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapters import Architecture, bind, configured, is_fully_sharded
from ..errors import InputError, expected, flag, function, instance, one_of, shown, warn, whole
from ..forward import Batch, Constants, Indices, Runner, make_batches, zeros
from ..graph import Graph, Heads
from ..metrics import METRICS, Metric, get_metric
from ..ranks import rank
from ..recording import ABLATIONS, Ablation, ablation_of
from ..tasks import PairedDataset, Pictures, different_throughout, longest
from .fits import try_model

if TYPE_CHECKING:
    from typing_extensions import Self

_LARGEST_BATCH = 2**31  # more examples than there are
Progress = Callable[[int, int], None]  # (examples done, examples in all)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `attribute`, `plan`, `evaluate` and the others are asked, checked: the bound model, the data, the metric,
    the ablation, and how the data are cut into batches.

    Args:
        constants: what the ablation puts in place of contributions, once `with_constants` has found them; None for
            patching.
        memory: bytes that the run may take beside the model and the data; None for a share of what is free.
    """

    arch: Architecture
    data: PairedDataset
    metric: Metric
    ablation: str | Constants = "patching"
    ablation_data: PairedDataset | None = None
    constants: Constants | None = None
    batch_size: int | None = None
    reuse_prefix: bool = True
    memory: int | None = None
    sent: Indices = field(default_factory=Indices, repr=False)  # lists of the run that were sent to its devices
    looked_at: set[int] = field(default_factory=set, repr=False)  # examples whose answers' spelling was compared

    def refuse_parts(self) -> None:
        """Refuse a model of which each rank has a part, where circuits run with gradients."""
        if is_fully_sharded(self.arch.model):
            raise expected("model", "whole weights, to learn with", "parts of them on every rank (fully_shard)")

    def check_one_stream(self, what: str) -> None:
        """Refuse an encoder-decoder, whose graph has two residual streams, where `what` is for one."""
        if self.arch.encoder:
            found = f"an encoder-decoder, {type(self.arch.model).__name__}"
            raise expected("model", f"one that is no encoder-decoder, for {what}", found)

    def verified(self, heads: Heads) -> Self:
        """The request after `try_model`, without prefix reuse if the model's cache cannot serve, which a warning says;
        the model must be borrowed already."""
        arch, why = try_model(self.arch, heads, self.data, self.reuse_prefix)
        if why is not None:
            name = type(self.arch.model).__name__
            warn(f"{name}: prefixes are not reused, as its cache cannot serve ({why}).")
        return replace(self, arch=arch, reuse_prefix=self.reuse_prefix and why is None)

    def with_constants(self) -> Self:
        """The request with its constants, for which means are taken; the model must be borrowed already."""
        find = ablation_of(self.ablation).constants
        return replace(self, constants=find and find(self.arch, self.ablation_data or self.data))

    def batches(self, tokens: int) -> Iterator[Batch]:
        """The data in batches, of at most this many tokens where the user names no size."""
        arch = self.arch
        return make_batches(self.data, self.batch_size, self.reuse_prefix, arch.device, tokens, arch.hooked)

    def runner(self, graph: Graph, batch: Batch) -> Runner:
        """The model on a batch, with no more logits than the metric looks at."""
        return Runner(self.arch, graph, batch, batch.answer_tokens if self.metric.of_answers else None)


def prepare(
    model: nn.Module,
    data: PairedDataset,
    metric: object,
    ablation: str | Constants = "patching",
    batch_size: int | None = None,
    ablation_data: PairedDataset | None = None,
    reuse_prefix: bool = True,
    memory: int | str | None = None,
    compares: bool = True,
) -> Request:
    """Check a request; raises InputError with what is wrong. Without a metric it is the data's own.

    Args:
        compares: whether a metric is taken, and clean prompts are compared with what is put in their place.
    """
    data = replace(instance("data", data, PairedDataset))  # read anew, as tensors may have been changed in place
    if batch_size is not None:
        batch_size = min(whole("batch_size", batch_size, 1, note=", or None"), _LARGEST_BATCH)
    arch = bind(model)
    if ablation_data is not None:
        ablation_data = _taken(arch, instance("ablation_data", ablation_data, PairedDataset), "ablation_data")
    request = Request(
        arch=arch,
        data=_taken(arch, data, "data"),
        metric=get_metric(data.metric if metric is None else metric),  # type: ignore[arg-type]
        ablation=ablation,
        ablation_data=ablation_data,
        batch_size=batch_size,
        reuse_prefix=flag("reuse_prefix", reuse_prefix) and _may_reuse(arch, data),
        memory=parse_bytes(memory),
    )
    _check_ablation(request)
    if compares:
        _check_metric(request.metric, data)
        if request.data.alone and ablation_of(ablation).patches:
            wanted = "'zero', 'mean' or constants, as the data have no corrupted prompts"
            raise expected("ablation", wanted, repr(ablation))
    data = request.data
    check_tokens(request.arch, data)
    _check_places(request.arch, data)
    known = 0 if request.arch.classifies else request.arch.predicted
    if data.variants is not None and (data.variants >= known).any():
        data = replace(data, variants=data.variants.where(data.variants < known, -1))
        request = replace(request, data=data)
    # Constants stand in for contributions from the first token on; or the first token sees the others.
    throughout = not (request.arch.causal and ablation_of(ablation).patches)
    return replace(request, data=different_throughout(data)) if throughout else request


def _check_metric(metric: Metric, data: PairedDataset) -> None:
    """Refuse a metric that looks at what the data do not have."""
    looks_at, answers, wanted = metric.looks_at, data.answers, ""
    if looks_at in ("answers", "sequences") and not answers.numel():
        wanted = "one that needs no answers, as the data have none ('kl_divergence', 'next_token_loss')"
    elif looks_at == "answers" and answers.dim() == 4:
        known = ", ".join(repr(each.name) for each in METRICS.values() if each.looks_at == "sequences")
        most = (answers >= 0).sum(3).flatten(1).amax(1)
        example = int(most.argmax())
        wanted = f"one of {known}, as an answer of example {example} has {int(most[example])} tokens"
    elif looks_at == "sequences" and data.scored is not None:
        wanted = "one of scored positions, as the data say which are scored ('kl_divergence', 'next_token_loss')"
    elif looks_at == "targets" and (data.scored is None or data.targets is None):
        wanted = "one of a single position, as the data do not say which positions are scored (scored=)"
    elif looks_at == "targets" and data.scored is not None and data.targets is not None:
        without = ((data.scored >= 0) & (data.targets < 0)).any(1).nonzero()
        if len(without):
            wanted = f"one that needs no next tokens, as none follows a scored position of example {int(without[0])}"
    if wanted:
        raise expected("metric", wanted, repr(metric.name))


def _check_places(arch: Architecture, data: PairedDataset) -> None:
    """Refuse data that are scored where the model has nothing to say."""
    name, several = type(arch.model).__name__, data.answers.dim() == 4
    if arch.classifies and (several or data.scored is not None):
        found = "answers of several tokens" if several else "scored positions"
        raise expected("data", f"classes (ids) as answers, as {name} scores whole prompts", found)
    if not arch.classifies and not arch.causal and not arch.encoder and data.scored is None:
        wanted = f"a mask token in the prompts, or scored positions, as {name} predicts the token in its place"
        raise expected("data", wanted, "answers after the prompts")


def _taken(arch: Architecture, data: PairedDataset, label: str) -> PairedDataset:
    """The data as a model takes them: with the token that a decoder behind an encoder starts with, and with pictures on
    its device, where batch after batch looks them up. Refuses what an encoder-decoder does not take."""
    name, model = type(arch.model).__name__, arch.model
    if not arch.encoder:
        if data.decoder is not None:
            raise expected(label, f"none for a decoder (decoder=), as {name} is no encoder-decoder", "some")
        return data if data.pictures is None else replace(data, pictures=data.pictures.to(arch.device))
    if data.decoder is None:
        wanted = f"what {name}'s decoder reads behind its start token (decoder=, which may be empty)"
        raise expected(label, wanted, "none")
    others = {
        "answers of several tokens": data.answers.dim() == 4,
        "scored positions": data.scored is not None,
        "prompts of unequal lengths": data.alignment is not None,
    }
    for found in (what for what, there in others.items() if there):
        raise expected(label, f"pairs of equal lengths that one token answers, as {name} has an encoder", found)
    places: tuple[Any, ...] = getattr(model, "generation_config", None), model.config
    start = next((x for x in (getattr(each, "decoder_start_token_id", None) for each in places) if x is not None), None)
    if not isinstance(start, int) or start < 0:
        raise expected(f"{name}.generation_config.decoder_start_token_id", "a token id", repr(start))
    decoder = torch.cat([torch.full_like(data.lengths[:, None], start), data.decoder], 1)
    _warn_of_ends(decoder, model.config, label)
    return replace(data, decoder=decoder)


def _warn_of_ends(decoder: Tensor, config: Any, label: str) -> None:
    """Warn where a decoder [E, T'] reads its start token twice, or at the end what ends or pads texts."""
    ids = [getattr(config, name, None) for name in ("pad_token_id", "eos_token_id")]
    ends = torch.tensor([each for each in ids if isinstance(each, int)], dtype=torch.int64)
    last = (decoder >= 0).sum(1, keepdim=True) - 1
    ended = (last > 0) & torch.isin(decoder.gather(1, last), ends)
    odd = (decoder[:, 1:2] == decoder[:, :1]).any(1) | ended[:, 0]
    if odd.any():
        row = int(odd.nonzero()[0])
        own = decoder[row, 1 : 1 + int(last[row])].tolist()
        warn(
            f"{label}: of example {row} the decoder reads {own} behind its start token, {int(decoder[row, 0])}: these "
            "begin with that token once more, or end in padding (which is -1 here) or the end of a text."
        )


def check_ablation(arch: Architecture, ablation: str | Constants, other: PairedDataset | None) -> Ablation:
    """The ablation's entry; refuses an unknown one, constants of another model, and data that it does not take."""
    if isinstance(ablation, Constants):
        found, right = ([x.shape[1] for x in each.tensors] for each in (ablation, zeros(arch)))
        if found != right:
            raise expected("ablation", f"constants of this model, of widths {right}", found)
    else:
        one_of("ablation", ablation, ABLATIONS)
    entry = ablation_of(ablation)
    if other is not None:
        if not entry.from_data:
            what = "constants" if isinstance(ablation, Constants) else repr(ablation)
            names = ", ".join(repr(each.name) for each in ABLATIONS.values() if each.from_data)
            raise expected("ablation_data", f"none, except for {names}", f"some for {what}")
        instance("ablation_data", other, PairedDataset)
        check_tokens(arch, other, "ablation_data, ")
    return entry


def _check_ablation(request: Request) -> None:
    entry = check_ablation(request.arch, request.ablation, request.ablation_data)
    needed = longest(request.data)
    if isinstance(request.ablation, Constants):
        covered = len(request.ablation.embedding)
        if 1 < covered < max(needed):
            wanted = f"constants for {max(needed)} positions, the data's most, or for all alike"
            raise expected("ablation", wanted, covered)
    if request.ablation_data is not None and entry.by_position:
        given = longest(request.ablation_data)
        for read, most, covered in zip(("prompts", "decoders"), needed, given, strict=False):
            if covered < most:
                raise expected("ablation_data", f"{read} of {most} tokens, the data's most", f"at most {covered}")


def check_tokens(arch: Architecture, data: PairedDataset, label: str = "") -> None:
    config: Any = arch.model.config
    shown = 0 if data.pictures is None else _pictured(arch, data.pictures, label)
    for name in ("clean", "corrupted", "answers", "targets", "decoder"):
        tokens = getattr(data, name)
        classes = name == "answers" and arch.classifies
        if tokens is None or (classes and label):
            continue
        most = arch.predicted if name == "answers" else arch.vocabulary(name == "decoder")
        most = int(config.num_labels) if classes else most
        most += shown if name in ("clean", "corrupted") else 0
        beyond = (tokens >= most).flatten(1).any(1).nonzero()
        if len(beyond):
            example = int(beyond[0])
            wanted = f"{'classes' if classes else 'token ids'} below the model's {most}"
            raise expected(f"{label}{name} of example {example}", wanted, int(tokens[example].max()))
    limit = getattr(config, "max_position_embeddings", None)
    for place, module in arch.model.named_modules():
        if not place.endswith("position_embeddings"):
            continue
        if (first := getattr(module, "padding_idx", None)) is not None:  # RoBERTa counts positions from there
            limit = int(module.num_embeddings) - first - 1
            _refuse_padding(arch, data, int(first), label)
    lengths = data.longer_lengths
    if data.decoder is not None:
        lengths = lengths.maximum((data.decoder >= 0).sum(1))
    longest = int(lengths.argmax())
    if limit is not None and int(lengths[longest]) > limit:
        raise expected(f"{label}example {longest}", f"at most the model's {limit} tokens", f"{int(lengths[longest])}")
    for most in _turning_points(arch):
        rows = data.rows.data  # only here, as answers of several tokens make many
        run = torch.cat([rows.lengths] if rows.corrupted_lengths is None else [rows.lengths, rows.corrupted_lengths])
        if int(run.min()) <= most < int(run.max()):
            # The longest prompt of a pass decides for all of them.
            why = f"as {type(arch.model).__name__} turns longer ones by other angles (longrope)"
            wanted = f"prompts of at most {most} tokens each, or only longer ones, {why}"
            raise expected(f"{label}data", wanted, f"some of {int(run.min())} and some of {int(run.max())}")


def _refuse_padding(arch: Architecture, data: PairedDataset, padding: int, label: str) -> None:
    """Refuse prompts that hold a token which the model counts no position for: of embeddings it cannot tell."""
    others = data.lengths if data.corrupted_lengths is None else data.corrupted_lengths
    for name, lengths in (("clean", data.lengths), ("corrupted", others)) if not arch.family.placed else ():
        tokens: Tensor = getattr(data, name)
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        found = ((tokens == padding) & real).any(1).nonzero()
        if len(found):
            wanted = f"no padding token ({padding}), for which {type(arch.model).__name__} counts no position"
            raise expected(f"{label}{name} of example {int(found[0])}", wanted, "one")


def _turning_points(arch: Architecture) -> list[int]:
    """The lengths beyond which a pass turns all of its queries and keys by other angles."""
    config: Any = arch.model.config
    said = configured(config, "rope_parameters") or {}
    every = [said, *(each for each in said.values() if isinstance(each, dict))]  # one for each kind of layers
    found = (each.get("original_max_position_embeddings") for each in every if each.get("rope_type") == "longrope")
    return [int(most) for most in found if most]


def _may_reuse(arch: Architecture, data: PairedDataset) -> bool:
    """May prefixes be tried to be reused? Not those which by themselves would be turned by other angles."""
    turned = any(int(data.longer_lengths.max()) > most for most in _turning_points(arch))
    return data.pictures is None and not arch.hooked and not turned


def _pictured(arch: Architecture, pictures: Pictures, label: str) -> int:
    """How many tokens of pictures there are; refuses those of another model."""
    made_for, right = (pictures.first, pictures.embeddings.shape[-1]), (arch.vocabulary(), arch.d_model)
    if made_for != right or arch.family.placed or arch.encoder or arch.per_layer is not None:
        wanted = (
            f"pictures as {type(arch.model).__name__} sees them (image_pairs), ids from {right[0]}, width {right[1]}"
        )
        raise expected(f"{label}data", wanted, f"ids from {made_for[0]}, width {made_for[1]}")
    return len(pictures.embeddings)


def parse_bytes(memory: object, name: str = "memory") -> int | None:
    """Bytes of "8GiB", "500 MB" or a whole number of bytes; None stays None. `name` is what an error calls it."""
    if memory is None:
        return None
    wanted = 'bytes, such as "8GiB" or 500_000_000'
    if not isinstance(memory, str):
        try:
            return whole(name, memory, 0)
        except InputError as error:
            raise expected(name, wanted, shown(memory)) from error
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([a-zA-Z]*)\s*", memory)
    size = float(found[1]) * _UNITS.get(found[2].lower(), math.nan) if found else math.nan
    if not size < math.inf:
        raise expected(name, wanted, repr(memory))
    return int(size)


def watched(progress: Progress | bool | None) -> Progress | None:
    """What is called as the work goes on, on rank 0; for True it draws a bar of tqdm's on stderr."""
    if progress is not None and not isinstance(progress, bool):
        function("progress", progress, "True, or a function of (done, in all)")
    if progress is None or progress is False or rank() > 0:
        return None
    if progress is not True:
        return progress
    from tqdm.auto import tqdm

    bar: Any = tqdm()

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    return show
