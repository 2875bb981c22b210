"""What senders write in a pass, and its differences Δ between two, kept in head space until they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from eap_kernels import Nodes

from ..adapters import Place, SenderSite, sender_sites
from ..forward import Batch, Constants, Hooks, Register, Runner, at_tokens, each

T = TypeVar("T")
Pass = Callable[[Register], T]  # runs the model with the hooks that it is given


def record_senders(
    sites: Sequence[SenderSite], run: Pass[T], keep: Callable[[SenderSite, Tensor], Tensor]
) -> tuple[list[Tensor], T]:
    """(What `keep` makes of every site's part of a pass except for the embeddings', what `run` returns)."""
    kept: dict[int, Tensor] = {}

    def see(site: SenderSite, x: Tensor) -> None:
        kept[site.index] = keep(site, x)

    def register(hooks: Hooks) -> None:
        for site in sites:
            hooks.on_senders(site, partial(see, site))

    result = run(register)
    return [kept[site.index] for site in sites[1:]], result


@dataclass(frozen=True, eq=False)
class Contributions:
    """What every sender writes at a batch's rows, or differences of it.

    A head's contribution is its values times its slice of the output projection. Only the values are kept: per token
    L·(H·K + D) + D numbers instead of S·D.

    Args:
        sites: see `sender_sites`.
        values: of each site, [n, H·K] of heads, else [n, D]; n are the rows of its stream.
    """

    sites: Sequence[SenderSite]
    values: list[Tensor]

    def nodes(self, features: slice = slice(None)) -> Iterator[Nodes]:
        """The senders, in the graph's order, or some features of what they write.

        Each site's are made when they are asked for: its weights may be a copy.
        """
        return self.lowered(self.values[0].dtype)(features)

    def lowered(self, dtype: torch.dtype, stream: int | None = None) -> Callable[[slice], Iterator[Nodes]]:
        """`nodes` in this dtype, or those of one stream; no weight is widened for a low one."""
        sites = (site for site in self.sites if stream in (None, site.stream))
        values = {site: self.values[site.index].to(dtype) for site in sites}

        def nodes(features: slice) -> Iterator[Nodes]:
            for site, x in values.items():
                weight = site.weight(dtype, features)  # [H, K, features]
                yield Nodes(x[:, None, features] if weight is None else x.unflatten(1, weight.shape[:2]), weight)

        return nodes

    def minus(self, other: Contributions) -> Contributions:
        pairs = zip(self.values, other.values, strict=True)
        return Contributions(self.sites, [own - others for own, others in pairs])


@dataclass(frozen=True, eq=False)
class CorruptedSide:
    """A batch whose corrupted prompts have run.

    Args:
        senders: what every sender gives where it is ablated.
        clean_embeddings, corrupted_embeddings: [E, T, D], the latter aligned with the former.
        corrupted_logits: [E, V].
    """

    senders: Contributions
    clean_embeddings: Tensor
    corrupted_embeddings: Tensor
    corrupted_logits: Tensor


@dataclass(frozen=True, eq=False)
class BothSides(CorruptedSide):
    """A batch whose clean prompts have run too: `senders` are Δ_u = ablated − clean contribution; logits [E, V]."""

    clean_logits: Tensor


def record_both_sides(runner: Runner, constants: Constants | None = None, *watch: Register) -> BothSides:
    """Run both sides of a batch in one pass.

    Args:
        constants: what the ablated senders give, if not what they give in the corrupted run.
        watch: add hooks to the pass, in which the clean prompts come after the corrupted ones.
    """
    side, (clean_logits,) = _record(runner, constants, True, *watch)
    return BothSides(**vars(side), clean_logits=clean_logits)


def record_corrupted_side(runner: Runner, constants: Constants | None = None) -> CorruptedSide:
    """Run the corrupted side only, where a later pass runs the clean one: see `less_clean`."""
    return _record(runner, constants, False)[0]


def less_clean(side: CorruptedSide, batch: Batch, run: Pass[T]) -> tuple[Contributions, T]:
    """(Δ of every sender, what `run` returns), by a pass whose first copy of the batch is the clean prompts.

    The side's contributions turn into the differences one by one, so that only one copy is ever held.
    """

    def subtract(site: SenderSite, x: Tensor) -> Tensor:
        clean = batch.at(site.stream).active(site.written(x[: batch.n_rows].detach()))[0]
        values = side.senders.values
        values[site.index] = torch.sub(values[site.index], clean, alpha=site.factor)
        return values[site.index]

    embedding = subtract(side.senders.sites[0], side.clean_embeddings)
    values, result = record_senders(side.senders.sites, run, subtract)
    return Contributions(side.senders.sites, [embedding, *values]), result


def record_contributions(runner: Runner, embeddings: Tensor, run: Pass[object]) -> Contributions:
    """What every sender writes in a pass that starts with embeddings [E, T, D], without gradient."""

    def rows(site: SenderSite, x: Tensor) -> Tensor:
        # A copy: some models add to the MLP's output in place.
        written = runner.batch.at(site.stream).active(site.written(x.detach()))[0]
        return _times(written.to(runner.arch.accumulate, copy=True), site.factor)

    sites = sender_sites(runner.arch)
    embedding = rows(sites[0], embeddings)
    values, _ = record_senders(sites, run, rows)
    return Contributions(sites, [embedding, *values])


def _record(
    runner: Runner, constants: Constants | None, both: bool, *watch: Register
) -> tuple[CorruptedSide, Sequence[Tensor]]:
    """The corrupted side, its senders less the clean ones if both run, and the clean logits."""
    arch, batch = runner.arch, runner.batch
    n, sites = batch.n_rows, sender_sites(arch)
    clean, own = runner.embed(batch.clean), runner.embed(batch.corrupted)
    aligned = own

    def rows(site: SenderSite, x: Tensor, copy: bool = False) -> Tensor:
        """[E, T, X] -> [n, X] at the rows of the site's stream; may share memory with x."""
        every, some = batch.at(site.stream).copies(x)
        return (every[0] if some is None else every[0][some]).to(arch.accumulate, copy=copy and some is None)

    def ablated(site: SenderSite, corrupted: Tensor, clean: Tensor) -> Tensor:
        if constants is not None:
            corrupted = at_tokens(constants.tensors[site.index], batch.at(site.stream))
        # A copy where some models add to it in place, as they do to the MLP's output.
        own = site.heads is None or isinstance(site.heads.out, Place)
        found = rows(site, corrupted) - rows(site, clean) if both else rows(site, corrupted, copy=own)
        return _times(found, site.factor)

    def keep(site: SenderSite, x: Tensor) -> Tensor:
        written = site.written(x)
        return ablated(site, batch.at(site.stream).aligned(written[:n]), written[n:])

    def begin(x: Tensor) -> None:
        nonlocal aligned
        aligned = batch.aligned_input(own, x[:n])

    def run(register: Register) -> Sequence[Tensor]:
        first = partial(Hooks.on_input, module=arch.layers[0].module, hook=begin)
        logits = runner.record(torch.cat([own, clean]) if both else own, each(first, register, *watch), 1)
        return logits.split(batch.n_examples)

    values, (corrupted_logits, *clean_logits) = record_senders(sites, run, keep)
    embedding = ablated(sites[0], aligned, clean)
    return CorruptedSide(Contributions(sites, [embedding, *values]), clean, aligned, corrupted_logits), clean_logits


def _times(x: Tensor, factor: float) -> Tensor:
    """x changed in place; a model's usual factor of 1 is no launch."""
    return x if factor == 1 else x.mul_(factor)
