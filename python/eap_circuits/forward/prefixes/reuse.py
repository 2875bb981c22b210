"""Whether prefixes can be reused, tried on one or two pairs of the data before they run.

Runs behind a model's cache may differ from plain ones in silence: a forward may ignore the cache, and an attention
function may place the mask as if there were none. So their logits are compared first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...adapters import Architecture
from ...errors import InputError, expected, out_of_memory, reason
from ...graph import Graph, Heads
from ...ranks import is_lost
from ...tasks import PairedDataset
from ..batches import Batch, batch_of
from ..runner import Runner
from ..want_of_memory import tried_twice
from .constant_hooks import refuse_hooks
from .remembered import once

# Plain runs differ by rounding, which grows with depth. torch may round float32 to a few digits in products.
_LEAST_EPS = 2.0**-20
_ROUNDED = {"tf32": 2.0**-10, "bf16": 2.0**-7}
_PLACED = "its norm of embeddings reads positions, too"
_STATES = "in some layers it keeps states, from which the model does not go on with several tokens"


def why_not_reused(arch: Architecture, heads: Heads, data: PairedDataset, reuse_prefix: bool = True) -> str | None:
    """Why runs behind the model's own cache cannot serve, as a clause of a sentence; None: they can.

    The model must be borrowed. It takes three passes of one pair, and two of two pairs more if prefixes differ in
    length; without prefixes none, or two for heads="query"; none at all where a trial has succeeded before.

    Raises:
        InputError: tokens see later ones, attention does not take a key and a value for each query head, or hooks of
            others change what they must not.
    """
    data = data.rows.data.scored_last()
    if arch.hooked:
        tried_twice(lambda: refuse_hooks(arch, data, logit_tolerance(arch)))
    pairs = _tried(data) if reuse_prefix else []
    if not pairs and arch.graph(heads).n_receivers != arch.graph("kv").n_receivers:
        pairs = [int(data.longer_lengths.argmax())]
    if not pairs:
        return None
    index = torch.tensor(pairs)
    lengths, prefixes = (int(x[index].max()) for x in (data.longer_lengths, data.first_difference))
    masked = lengths - int(data.first_difference[pairs[0]]) > 1
    way = (repr(arch.family), heads, reuse_prefix, len(pairs), masked)
    return once(arch.model, way, [lengths, prefixes], lambda: _trial(arch, heads, data[index], reuse_prefix))


def _tried(data: PairedDataset) -> list[int]:
    """The longest pair with a prefix and, if prefixes differ, the pair whose prefix differs most from its own."""
    start, lengths = data.first_difference, data.longer_lengths
    fit = start > 0
    if not fit.any():
        return []
    # A single token behind the cache sees all of it, whatever the mask.
    fit = fit & (lengths - start > 1) if (fit & (lengths - start > 1)).any() else fit
    longest = int(torch.where(fit, lengths, 0).argmax())
    other = int((start - start[longest]).abs().argmax())
    return [longest] if start[other] == start[longest] else [longest, other]


def _trial(arch: Architecture, heads: Heads, data: PairedDataset, reuse_prefix: bool) -> str | None:
    """The first pair by itself, then all together.

    Alone no place of the cache is empty, and no mask is given; together the shorter prefix is padded.
    """
    graph, plain_graph, every = arch.graph(heads), arch.graph("kv"), torch.arange(len(data))
    plain = _logits(arch, plain_graph, batch_of(data, every, False, arch.device))
    for n in range(1, len(data) + 1):
        whole, behind = (batch_of(data, every[:n], reuse, arch.device) for reuse in (False, reuse_prefix))
        right = plain.unflatten(0, (2, -1))[:, :n].flatten(0, 1)
        found = _PLACED if arch.family.placed and reuse_prefix else None
        found = found or _tried_run(lambda behind=behind: _logits(arch, graph, behind), right, arch)  # type: ignore[misc]
        if found is None:
            continue
        if _tried_run(lambda whole=whole: _logits(arch, graph, whole), right, arch) is not None:  # type: ignore[misc]
            if graph == plain_graph:
                wanted = "a model in which no prompt's logits depend on those beside it, as activations' scales do"
                raise expected("model", wanted, f"{type(arch.model).__name__}, whose do")
            name = type(arch.layers[0].attention).__name__
            raise expected("heads", f"'kv', as {name} does not take a key and a value for each query head", repr(heads))
        _check_causal(arch, whole, data.first_difference[:n])
        return _STATES if arch.keeps_states else found
    return None


def _logits(arch: Architecture, graph: Graph, batch: Batch) -> Tensor:
    """Of the corrupted prompts, then of the clean ones, [2·E, V]."""

    def run() -> Tensor:
        runner = Runner(arch, graph, batch)
        with torch.no_grad():
            return runner.logits(torch.cat([runner.embed(batch.corrupted), runner.embed(batch.clean)]), None, 1)

    return tried_twice(run)


def _tried_run(run: Callable[[], Tensor], plain: Tensor, arch: Architecture) -> str | None:
    """What is wrong with a run that should give the plain logits."""
    try:
        found = run()
    except InputError:
        raise
    except Exception as error:  # a model's own, of any kind
        if out_of_memory(error) or is_lost(error):
            raise
        return reason(error)
    apart = logit_distance(found, plain)
    if not of_rounding(apart, logit_tolerance(arch)):
        return f"behind it logits differ from plain ones by {float(apart.nan_to_num().max()):.2g} of their size"
    return None


def logit_distance(found: Tensor, plain: Tensor) -> Tensor:
    """Each row's relative difference, without what is added to all logits of a row alike."""
    found, plain = (x.double() - x.double().mean(1, keepdim=True) for x in (found, plain))
    return (found - plain).norm(dim=1) / plain.norm(dim=1).clamp(min=1e-30)


def of_rounding(apart: Tensor, tolerance: float) -> bool:
    """Are distances no larger than this? Logits that are not finite are said to be so where the metric is taken."""
    # A tensor that has only a shape passes, whether it answers every question with no, as `Shape` does, or with yes.
    return not bool((~(apart.nan_to_num(0) <= tolerance)).any())


def logit_tolerance(arch: Architecture) -> float:
    """The root of the coarsest weights' precision, or of what torch may round float32 to in products; integers are
    quantised weights."""
    dtypes = {weight.dtype for weight in arch.model.parameters()}
    known = (dtype if dtype.is_floating_point else torch.bfloat16 for dtype in dtypes)
    backends: Any = torch.backends
    products = backends.cuda.matmul if arch.device_kind == "cuda" else backends.mkldnn.matmul
    rounded = _ROUNDED.get(products.fp32_precision, 0.0) if torch.float32 in dtypes else 0.0
    return float(max(_LEAST_EPS, rounded, *(torch.finfo(dtype).eps for dtype in known)) ** 0.5)


def _check_causal(arch: Architecture, whole: Batch, first: Tensor) -> None:
    """Refuse a model in which the token before the first difference tells the two prompts apart."""
    before = (first - 1).clamp(min=0).to(whole.scored.device)
    same = (first > 0).to(whole.scored.device)
    corrupted, clean = _logits(arch, arch.graph("kv"), replace(whole, scored=before, corrupted_scored=before)).chunk(2)
    if not of_rounding(logit_distance(corrupted, clean)[same], logit_tolerance(arch)):
        name = type(arch.model).__name__
        raise expected(name, "a causal language model, in which no token sees later ones", "one in which they do")
