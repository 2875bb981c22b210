"""Which circuits are stored and read together, and which heads of a layer they compute: known before they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from numpy import packbits
from torch import Tensor

from ..adapters import ReceiverSite, Shares
from ..graph import Graph
from .circuit_group import Asked, CircuitGroup, asked_of, together

_ANOTHER_GROUP = 1 << 28  # bytes that a GPU moves while the host launches another group's kernels of a layer
Sites = dict[str, ReceiverSite]  # a layer's, by name


def shared(device: torch.device) -> bool:
    """Are circuits that run together also stored and read together?

    On a CPU a circuit alone stores and reads only what it needs. Elsewhere a read of several is one launch.
    """
    return device.type != "cpu"


def rows_computed(graph: Graph, masks: Sequence[Tensor], device: torch.device) -> int:
    """How many rows of tokens × features a circuit holds at most: the senders that are read, and three for each
    receiver of a layer that has to be computed. Circuits of one group hold what any of them needs."""
    asked = [asked_of(graph, together(graph, [mask])) for mask in masks]
    size, beside = (len(asked), 1) if shared(device) and graph.spans is None else (1, 0)
    graph = graph.base
    groups = [asked[start : start + size] for start in range(0, len(asked), size)]

    def any_of(group: list[Asked], name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in group]).any(0)

    def at_once(computed: Tensor) -> int:
        return max(1, *(int(computed[graph.receivers_of(i)].sum()) for i in range(graph.n_layers)))

    return beside + max(3 * at_once(any_of(group, "partial")) + int(any_of(group, "stored").sum()) for group in groups)


def arrange(asked: Asked, together: bool, row: int, layers: int) -> tuple[list[int], list[slice]]:
    """(An order of circuits, which of them in this order are groups).

    A group computes for each of its circuits what any of them needs, so that it is of circuits alike. Another one pays
    where it saves the device more than it takes the host to launch. A circuit of which nothing is computed needs none.

    Args:
        together: make groups of several circuits; else each is one, in the order in which they are.
        row: bytes of what one receiver of a circuit reads.
        layers: of the model.
    """
    if not together:
        return list(range(len(asked))), [slice(c, c + 1) for c in range(len(asked))]
    # From the smallest to the largest circuit.
    size = (asked.whole.sum(1) - asked.closed.sum(1)).tolist()
    order = sorted(range(len(asked)), key=size.__getitem__)
    partial, stored = (_bits(x[order]) for x in (asked.partial, asked.stored))
    costs, cuts = [0], [0]  # of the first circuits: the least bytes, and where their last group begins
    for stop in range(1, len(order) + 1):
        computed, kept, found = 0, 0, []
        for start in reversed(range(stop)):
            computed, kept = computed | partial[start], kept | stored[start]
            # What is read is written, normalised and projected; what is stored is written and read twice.
            moved = (stop - start) * (4 * computed.bit_count() + 3 * kept.bit_count()) * row
            found.append((costs[start] + (layers * _ANOTHER_GROUP + moved if computed else 0), start))
        cost, cut = min(found)
        costs.append(cost)
        cuts.append(cut)
    groups: list[slice] = []
    stop = len(order)
    while stop:
        groups.insert(0, slice(cuts[stop], stop))
        stop = cuts[stop]
    return order, [group for group in groups if any(partial[group])]


def _bits(rows: Tensor) -> list[int]:
    """Bool [n, X] as n numbers, whose unions and sizes take no time."""
    return [int.from_bytes(row.tobytes(), "big") for row in packbits(rows.numpy(), 1)]


@dataclass(frozen=True)
class Heads:
    """What a group computes of a projection. Each of the ranks that divide a model does so for some of the heads.

    Args:
        counts: for how many.
        places: where this rank's heads are in what it computes of the layer.
        slots: which slots of this rank's part of the projection's weight they take.
        partial: of each head that a circuit needs: its place among those of all ranks, the circuit's place in the
            group, and which of the site's heads it is.
    """

    counts: list[int]
    places: slice
    slots: list[int]
    partial: tuple[Tensor, Tensor, Tensor]


def heads_of(group: CircuitGroup, sites: Sites, shares: Shares) -> dict[str, Heads]:
    """What a group computes of a layer's projections."""
    found: dict[str, Heads] = {}
    for letter, site in sites.items():
        if site.projection is None:
            continue
        start, parts = site.receivers.start, shares.parts(site.projection.n_heads)
        heads = torch.tensor(group.wanted(site.receivers), dtype=torch.int64) - start
        place, circuit = group.asked.partial[:, heads + start].T.nonzero().unbind(1)
        every = (heads // site.repeat_kv).tolist()
        slots = [[slot - part.start for slot in every if part.start <= slot < part.stop] for part in parts]
        counts, here = [len(own) for own in slots], shares.rank
        before = sum(found[name].counts[here] for name in read_with(sites, letter) if name in found)
        places = slice(before, before + counts[here])
        found[letter] = Heads(counts, places, slots[here], (place, circuit, heads[place]))
    return found


def by_rank(heads: Iterable[Heads]) -> tuple[list[int], list[int]]:
    """(An order of the heads of several projections, of which each one's are one rank's after another's: all of the
    first rank's come first; how many each rank has)."""
    rows: list[list[int]] = []
    start = 0
    for each in heads:
        rows = rows or [[] for _ in each.counts]
        for own, count in zip(rows, each.counts, strict=True):
            own += range(start, start := start + count)
    return [row for own in rows for row in own], [len(own) for own in rows]


def attention_of(sites: Sites) -> slice:
    """The inputs of a layer's heads."""
    start, counts = first_of(sites).receivers.start, (site.count for site in sites.values() if site.projection)
    return slice(start, start + sum(counts))


def first_of(sites: Sites) -> ReceiverSite:
    """The first input of a layer's heads."""
    return next(iter(sites.values()))


def read_with(sites: Sites, letter: str) -> Sites:
    """The inputs of a layer's heads that read through one norm with this one: all but where attention is across."""
    norm = sites[letter].norm
    return {name: site for name, site in sites.items() if site.norm is norm and site.projection}


def join(rows: Iterable[tuple[Tensor, int]]) -> Tensor:
    """Some rows of several tensors, one after another, in one copy."""
    parts: list[tuple[Tensor, int, int]] = []
    for x, row in rows:
        if parts and parts[-1][0] is x and parts[-1][2] == row:
            parts[-1] = x, parts[-1][1], row + 1
        else:
            parts.append((x, row, row + 1))
    return torch.cat([x[start:stop] for x, start, stop in parts])


def consecutive(chosen: list[int]) -> bool:
    """Does each follow the one before?"""
    return not chosen or chosen == list(range(chosen[0], chosen[0] + len(chosen)))
