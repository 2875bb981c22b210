"""Which circuits are stored and read together, and which heads of a layer they compute: known before they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from numpy import packbits
from torch import Tensor

from ...adapters import Architecture, ReceiverSite, Shares
from ...graph import Graph
from .circuit_group import Asked, CircuitGroup

_ANOTHER_GROUP = 1 << 28  # bytes that a GPU moves while the host launches another group's kernels of a layer
Sites = dict[str, ReceiverSite]  # a layer's, by name


def shared(device: torch.device) -> bool:
    """Are circuits that run together also stored and read together?

    On a CPU a circuit alone stores and reads only what it needs. Elsewhere a read of several is one launch.
    """
    return device.type != "cpu"


def begun_together(arch: Architecture, graph: Graph) -> bool:
    """Are reads of several layers begun together? They are where layers follow one another in one stream.

    In float32 a product takes as long as its operations, however few bytes it moves.
    """
    return shared(arch.device) and arch.dtype.itemsize < 4 and len(graph.streams) == 1 and graph.beside is None


def rows_computed(graph: Graph, asked: Sequence[Asked], arch: Architecture) -> int:
    """How many rows of tokens × features a circuit holds at most: the senders that are read, two for each receiver of
    a layer that has to be computed, and what is begun together. Circuits of one group hold what any of them needs."""
    size, beside = (len(asked), 1) if shared(arch.device) and graph.spans is None else (1, 0)
    graph = graph.base
    groups = [Asked.joined(asked[start : start + size]) for start in range(0, len(asked), size)]

    def held(computed: Tensor, stored: Tensor) -> int:
        counts = [int(computed[graph.receivers_of(i)].sum()) for i in range(graph.n_layers)]
        before = [int(stored[: graph.reach_at(i, "")].sum()) for i in range(graph.n_layers)]
        cuts = sections(list(zip(before, counts, strict=True)), beside > 0 and begun_together(arch, graph))
        begun = max(sum(counts[section]) for section in cuts)
        return max(3, 2 * max(counts) + begun) + int(stored.sum())

    return beside + max(held(group.partial.any(0), group.stored.any(0)) for group in groups)


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

    def costs(stop: int) -> Iterable[int]:
        computed, kept = 0, 0
        for start in reversed(range(stop)):
            computed, kept = computed | partial[start], kept | stored[start]
            # What is read is written, normalised and projected; what is stored is written and read twice.
            moved = (stop - start) * (4 * computed.bit_count() + 3 * kept.bit_count()) * row
            yield layers * _ANOTHER_GROUP + moved if computed else 0

    return order, [group for group in _cheapest(len(order), costs) if any(partial[group])]


def sections(reads: Sequence[tuple[int, int]], together: bool) -> list[slice]:
    """Which reads that follow one another are begun together, so that the fewest rows are moved.

    The first of a section reads for all of them what is stored by then. To that the others add, each in its turn, what
    is stored since; so each row that they give is read and written once more.

    Args:
        reads: of each (how many rows are stored by then, for how many receivers).
        together: begin several together; else each is one.
    """
    if not together:
        return [slice(i, i + 1) for i in range(len(reads))]

    def costs(stop: int) -> Iterable[int]:
        later = list(accumulate((stored + 2 * count for stored, count in reversed(reads[:stop])), initial=0))
        for added, start in enumerate(reversed(range(stop))):
            stored, _ = reads[start]
            yield later[added] + (1 - added) * stored

    return _cheapest(len(reads), costs)


def _cheapest(count: int, costs: Callable[[int], Iterable[int]]) -> list[slice]:
    """How so many things in order are cut at the least cost.

    `costs`: of the cuts that end before one of the things, the shortest first.
    """
    least, cuts = [0], [0]  # of the first things: the least cost, and where their last cut begins
    for stop in range(1, count + 1):
        starts = reversed(range(stop))
        cost, cut = min((least[start] + more, start) for start, more in zip(starts, costs(stop), strict=True))
        least.append(cost)
        cuts.append(cut)
    found: list[slice] = []
    while count:
        found.insert(0, slice(cuts[count], count))
        count = cuts[count]
    return found


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
        wanted = group.wanted(site.receivers)
        receivers = torch.tensor(wanted, dtype=torch.int64)
        place, circuit = group.asked.partial[:, receivers].T.nonzero().unbind(1)
        every = [(receiver - start) // site.repeat_kv for receiver in wanted]
        slots = [[slot - part.start for slot in every if part.start <= slot < part.stop] for part in parts]
        counts, here = [len(own) for own in slots], shares.rank
        before = sum(found[name].counts[here] for name in read_with(sites, letter) if name in found)
        places = slice(before, before + counts[here])
        found[letter] = Heads(counts, places, slots[here], (place, circuit, receivers[place] - start))
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
