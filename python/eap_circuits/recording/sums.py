"""Does what senders write add up to what receivers read?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from torch import Tensor

from ..adapters import Norm, ReceiverSite, receiver_sites
from ..forward import Hooks, Runner
from .contributions import BothSides, record_both_sides


class Sum(NamedTuple):
    """What receivers that share a norm read, at a batch's rows.

    Args:
        site: the receivers.
        difference: of the residual stream between the two runs, its norm.
        missing: what the sum of Δ of the senders before them lacks of it.
        size: the norms of the stream itself in both runs together.
    """

    site: ReceiverSite
    difference: float
    missing: float
    size: float


def compare_sums(runner: Runner) -> tuple[list[Sum], BothSides]:
    """(The sum at every norm, what else the pass recorded); one pass of both sides of the batch."""
    arch, graph = runner.arch, runner.arch.graph("kv")
    sites = {site.norm: site for site in receiver_sites(arch, graph)}
    streams: dict[Norm, Tensor] = {}  # of the corrupted and the clean run, [2, n, D]

    def see(norm: Norm, x: Tensor) -> None:
        streams[norm] = runner.batch.at(sites[norm].stream).active(x).to(arch.device, arch.accumulate)

    def register(hooks: Hooks) -> None:
        for norm in sites:
            hooks.on_input(norm.module, partial(see, norm))

    sides, found = record_both_sides(runner, None, register), list[Sum]()
    for number, reach, total in _sums(runner, sides):
        for norm, site in sites.items():
            if (site.stream, site.reach) == (number, reach):
                corrupted, clean = streams[norm]
                missing = corrupted - clean - total
                size = float(corrupted.norm() + clean.norm())
                found.append(Sum(site, float((corrupted - clean).norm()), float(missing.norm()), size))
    return found, sides


def _sums(runner: Runner, sides: BothSides) -> Iterator[tuple[int, int, Tensor]]:
    """(The stream, how many senders, the sum of their Δ [n, D]) behind each sender or layer's heads."""
    arch, sites = runner.arch, sides.senders.sites
    total: Tensor | float = 0.0
    for site, each in zip(sites, sides.senders.lowered(arch.accumulate)(slice(None)), strict=True):
        written = each.values.flatten(1) if each.weight is None else each.values.flatten(1) @ each.weight.flatten(0, 1)
        total = written.to(arch.device) + (0.0 if site.begins else total)
        yield site.stream, site.senders.stop, total
