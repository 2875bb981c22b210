"""Run circuits: every receiver reads the circuit's own run along kept edges and the corrupted run along all others.

Receiver v reads corr_v + Σ_u mask[u, v]·(cur_u − corr_u), where cur is the circuit's own run. Many circuits run
together, one after another along the batch dimension. A receiver without a kept edge takes what the corrupted run
computed, and one with all of its edges takes the circuit's own residual stream. Only the others are computed, from only
the senders that they read. A module runs only for the circuits that need its output. tests/circuits/plain_runs.py
specifies a circuit's run head by head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from eap_kernels import masked_read

from ..adapters import Norm, ReceiverSite, SenderSite, receiver_sites, sender_sites
from ..forward import Hooks, Runner
from ..graph import Graph
from ..recording import ReferenceRun

TOKENS_TOGETHER = 2048  # of circuits that run together

Places = slice | Tensor  # some of a batch's [E·T] tokens
Sites = dict[str, ReceiverSite]  # a layer's, by name
EVERYWHERE = slice(None)


def run_circuits(
    runner: Runner, graph: Graph, corrupted: ReferenceRun, masks: Sequence[Tensor], tokens: int = TOKENS_TOGETHER
) -> Iterator[Tensor]:
    """Logits [E, V] of each circuit at the scored positions, in order.

    Args:
        masks: bool or floating [S, R] each; values between 0 and 1 keep an edge in part.
        tokens: the most that circuits which run together have.
    """
    circuits = [_Circuit(runner, graph, mask) for mask in masks]
    together = max(1, tokens // runner.batch.clean.numel())
    while circuits:
        with torch.no_grad():
            yield from _CircuitsRun(runner, graph, corrupted, circuits[:together]).logits()
        del circuits[:together]


def learning_run(runner: Runner, graph: Graph, ablated: ReferenceRun, mask: Tensor) -> Tensor:
    """Logits [E, V] of one circuit, differentiable with respect to the constants that the ablated run was made of."""
    return _CircuitsRun(runner, graph, ablated, [_LearningCircuit(runner, graph, mask)]).logits()[0]


def rows_computed(graph: Graph, mask: Tensor) -> int:
    """How many rows of tokens × features a circuit takes: the receivers to compute and the senders that they read."""
    _, _, partial = _receivers(graph, mask)
    return int(partial.sum()) + int((mask[:, partial] != 0).any(1).sum())


def _receivers(graph: Graph, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bool [R] each: the receivers that read only the corrupted run, only the circuit's own run, and all others."""
    closed = ~(mask != 0).any(0)
    whole = ((mask == 1) | ~graph.edge_mask).all(0) & ~closed
    return closed, whole, ~closed & ~whole


class _Circuit:
    """What a mask asks for: which receivers are computed, which senders run, which differences are stored."""

    def __init__(self, runner: Runner, graph: Graph, mask: Tensor) -> None:
        self.dtype = runner.arch.accumulate
        kept = mask != 0
        self.closed, self.whole, self.partial = _receivers(graph, mask)
        self._last_whole = int(self.whole.nonzero().max()) if self.whole.any() else -1
        self.needed = kept.any(1).tolist()  # [S] read by any receiver
        stored = kept[:, self.partial].any(1)
        for index in range(graph.n_layers):
            if self.closed[graph.receivers_at(index, "mlp")]:
                stored[graph.mlp_sender(index)] = False  # gives what it gave in the corrupted run
        self.stored = stored.tolist()  # [S] read by a receiver that has to be computed
        self._before = [0, *stored.cumsum(0).tolist()]  # how many of the senders before one are stored
        self.mask = mask[stored].to(self.dtype)  # [stored, R]
        self._shape = (int(stored.sum()), runner.batch.clean.numel(), runner.arch.d_model)
        self.differences = torch.empty(0)

    def reads_own(self, receiver: int) -> bool:
        """Does a receiver from this one on read the circuit's own residual stream?"""
        return receiver <= self._last_whole

    def allocate(self, device: torch.device) -> None:
        self.differences = torch.empty(self._shape, dtype=self.dtype, device=device)  # cur − corr, [stored, N, D]
        self.mask = self.mask.to(device)

    def follow(self, device: torch.device) -> None:
        """Move what is stored to the device that the run has reached, if it is not there yet."""
        if self.differences.device != device:
            self.differences, self.mask = self.differences.to(device), self.mask.to(device)

    def store(self, sender: int, current: Tensor, corrupted: Tensor, scale: float) -> None:
        """Keep a sender's scale · (cur − corr), both [N, D]."""
        self.follow(current.device)
        row = torch.sub(current, corrupted, out=self.differences[self._before[sender]])
        if scale != 1:
            row.mul_(scale)

    def store_heads(self, sender: int, difference: Tensor, weight: Tensor) -> None:
        """Keep some heads' cur − corr, from this sender on, given in head space, [h, N, K], with their [h, K, D]."""
        self.follow(difference.device)
        start = self._before[sender]
        torch.bmm(difference, weight, out=self.differences[start : start + len(difference)])

    def read(self, base: Tensor, receivers: Tensor, stop: int, start: int = 0, at: Places = EVERYWHERE) -> Tensor:
        """What some receivers read at n tokens: base [n, D] plus what they keep of these senders, [r, n, D]."""
        self.follow(base.device)
        rows = slice(self._before[start], self._before[stop])
        return masked_read(base, self.differences[rows][:, at], self.mask[rows][:, receivers])


class _LearningCircuit(_Circuit):
    """A circuit that writes nothing in place, so that gradients pass through what is read; its mask gets none."""

    def allocate(self, device: torch.device) -> None:
        self._stored: list[Tensor] = []  # in order of their rows

    def store(self, sender: int, current: Tensor, corrupted: Tensor, scale: float) -> None:
        self._stored.append((current - corrupted) * scale)

    def store_heads(self, sender: int, difference: Tensor, weight: Tensor) -> None:
        self._stored += torch.bmm(difference, weight).unbind()

    def read(self, base: Tensor, receivers: Tensor, stop: int, start: int = 0, at: Places = EVERYWHERE) -> Tensor:
        first = self._before[start]
        weights = self.mask[first : self._before[stop]].to(base.device)[:, receivers]
        used = weights.any(1).nonzero()[:, 0]
        if not len(used):
            return base.expand(len(receivers), -1, -1)
        # As the mask needs no gradient, this product keeps only the mask for its backward pass, not the differences.
        read = torch.stack([self._stored[first + row][at].to(base.device) for row in used.tolist()])
        return base + torch.tensordot(weights[used].T, read, 1)


class _CircuitsRun:
    def __init__(self, runner: Runner, graph: Graph, corrupted: ReferenceRun, circuits: list[_Circuit]) -> None:
        self.runner, self.graph, self.corrupted, self.circuits = runner, graph, corrupted, circuits
        self.dtype = runner.arch.accumulate
        self.sites: list[Sites] = [{} for _ in range(graph.n_layers + 1)]  # the logits' last
        for site in receiver_sites(runner.arch, graph):
            self.sites[site.layer][site.name] = site
        self.ready: dict[str, Tensor] = {}  # the current layer's projections, made when the first is asked for
        self.begun: dict[int, Tensor] = {}  # circuit -> what the current layer's MLP reads from the layers before
        (examples, tokens), last = runner.batch.shape, runner.batch.scored.cpu()
        # A slice, where it can be one, picks without a copy.
        alike = bool((last == last[0]).all())
        self.scored: Places = slice(int(last[0]), None, tokens) if alike else tokens * torch.arange(examples) + last

    def logits(self) -> Tensor:
        """[C, E, V]"""
        embeddings = self.runner.embed(self.runner.batch.clean)
        for circuit in self.circuits:
            circuit.allocate(embeddings.device)
            self._store(circuit, sender_sites(self.runner.arch)[0], embeddings)
        together = embeddings.repeat(len(self.circuits), 1, 1)
        return self._split(self.runner.logits(together, self._register))

    def _register(self, hooks: Hooks) -> None:
        senders = sender_sites(self.runner.arch)
        for index, layer in enumerate(self.runner.arch.layers):
            sites, (heads, mlp) = self.sites[index], senders[2 * index + 1 : 2 * index + 3]
            attention = slice(sites["q"].receivers.start, sites["v"].receivers.stop)
            receiver = sites["mlp"].receivers.start
            whole = [c for c, circuit in enumerate(self.circuits) if circuit.whole[attention].any()]
            # Norms and the heads' projection run only for circuits that read their own residual stream from there on.
            own = self._own(receiver)
            starts = {layer.mlp_norm: receiver, layer.attention_norm: attention.start}
            for module, start in {norm.module: start for norm, start in starts.items() if norm.kind}.items():
                hooks.on_input(module, partial(self._keep, self._own(start)))
                hooks.on_output(module, partial(self._fill, self._own(start)))
            for module, columns in self.runner.projection_sites(index):
                hooks.on_input(module, partial(self._keep, whole))
                hooks.on_output(module, partial(self._project, sites, columns, whole))
            hooks.on_senders(heads, partial(self._write_heads, heads, own))
            hooks.on_output(layer.out, partial(self._fill, own))
            needed = [circuit.needed[mlp.senders.start] and not circuit.closed[receiver] for circuit in self.circuits]
            run = [c for c, runs in enumerate(needed) if runs]
            hooks.on_input(layer.mlp_in, partial(self._read_mlp, sites, run))
            hooks.on_senders(mlp, partial(self._write_mlp, mlp, run))
        hooks.on_input(self.runner.arch.final_norm.module, self._read_final)

    def _own(self, receiver: int) -> list[int]:
        return [c for c, circuit in enumerate(self.circuits) if circuit.reads_own(receiver)]

    # Circuits along the batch dimension: [C·E, T, X] <-> [C, E, T, X].

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.runner.batch.n_examples))

    def _keep(self, circuits: list[int], x: Tensor) -> Tensor:
        """The rows of some circuits, so that a module runs for no others."""
        return x if len(circuits) == len(self.circuits) else self._split(x)[circuits].flatten(0, 1)

    def _fill(self, circuits: list[int], y: Tensor) -> Tensor:
        """Put the rows of some circuits back in place; what the others hold there is read by nothing."""
        if len(circuits) == len(self.circuits):
            return y
        full = y.new_zeros(len(self.circuits), self.runner.batch.n_examples, *y.shape[1:])
        if circuits:
            full[circuits] = self._split(y)
        return full.flatten(0, 1)

    # Senders.

    def _store(self, circuit: _Circuit, site: SenderSite, current: Tensor) -> None:
        """Of the embeddings or an MLP."""
        if circuit.stored[site.senders.start]:
            own, base = (x.flatten(0, 1).to(self.dtype) for x in (current, self.corrupted.written[site.index]))
            circuit.store(site.senders.start, own, base, site.scale)

    def _write_heads(self, site: SenderSite, own: list[int], z: Tensor) -> Tensor:
        first, weight = site.senders.start, site.weight(self.dtype)
        assert weight is not None
        corrupted = self.corrupted.written[site.index].to(self.dtype)
        difference = self._split(site.written(z)).to(self.dtype) - corrupted
        difference = difference.flatten(1, 2).unflatten(2, weight.shape[:2]).transpose(1, 2)  # [C, H, N, K]
        for circuit, by_head in zip(self.circuits, difference, strict=True):
            for heads in _runs([h for h in range(len(weight)) if circuit.stored[first + h]]):
                circuit.store_heads(first + heads.start, by_head[heads], weight[heads])
        return self._keep(own, z)

    def _write_mlp(self, site: SenderSite, run: list[int], y: Tensor) -> Tensor:
        corrupted = self.corrupted.written[site.index]
        full = corrupted.repeat(len(self.circuits), 1, 1, 1)
        for c, current in zip(run, self._split(y) if run else (), strict=True):
            full[c] = current
            self._store(self.circuits[c], site, current)
        return full.flatten(0, 1)

    # Receivers.

    def _base(self, norm: Norm) -> Tensor:
        """What the norm reads in the corrupted run, [E, T, D]."""
        return self.corrupted.norm_inputs[norm]

    def _tokens(self, norm: Norm, at: Places = EVERYWHERE) -> Tensor:
        """The same at some tokens as [n, D], in the accumulation dtype."""
        return self._base(norm).flatten(0, 1)[at].to(self.dtype)

    def _normalised(self, norm: Norm, y: Tensor) -> Tensor:
        """The norm of y [r, n, D], in the model's dtype."""
        return norm(y.to(self._base(norm).dtype))

    def _read_mlp(self, sites: Sites, run: list[int], own: Tensor) -> Tensor:
        site, attention = sites["mlp"], sites["q"]
        at = self._read_at(site)
        x = self._split(own)[run]
        slots = [slot for slot, c in enumerate(run) if self.circuits[c].partial[site.receivers.start]]
        if slots:
            base, which = self._tokens(site.norm, at), torch.tensor([site.receivers.start])
            more = base - self._tokens(attention.norm) if self.begun else base
            reads = []
            for c in (run[slot] for slot in slots):
                if c in self.begun:
                    reads.append(self.circuits[c].read(self.begun.pop(c) + more, which, site.reach, attention.reach))
                else:
                    reads.append(self.circuits[c].read(base, which, site.reach, at=at))
            for slot, y in zip(slots, self._normalised(site.norm, torch.cat(reads)), strict=True):
                x[slot].view(-1, x.shape[-1])[at] = y
        return x.flatten(0, 1)

    def _read_at(self, site: ReceiverSite) -> Places:
        """Where a layer's MLP runs: the last one where logits are scored (`forward/last_mlp.py`)."""
        return self.scored if site.layer == self.graph.n_layers - 1 else EVERYWHERE

    def _read_final(self, own: Tensor) -> Tensor:
        site = self.sites[-1]["logits"]
        x = self._split(own).clone(memory_format=torch.contiguous_format)
        for slot, circuit in enumerate(self.circuits):
            if circuit.partial[site.receivers]:
                base = self._tokens(site.norm, self.scored)
                y = circuit.read(base, torch.tensor([site.receivers.start]), site.reach, at=self.scored)
                x[slot].view(-1, x.shape[-1])[self.scored] = y[0].to(x.dtype)
            elif circuit.closed[site.receivers]:
                x[slot] = self._base(site.norm)
        return x.flatten(0, 1)

    def _project(self, sites: Sites, columns: dict[str, slice], whole: list[int], own: Tensor) -> Tensor:
        """A projection's output with every head's own input: [C·E, T, features]."""
        if not self.ready:
            self.ready = self._projections(sites)
        parts = []
        for letter, features in columns.items():
            part = self.ready.pop(letter)  # [C, E, T, heads, K]
            for c, current in zip(whole, self._split(own) if whole else (), strict=True):
                heads = self.circuits[c].whole[sites[letter].receivers]
                part[c][..., heads, :] = current[..., features].unflatten(-1, (len(heads), -1))[..., heads, :]
            parts.append(part.flatten(-2))
        return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).flatten(0, 1)

    def _projections(self, sites: Sites) -> dict[str, Tensor]:
        """The layer's "q", "k" and "v", [C, E, T, heads, K] each; those of whole receivers are filled in later."""
        found: dict[str, Tensor] = {}
        weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        for letter, site in sites.items():
            if site.projection is not None:
                corrupted = self.corrupted.projections[site.layer][letter].unflatten(-1, (site.count, -1))
                found[letter] = corrupted.repeat(len(self.circuits), 1, 1, 1, 1)
                dtype = self.runner.arch.dtype
                weights[letter] = site.projection.weight(dtype), site.projection.bias(dtype)
        norm, reach, mlp = sites["q"].norm, sites["q"].reach, sites["mlp"]
        first, last = sites["q"].receivers.start, sites["v"].receivers.stop
        for c, circuit in enumerate(self.circuits):
            wanted = first + circuit.partial[first:last].nonzero()[:, 0]
            if not len(wanted):
                continue
            # The MLP reads the same senders: its part is computed along, so that they are read from memory only once.
            begins = (
                bool(circuit.partial[mlp.receivers]) and not self.graph.parallel and self._read_at(mlp) is EVERYWHERE
            )
            readers = torch.cat([wanted, torch.tensor([mlp.receivers.start])]) if begins else wanted
            y = circuit.read(self._tokens(norm), readers, reach)
            if begins:
                self.begun[c] = y[-1].clone()
            x = self._normalised(norm, y[: len(wanted)])  # [r, N, D]
            for letter, (weight, bias) in weights.items():
                receivers = sites[letter].receivers
                here = slice(*torch.searchsorted(wanted, torch.tensor([receivers.start, receivers.stop])).tolist())
                heads = (wanted[here] - receivers.start).tolist()
                if not heads:
                    continue
                slots = [head // sites[letter].repeat_kv for head in heads]
                whole = slots == list(range(len(weight)))  # without a copy then
                y = torch.bmm(x[here], (weight if whole else weight[slots]).mT)  # [h, N, K]
                y = y if bias is None else y + bias[slots][:, None]
                found[letter][c].flatten(0, 1)[:, heads] = y.transpose(0, 1)
        return found


def _runs(numbers: list[int]) -> list[slice]:
    """Growing numbers as stretches of consecutive ones."""
    runs: list[slice] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = slice(runs[-1].start, number + 1)
        else:
            runs.append(slice(number, number + 1))
    return runs
