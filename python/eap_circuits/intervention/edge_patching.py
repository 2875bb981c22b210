"""Runs in which one edge carries its ablated value and all else follows: the intervention that EAP approximates.

Nothing before the edge's receiver differs from the clean run, so receiver v reads x_v + Δ_u, Δ_u being the sender's
ablated less its clean contribution, and a run starts at the receiver's layer from the clean run's residual stream.
Many edges run together, one after another along the batch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from eap_kernels import Nodes

from ..adapters import Layer, Norm, ReceiverSite, receiver_sites
from ..forward import Constants, Hooks, LayerInputs, Runner
from ..graph import Graph
from ..recording import BothSides, ReceiverInputs, record_both_sides


@dataclass(frozen=True, eq=False)
class PatchedEdges:
    """Runs of a batch with single edges patched.

    Args:
        runner: the model on the batch.
        sides: what both of its sides gave.
        senders: (a group of nodes, which of them) for each sender's Δ.
        receivers: (site, head) of each receiver.
        clean: what receivers read in the clean run, and `layers` what layers read there.
    """

    runner: Runner
    sides: BothSides
    senders: list[tuple[Nodes, int]]
    receivers: list[tuple[ReceiverSite, int]]
    clean: ReceiverInputs
    layers: LayerInputs

    def layer(self, receiver: int) -> int:
        """At which layer runs of this receiver's edges start; all edges of one call share it."""
        return self.receivers[receiver][0].layer

    def logits(self, edges: list[tuple[int, int]]) -> Tensor:
        """Logits at the scored positions with each edge (sender, receiver) patched alone: [C, E, V]."""
        start = self.layer(edges[0][1])
        sites: dict[str, list[tuple[int, int, int]]] = {}  # site -> (copy, head, sender)
        for copy, (sender, receiver) in enumerate(edges):
            site, head = self.receivers[receiver]
            assert site.layer == start, "edges of one call start at one layer"
            sites.setdefault(site.name, []).append((copy, head, sender))
        together = self.sides.clean_embeddings.repeat(len(edges), 1, 1)
        with torch.no_grad():
            logits = self.runner.logits(together, partial(self._register, start, sites, len(edges)))
        return logits.unflatten(0, (len(edges), -1))

    def _register(self, start: int, sites: dict[str, list[tuple[int, int, int]]], copies: int, hooks: Hooks) -> None:
        self.layers.start_at(start, copies, hooks)
        if start == len(self.runner.arch.layers):
            norm = self.runner.arch.final_norm
            hooks.on_input(norm.module, lambda _: self._patched(norm, sites["logits"]).flatten(0, 1))
            return
        layer = self.runner.arch.layers[start]
        for module, columns in self.runner.projection_sites(start):
            self._patch_projection(start, layer, module, columns, sites, copies, hooks)
        if "mlp" in sites:
            hooks.on_input(layer.mlp_in, partial(self._patch_mlp, layer.mlp_norm, sites["mlp"]))

    def _patch_projection(
        self,
        index: int,
        layer: Layer,
        module: nn.Module,
        columns: dict[str, slice],
        sites: dict[str, list[tuple[int, int, int]]],
        copies: int,
        hooks: Hooks,
    ) -> None:
        """The clean run's output for every copy, but for the heads that are patched."""
        examples = self.runner.batch.n_examples

        def patch(_: Tensor) -> Tensor:
            parts = []
            for letter in columns:
                part = self.clean.projections[index][letter].repeat(copies, 1, 1, 1)  # [C, E, T, heads·K]
                patched = sites.get(letter, [])
                if patched:
                    self._project(layer, letter, patched, part)
                parts.append(part)
            return torch.cat(parts, -1).flatten(0, 1)

        # What the module itself computes is replaced, so it need not see more than one copy.
        hooks.on_input(module, lambda x: x[:examples])
        hooks.on_output(module, patch)

    def _project(self, layer: Layer, letter: str, patched: list[tuple[int, int, int]], part: Tensor) -> None:
        projection, dtype = layer.projections[letter], part.dtype
        heads = part.unflatten(-1, (-1, projection.head_dim))
        repeat_kv = heads.shape[-2] // projection.n_heads
        copies, which, _ = (torch.tensor(column, device=part.device) for column in zip(*patched, strict=True))
        x = layer.attention_norm(self._patched(layer.attention_norm, patched))  # [c, E, T, D]
        slot = which // repeat_kv
        y = torch.einsum("cetd,ckd->cetk", x, projection.weight(dtype)[slot])
        bias = projection.bias(dtype)
        heads[copies, :, :, which] = y if bias is None else y + bias[slot][:, None, None]

    def _patch_mlp(self, norm: Norm, patched: list[tuple[int, int, int]], x: Tensor) -> Tensor:
        copies = torch.tensor([copy for copy, _, _ in patched], device=x.device)
        x = x.unflatten(0, (-1, self.runner.batch.n_examples)).clone()
        x[copies] = norm(self._patched(norm, patched)).to(x.dtype)
        return x.flatten(0, 1)

    def _patched(self, norm: Norm, patched: list[tuple[int, int, int]]) -> Tensor:
        """x_v + Δ_u before a norm, [c, E, T, D], in the model's dtype."""
        own = self.clean.norm_inputs[norm]
        senders = [sender for _, _, sender in patched]
        distinct = sorted(set(senders))
        differences = torch.stack([_expand(*self.senders[sender]).to(own.device) for sender in distinct])  # [s, n, D]
        x = own.to(differences.dtype).flatten(0, 1).repeat(len(distinct), 1, 1)
        x[:, self.runner.batch.rows_on(x.device)] += differences
        x = x.to(own.dtype).unflatten(1, own.shape[:2])
        return x[[distinct.index(sender) for sender in senders]]


def prepare_patching(runner: Runner, graph: Graph, constants: Constants | None = None) -> PatchedEdges:
    """Run both sides of a batch, for runs of its clean side with edges patched; see `record_both_sides`."""
    examples = runner.batch.n_examples
    clean, layers = ReceiverInputs(runner, lambda x: x[examples:]), LayerInputs(runner.arch.layers)

    def watch(hooks: Hooks) -> None:
        clean.watch(hooks)
        layers.watch(hooks, slice(examples, None))

    sides = record_both_sides(runner, constants, watch)
    senders = [(group, index) for group in sides.senders.nodes() for index in range(group.values.shape[1])]
    receivers = [(site, head) for site in receiver_sites(runner.arch, graph) for head in range(site.count)]
    return PatchedEdges(runner, sides, senders, receivers, clean, layers)


def _expand(group: Nodes, index: int) -> Tensor:
    """A sender's Δ in residual space, [n, D]."""
    values = group.values[:, index]
    if group.weight is None:
        return values
    return values @ group.weight[index * len(group.weight) // group.values.shape[1]]
