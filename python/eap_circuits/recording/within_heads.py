"""Scores inside heads: from what they read at one span's tokens to what they give at another's.

An input v of a layer's heads (a key, a value, what another mixer reads) matters at the tokens of span p by way of the
heads' values z at those of span q:

    W[q, p, v] = Σ_{s in p} ⟨Δy_v(s), Σ_k w_k ∂/∂y_v(s) Σ_{t in q} ⟨ĝ_k(t), z(t)⟩⟩,    ĝ_k = ∂loss/∂z at path point k,

where y_v is what v's projection gives, Δy_v the ablated run's less the clean one's, and ĝ_k a constant. With A the
weights of attention, values and keys have

    Σ_{t, s} A(t, s) ⟨ĝ(t), Δv(s)⟩    and    Σ_{t, s} A(t, s) δℓ(t, s) ⟨ĝ(t), v(s) − z(t)⟩,

δℓ(t, s) being what Δk(s) changes of the product with the query at t, before the softmax. Over all q the sum is
⟨Δy_v, ∂loss/∂y_v⟩ at p. No weights are needed: a backward pass through the mixer alone is run for each q.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..forward import Constants, Hooks, Runner
from ..graph import Graph
from .reference_run import record_run

_Read = tuple[Tensor, dict[str, slice]]  # what a projection gave, and its features by name


class WithinHeads:
    """Scores inside the heads of a batch, accumulated over passes along the path.

    Args:
        runner: the model on one batch, whose tokens have spans.
        graph: its edge graph.
        constants: what ablated senders give, if not what they give in the corrupted run.
        spans: how many there are, P.

    Attributes:
        sums: float64 [P, P, R] by the query's span, the key's span and the receiver; summed over examples, and zero
            where a receiver is no head's input.
    """

    def __init__(self, runner: Runner, graph: Graph, constants: Constants | None, spans: int) -> None:
        batch, self._runner, self._graph = runner.batch, runner, graph
        assert batch.spans is not None
        device = batch.rows.device
        self.sums = torch.zeros(spans, spans, graph.n_receivers, dtype=torch.float64, device=device)
        # Of a token's row and span: is it there, and can the two prompts differ at it?
        self._in_span = torch.zeros(batch.clean.numel(), spans, dtype=runner.arch.accumulate, device=device)
        self._in_span[batch.rows, batch.spans.flatten()[batch.rows]] = 1
        ablated, clean = (record_run(runner, *how).projections for how in ((True, constants), (False,)))
        self._deltas = [
            {name: (x - clean[index][name]).to(runner.arch.accumulate) for name, x in layer.items()}
            for index, layer in enumerate(ablated)
        ]

    def register(self, weights: Tensor, hooks: Hooks) -> None:
        """Watch a pass over path points of these quadrature weights, [m]. Others' hooks on projections come before."""
        for index, layer in enumerate(self._runner.arch.layers):
            if layer.n_heads:
                read: list[_Read] = []
                for module, columns in self._runner.projection_sites(index):
                    hooks.on_output(module, partial(self._see, read, columns))
                hooks.on_input(layer.out, partial(self._watch, index, weights, read))

    def _see(self, read: list[_Read], columns: dict[str, slice], y: Tensor) -> Tensor:
        # A view: hooks on y itself are not to be called for a part of its gradient.
        y = y.view_as(y)
        read.append((y, columns))
        return y

    def _watch(self, index: int, weights: Tensor, read: list[_Read], z: Tensor) -> Tensor:
        given = z.view_as(z)
        given.register_hook(partial(self._add, index, weights, read, z))
        return given

    def _add(self, index: int, weights: Tensor, read: list[_Read], z: Tensor, gradient: Tensor) -> None:
        """Pull the gradient at z, [m·E, T, X], back to what was read, from the tokens of one span after another."""
        in_span, weights = (x.to(gradient.device, self._in_span.dtype) for x in (self._in_span, weights))
        for q, tokens in enumerate(in_span.unbind(1)):
            own = gradient.unflatten(0, (len(weights), -1)).flatten(1, 2) * tokens[:, None].to(gradient.dtype)
            slopes = torch.autograd.grad(
                z, [y for y, _ in read], own.view_as(z), retain_graph=True, materialize_grads=True
            )
            for (_, columns), slope in zip(read, slopes, strict=True):
                by_point = slope.unflatten(0, (len(weights), -1)).to(in_span.dtype)
                along = torch.einsum("k,kety->ety", weights, by_point)
                for name, part in columns.items():
                    receivers = self._graph.receivers_at(index, name)
                    terms = along[..., part] * self._deltas[index][name]
                    each = terms.flatten(0, 1).unflatten(1, (receivers.stop - receivers.start, -1)).sum(2)
                    self.sums[q, :, receivers] += (in_span.T @ each).to(self.sums)
