"""Run a circuit: every receiver reads the clean run along kept edges and the corrupted run along all others.

Receiver v's input is y_v = corr_v + Σ_u mask[u, v]·(cur_u − corr_u), cur being the circuit's own run (DESIGN (i)). A
receiver with no kept edge reads the corrupted run, one with all its edges the circuit's own residual stream; only the
others are computed, and only from senders that one of them reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from eap_kernels import masked_read

from ..adapters import Layer, Norm
from ..graph import Graph
from .borrow import Hooks
from .runner import Runner


class CorruptedRun:
    """The corrupted run of a batch, as far as circuits read it.

    Holds `logits` [E, V] and, per layer, what the norms read [E, T, D], the projections' outputs [E, T, heads·K]
    (per query head where the graph is), the heads' values [E, T, H·K] and the MLP's output [E, T, D].
    """

    def __init__(self, runner: Runner) -> None:
        arch = runner.arch
        self.embeddings = runner.embed(runner.batch.corrupted)
        self.norm_inputs: dict[int, Tensor] = {}
        self.projections: list[dict[str, Tensor]] = []
        self.values: list[Tensor] = []
        self.mlps: list[Tensor] = []

        def read(norm: Norm) -> Callable[[Tensor], None]:
            return lambda x: self.norm_inputs.__setitem__(id(norm.module), x)

        def register(hooks: Hooks) -> None:
            for norm in arch.norms:
                hooks.on_input(norm.module, read(norm))
            for index, layer in enumerate(arch.layers):
                self.projections.append({})
                _on_projections(runner, hooks, index, self.projections[-1].__setitem__)
                hooks.on_input(layer.out, self.values.append)
                hooks.on_output(layer.mlp, self.mlps.append)

        with torch.no_grad():
            self.logits = runner.logits(self.embeddings, register)


def run_circuit(runner: Runner, graph: Graph, corrupted: CorruptedRun, mask: Tensor) -> Tensor:
    """Logits [E, V] of a circuit at the scored positions.

    Args:
        mask: bool or floating [S, R]; values between 0 and 1 keep an edge in part.
    """
    with torch.no_grad():
        return _CircuitRun(runner, graph, corrupted, mask).logits()


class _CircuitRun:
    def __init__(self, runner: Runner, graph: Graph, corrupted: CorruptedRun, mask: Tensor) -> None:
        self.runner, self.graph, self.corrupted = runner, graph, corrupted
        self.dtype = runner.arch.accumulate
        mask = mask.to(runner.arch.device, self.dtype)
        kept = mask.sum(0)
        edges = graph.edge_mask.to(mask.device)
        self.closed = ~(mask != 0).any(0)  # [R] reads the corrupted run alone
        self.whole = ((mask == 1) | ~edges).all(0) & (kept > 0)  # [R] reads the circuit's own run alone
        partial = ~self.closed & ~self.whole
        self.needed = (mask[:, partial] != 0).any(1).tolist()  # [S] read by a receiver that has to be computed
        rows = torch.tensor(self.needed).cumsum(0)
        self.row = (rows - 1).tolist()  # sender -> its row in `differences`
        self.mask = mask[torch.tensor(self.needed, device=mask.device)]
        batch, length = runner.batch.shape
        self.differences = mask.new_zeros(int(rows[-1]), batch * length, runner.arch.d_model)

    def logits(self) -> Tensor:
        embeddings = self.runner.embed(self.runner.batch.clean)
        self._write(0, self.corrupted.embeddings, embeddings)
        return self.runner.logits(embeddings, self._register)

    def _register(self, hooks: Hooks) -> None:
        arch, graph = self.runner.arch, self.graph
        for index, layer in enumerate(arch.layers):
            _on_projections(self.runner, hooks, index, partial(self._project, index, layer))
            hooks.on_input(layer.out, partial(self._write_heads, index, layer))
            hooks.on_input(layer.mlp, partial(self._read_mlp, index, layer))
            hooks.on_output(layer.mlp, partial(self._write, graph.mlp_sender(index), self.corrupted.mlps[index]))
        final = arch.final_norm
        hooks.on_input(final.module, lambda _: self._read_one(graph.logits_receiver, graph.n_senders, final))

    # Senders.

    def _write(self, sender: int, corrupted: Tensor, current: Tensor) -> None:
        if self.needed[sender]:
            difference = current.to(self.dtype) - corrupted.to(self.dtype)
            self.differences[self.row[sender]] = difference.flatten(0, 1)

    def _write_heads(self, index: int, layer: Layer, z: Tensor) -> None:
        first = self.graph.head_senders(index).start
        heads = [h for h in range(layer.q.n_heads) if self.needed[first + h]]
        if heads:
            difference = z.to(self.dtype) - self.corrupted.values[index].to(self.dtype)
            per_head = difference.flatten(0, 1).unflatten(1, (layer.q.n_heads, -1)).transpose(0, 1)  # [H, N, K]
            start = self.row[first + heads[0]]
            torch.bmm(
                per_head[heads],
                layer.out_weight(self.dtype)[heads],
                out=self.differences[start : start + len(heads)],
            )

    # Receivers.

    def _read(self, receivers: Tensor, reach: int, norm: Norm) -> Tensor:
        """y_v of some receivers behind one norm, in the model's dtype: [r, E, T, D]."""
        base = self.corrupted.norm_inputs[id(norm.module)]
        seen = self.row[reach - 1] + 1  # rows of the senders before the receivers
        y = masked_read(base.flatten(0, 1).to(self.dtype), self.differences[:seen], self.mask[:seen][:, receivers])
        return y.to(base.dtype).unflatten(1, base.shape[:2])

    def _read_one(self, receiver: slice, reach: int, norm: Norm) -> Tensor | None:
        """The input of the one receiver behind a norm; None where it is the circuit's own residual stream."""
        if self.whole[receiver]:
            return None
        if self.closed[receiver]:
            return self.corrupted.norm_inputs[id(norm.module)]
        return self._read(torch.tensor([receiver.start], device=self.mask.device), reach, norm)[0]

    def _read_mlp(self, index: int, layer: Layer, own: Tensor) -> Tensor | None:
        y = self._read_one(self.graph.receivers_at(index, "mlp"), self.graph.mlp_reach(index), layer.mlp_norm)
        return None if y is None else layer.mlp_norm(y)

    def _project(self, index: int, layer: Layer, letter: str, own: Tensor) -> Tensor:
        """A projection's output with every head's own input: [E, T, heads·K]."""
        receivers = self.graph.receivers_at(index, letter)
        closed, whole = self.closed[receivers], self.whole[receivers]
        if whole.all():
            return own
        corrupted = self.corrupted.projections[index][letter]
        if closed.all():
            return corrupted
        n = len(closed)
        heads = (~closed & ~whole).nonzero()[:, 0]
        out = corrupted.unflatten(-1, (n, -1)).clone()
        out[..., whole, :] = own.unflatten(-1, (n, -1))[..., whole, :]
        if len(heads):
            projection = layer.projections[letter]
            y = self._read(receivers.start + heads, self.graph.attention_reach(index), layer.attention_norm)
            x = layer.attention_norm(y).flatten(1, 2)  # [r, E·T, D]
            which = heads // (n // projection.n_heads)  # key/value head of each receiver
            z = x @ projection.weight(x.dtype)[which].transpose(1, 2)  # [r, E·T, K]
            bias = projection.bias(x.dtype)
            z = z if bias is None else z + bias[which][:, None]
            out[..., heads, :] = z.unflatten(1, out.shape[:2]).permute(1, 2, 0, 3)
        return out.flatten(-2)


def _on_projections(runner: Runner, hooks: Hooks, index: int, hook: Callable[[str, Tensor], Tensor | None]) -> None:
    """Call `hook(letter, y)` with each projection's output, [E, T, heads·K]; what it returns takes its place."""
    for module, columns in runner.projection_sites(index):

        def after(y: Tensor, columns: dict[str, slice] = columns) -> Tensor | None:
            parts = {letter: y[..., features] for letter, features in columns.items()}
            new = {letter: hook(letter, part) for letter, part in parts.items()}
            if all(part is None for part in new.values()):
                return None
            return torch.cat([parts[letter] if part is None else part for letter, part in new.items()], -1)

        hooks.on_output(module, after)
