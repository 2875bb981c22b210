"""Runs in which one edge carries its ablated value and all else follows: the intervention that EAP approximates.

Nothing before the edge's receiver differs from the clean run. So receiver v reads x_v + Δ_u, where Δ_u is the sender's
ablated contribution less its clean one, and a run starts at v's layer from the clean run's residual stream.
Many edges run together, one after another along the batch dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from ..adapters import ReceiverSite, SenderSite, receiver_sites, sender_sites
from ..forward import Constants, Hooks, LayerInputs, Register, Runner, record_layer_inputs
from ..graph import Graph
from ..recording import BothSides, ReceiverInputs, record_both_sides, record_receiver_inputs

Patched = list[tuple[int, int, int]]  # (copy, head, sender)
Sites = dict[str, tuple[ReceiverSite, Patched]]  # of one layer, by name


@dataclass(frozen=True, eq=False)
class PatchedEdges:
    """Runs of a batch with single edges patched.

    Args:
        runner: the model on the batch.
        sides: what both of its sides gave.
        senders, receivers: (site, head) of each.
        clean, layers: what receivers and what layers read in the clean run.
    """

    runner: Runner
    sides: BothSides
    senders: list[tuple[SenderSite, int]]
    receivers: list[tuple[ReceiverSite, int]]
    clean: ReceiverInputs
    layers: LayerInputs

    def layer(self, receiver: int) -> int:
        """At which layer runs of this receiver's edges start; all edges of one call share it."""
        return self.receivers[receiver][0].layer

    def logits(self, edges: list[tuple[int, int]]) -> Tensor:
        """Logits at the scored positions with each edge (sender, receiver) patched alone: [C, E, V]."""
        start = self.layer(edges[0][1])
        sites: Sites = {}
        for copy, (sender, receiver) in enumerate(edges):
            site, head = self.receivers[receiver]
            assert site.layer == start, "edges of one call start at one layer"
            sites.setdefault(site.name, (site, []))[1].append((copy, head, sender))
        together = self.sides.clean_embeddings.repeat(len(edges), 1, 1)
        with torch.no_grad():
            logits = self.runner.logits(together, partial(self._register, start, sites, len(edges)))
        return logits.unflatten(0, (len(edges), -1))

    def _register(self, start: int, sites: Sites, copies: int, hooks: Hooks) -> None:
        self.layers.start_at(start, copies, hooks)
        if start == len(self.runner.arch.layers):
            site, patched = sites["logits"]
            hooks.on_input(site.norm.module, lambda _: self._patched(site, patched).flatten(0, 1))
            return
        for module, columns in self.runner.projection_sites(start):
            # What the module itself computes is replaced, so it need not see more than one copy.
            hooks.on_input(module, lambda x: x[: self.runner.batch.n_rows])
            hooks.on_output(
                module, partial(self._patch_projection, self.clean.projections[start], columns, sites, copies)
            )
        if "mlp" in sites:
            hooks.on_input(self.runner.arch.layers[start].mlp_in, partial(self._patch_mlp, *sites["mlp"]))

    def _patch_projection(
        self, clean: dict[str, Tensor], columns: dict[str, slice], sites: Sites, copies: int, _: Tensor
    ) -> Tensor:
        """The clean run's output for every copy, except for the heads that are patched."""
        parts = {letter: clean[letter].repeat(copies, 1, 1, 1) for letter in columns}  # [C, E, T, heads·K]
        for letter, part in parts.items():
            if letter in sites:
                self._project(*sites[letter], part)
        return torch.cat(list(parts.values()), -1).flatten(0, 1)

    def _project(self, site: ReceiverSite, patched: Patched, part: Tensor) -> None:
        projection, dtype = site.projection, part.dtype
        assert projection is not None
        copies, which, _ = (torch.tensor(column, device=part.device) for column in zip(*patched, strict=True))
        x = site.norm(self._patched(site, patched))  # [c, E, T, D]
        slot = which // site.repeat_kv
        y = torch.einsum("cetd,ckd->cetk", x, projection.weight(dtype)[slot])
        bias = projection.bias(dtype)
        heads = part.unflatten(-1, (-1, projection.head_dim))
        heads[copies, :, :, which] = y if bias is None else y + bias[slot][:, None, None]

    def _patch_mlp(self, site: ReceiverSite, patched: Patched, x: Tensor) -> Tensor:
        copies = torch.tensor([copy for copy, _, _ in patched], device=x.device)
        x = x.unflatten(0, (-1, self.runner.batch.n_rows)).clone()
        x[copies] = site.norm(self._patched(site, patched)).to(x.dtype)
        return x.flatten(0, 1)

    def _patched(self, site: ReceiverSite, patched: Patched) -> Tensor:
        """x_v + Δ_u before the site's norm, [c, E, T, D], in the model's dtype."""
        own = self.clean.norm_inputs[site.norm]
        senders = [sender for _, _, sender in patched]
        distinct = sorted(set(senders))
        differences = torch.stack([x.to(own.device) for x in self._differences(distinct)])  # [s, n, D]
        x = own.to(differences.dtype).flatten(0, 1).repeat(len(distinct), 1, 1)
        x[:, self.runner.batch.at(site.stream).rows_on(x.device)] += differences
        x = x.to(own.dtype).unflatten(1, own.shape[:2])
        return x[[distinct.index(sender) for sender in senders]]

    def _differences(self, senders: list[int]) -> Iterator[Tensor]:
        """Δ of senders in the graph's order, in residual space, [n, D] each."""
        for site, some in groupby((self.senders[sender] for sender in senders), itemgetter(0)):
            values, heads = self.sides.senders.values[site.index], [head for _, head in some]
            if site.heads is None:
                yield values
                continue
            by_head = values.unflatten(1, (site.heads.n_heads, -1))
            for part, weight in site.heads.out_weights(values.dtype):
                yield from (
                    by_head[:, head] @ weight[head - part.start] for head in heads if part.start <= head < part.stop
                )


def prepare_patching(runner: Runner, graph: Graph, constants: Constants | None = None) -> PatchedEdges:
    """Run both sides of a batch, for runs of its clean side with edges patched; see `record_both_sides`."""
    rows = runner.batch.n_rows

    def run(layers: Register) -> tuple[ReceiverInputs, BothSides]:
        return record_receiver_inputs(
            runner, lambda x: x[rows:], lambda clean: record_both_sides(runner, constants, clean, layers)
        )

    layers, (clean, sides) = record_layer_inputs(runner.arch, run, slice(rows, None))
    senders = [(site, i) for site in sender_sites(runner.arch) for i in range(site.senders.stop - site.senders.start)]
    receivers = [(site, head) for site in receiver_sites(runner.arch, graph) for head in range(site.count)]
    return PatchedEdges(runner, sides, senders, receivers, clean, layers)
