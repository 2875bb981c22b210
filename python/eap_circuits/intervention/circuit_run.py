"""Run circuits: every receiver reads the circuit's own run along kept edges and the corrupted run along all others.

Receiver v reads corr_v + Σ_u mask[u, v]·(cur_u − corr_u), where cur is the circuit's own run. Many circuits run
together, one after another along the batch dimension. A receiver without a kept edge takes what the corrupted run
computed, and one with all of its edges takes the circuit's own residual stream. Only the others are computed, from only
the senders that they read. A module runs only for the circuits that need its output. tests/circuits/plain_runs.py
specifies a circuit's run head by head.

Masks are read on the host; what indexes the device is made there, too, so that nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from ..adapters import Norm, ReceiverSite, SenderSite, receiver_sites, sender_sites
from ..forward import EVERYWHERE, Hooks, Indices, Runner
from ..graph import Graph
from ..recording import ReferenceRun
from .groups import Asked, CircuitGroup, Places, SharedGroup, consecutive, numbers, places_of
from .groups.grouping import Sites, attention_of, begun_together, by_rank, first_of, heads_of, join, read_with


@dataclass(frozen=True)
class Together:
    """Circuits that run together: what is known before they run, and what a device was sent of it.

    `order`: of the groups' circuits, which of these they are.
    """

    order: list[int]
    asked: Asked
    groups: Sequence[CircuitGroup]
    indices: Indices = field(default_factory=Indices)


class CircuitsRun:
    """Circuits side by side, one after another along the batch dimension."""

    def __init__(self, runner: Runner, graph: Graph, corrupted: ReferenceRun, some: Together) -> None:
        self.runner, self.graph, self.corrupted = runner, graph, corrupted
        self.asked, self.groups, self.indices, self.count = some.asked, some.groups, some.indices, len(some.asked)
        self.dtype = self.groups[0].dtype if self.groups else runner.arch.accumulate
        self.shares = runner.arch.shares
        self.sites: list[Sites] = [{} for _ in range(graph.n_layers + 1)]  # the logits' last
        for site in receiver_sites(runner.arch, graph):
            self.sites[site.layer][site.name] = site
        # Of each stream its input; of each layer its heads, if there are any, and its MLP.
        writers, layers = sender_sites(runner.arch), range(graph.n_layers)
        self.begins = [site for site in writers if site.begins]
        self.head_writers = [[site for site in writers if site.heads and site.layer == layer] for layer in layers]
        self.mlp_writers = {site.layer: site for site in writers if not (site.heads or site.begins)}
        self.ready: dict[str, Tensor] = {}  # the current layer's projections, made when the first is asked for
        self.begun: dict[tuple[CircuitGroup, int], Tensor] = {}  # what a layer's MLP reads from the layers before
        # What each group computes of each layer's projections, by letter.
        self.heads = [{group: heads_of(group, sites, self.shares) for group in self.groups} for sites in self.sites]

    def logits(self) -> Tensor:
        """[C, E, V]"""
        embeddings = self.runner.embed(self.runner.batch.clean)
        self._send()
        try:
            for group in self.groups:
                group.allocate(embeddings.device)
            self._begin(self.begins[0], embeddings)
            together = embeddings.repeat(self.count, 1, 1)
            logits = self.runner.logits(together, self._register)
        finally:
            for group in self.groups:
                group.release()
        return logits.unflatten(0, (-1, self.runner.batch.n_examples))

    def _register(self, hooks: Hooks) -> None:
        asked = self.asked
        for site in self.begins[1:]:
            hooks.on_senders(site, partial(self._begin, site))
        shown = set[torch.nn.Module]()
        for index, layer in enumerate(self.runner.arch.layers):
            sites, writers = self.sites[index], self.head_writers[index]
            attention = attention_of(sites)
            whole = numbers(asked.whole[:, attention].any(1))
            # A norm, and what heads write, are for circuits that read their own residual stream from there on.
            own = asked.reads_own(attention.stop)
            starts = {layer.mlp_norm: attention.stop, layer.attention_norm: attention.start}
            # Layers side by side have one norm: the first of them says for whom it runs.
            norms = {norm.module: start for norm, start in starts.items() if norm.kind and norm.module not in shown}
            shown |= norms.keys()
            for module, start in norms.items():
                hooks.on_input(module, partial(self._keep, asked.reads_own(start)))
                hooks.on_output(module, partial(self._fill, asked.reads_own(start)))
            for module, columns in self.runner.projection_sites(index):
                hooks.on_input(module, partial(self._keep, whole))
                hooks.on_output(module, partial(self._project, sites, columns, whole))
            for site in writers:
                hooks.on_senders(site, partial(self._write_heads, site, own))
                hooks.on_output(layer.out, partial(self._fill, own))
            mlp = self.mlp_writers.get(index)
            if mlp is None:
                continue
            needed = numbers(asked.needed[:, mlp.senders.start] & ~asked.closed[:, attention.stop])
            # A layer's only block may be given masks and positions, which have rows for all circuits.
            run = needed if writers and not layer.mlp_runs_whole else list(range(self.count))
            hooks.on_input(layer.mlp_in, partial(self._read_mlp, sites, needed, run))
            hooks.on_senders(mlp, partial(self._write_mlp, mlp, needed, run))
        hooks.on_input(self.runner.arch.final_norm.module, self._read_final)

    # Circuits along the batch dimension: [C·E, T, X] <-> [C, E, T, X].

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.runner.batch.n_rows))

    def _keep(self, circuits: list[int], x: Tensor) -> Tensor:
        """The rows of some circuits, so that a module runs for no others."""
        if len(circuits) == self.count:
            return x
        if circuits:
            return self._some(self._split(x), circuits).flatten(0, 1)
        # A tensor parallel module with a gradient cannot run without rows; what it gives is read by nothing.
        return x[: self.runner.batch.n_rows if self.runner.arch.team.size > 1 and torch.is_grad_enabled() else 0]

    def _fill(self, circuits: list[int], y: Tensor) -> Tensor:
        """Put the rows of some circuits back in place; what the others hold there is read by nothing."""
        if len(circuits) == self.count:
            return y
        if not circuits:
            return y.new_zeros(self.count * self.runner.batch.n_rows, *y.shape[1:])
        rows = self._split(y)
        return join((rows, circuits.index(c) if c in circuits else 0) for c in range(self.count)).flatten(0, 1)

    # Senders.

    def _store(self, group: CircuitGroup, site: SenderSite, current: Tensor) -> None:
        """Of the embeddings or an MLP, [N, D] of all circuits alike or [C, N, D]."""
        if group.stored[site.senders.start]:
            corrupted = self.shares.own(self.corrupted.written[site.index]).flatten(0, 1).to(self.dtype)
            group.store(site.senders.start, self.shares.own(current).to(self.dtype), corrupted, site.scale)

    def _begin(self, site: SenderSite, x: Tensor) -> None:  # the same for all circuits
        for group in self.groups:
            self._store(group, site, self._split(x)[0].flatten(0, 1))

    def _write_heads(self, site: SenderSite, own: list[int], z: Tensor) -> Tensor:
        stored = {group: heads for group in self.groups if (heads := self._stored(group, site))}
        if not stored:
            return self._keep(own, z)
        first, layer = site.senders.start, site.heads
        assert layer is not None
        current, corrupted = self._split(site.written(z)), self.corrupted.written[site.index]
        # Values that carry a norm's scale are in float32 whatever the model's dtype.
        wide = torch.promote_types(current.dtype, self.dtype)
        difference = self.shares.summed((current.to(wide) - corrupted.to(wide)).to(self.dtype))  # [C, E, T, H·K]
        weight = layer.out_weight(self.dtype, self.runner.arch.features)
        for group, heads in stored.items():
            by_head = difference[group.members].flatten(0, 2).unflatten(1, (layer.n_heads, -1)).transpose(0, 1)
            group.store_heads(first + heads[0], self._some(by_head, heads), self._some(weight, heads))
        return self._keep(own, z)

    def _stored(self, group: CircuitGroup, site: SenderSite) -> list[int]:
        """Which of a layer's heads a group stores."""
        return [head for head, stored in enumerate(group.stored[site.senders]) if stored]

    def _write_mlp(self, site: SenderSite, needed: list[int], run: list[int], y: Tensor) -> Tensor:
        full, corrupted = self._split(y), self.corrupted.written[site.index][None]
        if len(needed) < self.count:
            full = join((full, run.index(c)) if c in needed else (corrupted, 0) for c in range(self.count))
        for group in self.groups:
            self._store(group, site, full[group.members].flatten(1, 2))
        return full.flatten(0, 1)

    def _some(self, x: Tensor, chosen: list[int]) -> Tensor:
        """x [n, ...] at some of its places; without a copy where these follow one another."""
        places = self._places(x.device, chosen)
        return x[places] if isinstance(places, slice) else x.index_select(0, places)

    def _places(self, device: torch.device, chosen: list[int]) -> Places:
        places = places_of(chosen)
        return places if isinstance(places, slice) else self.indices.on(device, places)

    # Receivers.

    def _base(self, norm: Norm) -> Tensor:
        """What the norm reads in the corrupted run, [E, T, D]."""
        return self.corrupted.norm_inputs[norm]

    def _tokens(self, norm: Norm, at: Places = EVERYWHERE) -> Tensor:
        """The same at some tokens as [n, D], in the accumulation dtype; of D this rank's features."""
        return self.shares.own(self._base(norm)).flatten(0, 1)[at].to(self.dtype)

    def _normalised(self, norm: Norm, y: Tensor) -> Tensor:
        """The norm of y [..., n, D], all features, in the model's dtype."""
        dtype = self._base(norm).dtype
        return norm(y.to(dtype)) if y.is_cpu else norm.fused(y).to(dtype)

    def _read_mlp(self, sites: Sites, needed: list[int], run: list[int], own: Tensor) -> Tensor:
        site, attention = sites["mlp"], first_of(sites)
        at = self._read_at(site)
        partial = [c for c in needed if self.asked.partial[c, site.receivers.start]]
        begun, self.begun = self.begun, {}
        reads: list[Tensor] = []
        circuits: list[int] = []
        for group in self.groups:
            members = range(self.count)[group.members]
            if not set(members) & set(partial):
                continue
            circuits += members
            base = begun.get((group, site.layer))
            if base is None:
                reads.append(group.read(self._tokens(site.norm, at), site.receivers, site.reach, site.begin, at)[0])
            elif self.graph.parallel:
                reads.append(base)
            else:
                reads.append(group.read(base, site.receivers, site.reach, attention.reach)[0])
        if not partial:
            return self._keep(run, own)
        y = self.shares.whole(reads[0] if len(reads) == 1 else torch.cat(reads))
        y = self._normalised(site.norm, y)  # [c, n, D]
        if at is EVERYWHERE:
            computed, rest = self._split(y.flatten(0, 1).view(-1, *own.shape[1:])), self._split(own)
            return join((computed, circuits.index(c)) if c in partial else (rest, c) for c in run).flatten(0, 1)
        x = self._split(self._keep(run, own)).clone(memory_format=torch.contiguous_format)
        y = self._some(y, [circuits.index(c) for c in partial])
        self._put(x.flatten(1, 2), [run.index(c) for c in partial], at, y)
        return x.flatten(0, 1)

    def _put(self, x: Tensor, circuits: list[int], at: Places, y: Tensor) -> None:
        """x [c, N, D] of some circuits at some tokens becomes y."""
        if len(circuits) == len(x):
            x[:, at] = y
        else:
            which = self.indices.on(x.device, circuits)
            x[(which, at) if isinstance(at, slice) else (which[:, None], at)] = y

    def _read_at(self, site: ReceiverSite) -> Places:
        """Where a layer's MLP runs: the last one where logits are scored (`forward/layers/last_mlp.py`)."""
        last = site.layer == self.graph.n_layers - 1 and self.graph.n_heads[-1] > 0
        return self.runner.read_at(site.norm.device) if last else EVERYWHERE

    def _read_final(self, own: Tensor) -> Tensor:
        site = self.sites[-1]["logits"]
        x = self._split(own).clone(memory_format=torch.contiguous_format)
        rows, scored = x.flatten(1, 2), self.runner.read_at(site.norm.device)
        for group in self.groups:
            start = group.members.start
            if group.wanted(site.receivers):
                y = group.read(self._tokens(site.norm, scored), site.receivers, site.reach, site.begin, scored)[0]
                partial = numbers(group.asked.partial[:, site.receivers.start])
                y = self.shares.whole(self._some(y, partial)).to(x.dtype)
                self._put(rows, [start + c for c in partial], scored, y)
        closed = numbers(self.asked.closed[:, site.receivers.start])
        if closed:
            x[self.indices.on(x.device, closed)] = self._base(site.norm)
        return x.flatten(0, 1)

    def _project(self, sites: Sites, columns: dict[str, slice], whole: list[int], own: Tensor) -> Tensor:
        """A projection's output with every head's own input: [C·E, T, features]."""
        first = next(iter(columns))
        if first not in self.ready:
            self.ready |= self._projections(sites, read_with(sites, first))
        every, self.ready = self.ready[first], {k: x for k, x in self.ready.items() if k not in columns}
        for letter, features in columns.items() if whole else ():
            site = sites[letter]
            there = self.indices.on(own.device, self.asked.whole[whole][:, site.receivers])[:, None, None, :, None]
            heads = every[..., features].unflatten(-1, (site.count, -1))
            current = self._split(own)[..., features].unflatten(-1, (site.count, -1))
            which = self._places(own.device, whole)
            rows = heads[which]
            if isinstance(which, slice) and not torch.is_grad_enabled():
                torch.where(there, current, rows, out=rows)
            else:
                heads[which] = torch.where(there, current, rows)
        return every.flatten(0, 1)

    def _projections(self, sites: Sites, some: Sites) -> dict[str, Tensor]:
        """Of what each input of the heads is features, [C, E, T, features]; whole receivers are filled in later.

        `some`: the inputs that are made, all of which read through one norm.
        """
        made: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        corrupted = self.corrupted.projections[first_of(sites).layer]
        for _, columns in self.runner.projection_sites(first_of(sites).layer):
            if some.keys().isdisjoint(columns):
                continue
            every = torch.cat([corrupted[letter].expand(self.count, -1, -1, -1) for letter in columns], -1)
            for letter, features in columns.items():
                made[letter], found[letter] = every, every[..., features].unflatten(-1, (sites[letter].count, -1))
        dtype = self.runner.arch.dtype
        projections = {letter: site.projection for letter, site in some.items() if site.projection is not None}
        weights = {letter: each.of_heads(self.shares.here(each.n_heads), dtype) for letter, each in projections.items()}
        norm, layer = first_of(some).norm, first_of(some).layer
        for group in self.groups:
            wanted = group.wanted(attention_of(some))
            if not wanted:
                continue
            y = group.read(self._tokens(norm), *self._read_first(group, sites, some))
            if self._begins(group, sites):
                mlp = sites["mlp"]
                self.begun[group, mlp.layer] = y[-1] + (self._tokens(mlp.norm) - self._tokens(norm))
            # Of all heads this rank's features, then of its own heads all features: [r, C, N, D].
            rows, counts = by_rank(self.heads[layer][group][letter] for letter in some)
            x = self._normalised(norm, self.shares.dealt(self._some(y, rows), counts))
            for letter, (weight, bias) in weights.items():
                heads = self.heads[layer][group][letter]
                if not sum(heads.counts):
                    continue
                # A site's receivers follow one another. To pick the circuits that need it would take longer.
                y = torch.bmm(x[heads.places].flatten(1, 2), self._some(weight, heads.slots).mT)  # [h, C·N, K]
                y = y if bias is None else y + self._some(bias, heads.slots)[:, None]
                y = self.shares.joined(y, heads.counts).unflatten(1, (group.size, -1))
                by_head = found[letter][group.members].flatten(1, 2).transpose(1, 2)  # [C, heads, N, K]
                place, circuit, head = (self.indices.on(y.device, each) for each in heads.partial)
                all_needed = len(place) == len(y) * group.size
                by_head[circuit, head] = y.flatten(0, 1) if all_needed else y[place, circuit]
        return made

    # What is known before the run.

    def _begins(self, group: CircuitGroup, sites: Sites) -> bool:
        """What the MLP reads of the senders before attention comes along: they are read from memory once."""
        attention, mlp = attention_of(sites), sites.get("mlp")
        if mlp is None or len({site.stream for site in sites.values()}) > 1:
            return False
        apart = self.graph.parallel and not isinstance(group, SharedGroup)
        apart = apart or self._read_at(mlp) is not EVERYWHERE
        return not apart and bool(group.wanted(attention)) and bool(group.wanted(mlp.receivers))

    def _read_first(self, group: CircuitGroup, sites: Sites, some: Sites) -> tuple[slice, int, int]:
        """(receivers, one past the last sender, the first) of the read for some of the heads' inputs."""
        receivers, first = attention_of(some), first_of(some)
        if self._begins(group, sites):
            receivers = slice(receivers.start, sites["mlp"].receivers.stop)
        return receivers, first.reach, first.begin

    def _reads(self, group: CircuitGroup, sites: Sites) -> list[tuple[slice, int, int]]:
        """The same of each read of a layer."""
        first = {site.norm: name for name, site in reversed(sites.items()) if site.projection}
        found = [self._read_first(group, sites, read_with(sites, name)) for name in first.values()]
        for last in (sites[name] for name in ("mlp", "logits") if name in sites):
            begun = self._begins(group, sites) and not self.graph.parallel  # where the MLP may run first
            found.append((last.receivers, last.reach, first_of(sites).reach if begun else last.begin))
        return found

    def _begin_together(self, group: CircuitGroup) -> None:
        """Of layers on one device, what their heads read."""
        if isinstance(group, SharedGroup) and not group.is_ready:
            some = [sites for sites in self.sites if group.wanted(attention_of(sites))]
            for _, there in groupby(some, lambda sites: first_of(sites).norm.device):
                group.begin_together([self._read_first(group, sites, sites)[:2] for sites in there])

    def _send(self) -> None:
        """Send what indexes and weights anything to each device in one piece: one launch, not one for each."""
        if begun_together(self.runner.arch, self.graph):
            for group in self.groups:
                self._begin_together(group)
        wanted: dict[torch.device, tuple[list[Sequence[int] | Tensor], list[tuple[SharedGroup, slice, int, Tensor]]]]
        wanted = {}
        for index, sites in enumerate(self.sites):
            lists, weights = wanted.setdefault(next(iter(sites.values())).norm.device, ([], []))
            for group in self.groups:
                if isinstance(group, SharedGroup) and not group.is_ready:
                    for to, stop, start in self._reads(group, sites):
                        if group.wanted(to):
                            weights.append((group, to, start, group.weights(to, stop, start)))
                for heads in self.heads[index][group].values():
                    lists += [*heads.partial, *([] if consecutive(heads.slots) else [heads.slots])]
                for writer in self.head_writers[index] if index < self.graph.n_layers else ():
                    if not consecutive(stored := self._stored(group, writer)):
                        lists.append(stored)
            if whole := numbers(self.asked.whole[:, attention_of(sites)].any(1)):
                read = [site.receivers for site in sites.values() if site.projection is not None]
                lists += [self.asked.whole[whole][:, receivers] for receivers in read]
        for device, (lists, weights) in wanted.items():
            there = self._sent(device, lists, [each for *_, each in weights])
            for (group, to, start, _), each in zip(weights, there, strict=True):
                group.ready(to, start, each)

    def _sent(self, device: torch.device, lists: list[Sequence[int] | Tensor], weights: list[Tensor]) -> list[Tensor]:
        """Lists that index and weights of reads, on a device; bools come as bytes, which one kernel widens there."""
        if not weights or weights[0].dtype != torch.bool:
            return self.indices.send(device, lists, *weights)
        (flat,) = self.indices.send(device, lists, torch.cat([each.flatten() for each in weights]))
        pieces = flat.to(self.dtype).split([each.numel() for each in weights])
        return [piece.view_as(each) for piece, each in zip(pieces, weights, strict=True)]
