"""What every sender writes in one pass, for methods that follow senders along a path."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from eap_kernels import Nodes

from ..adapters import Layer
from .borrow import Hooks
from .runner import Runner
from .senders import heads_of


class Contributions:
    """Every sender's contribution at the batch's rows in one pass, in head space, without gradient.

    Args:
        runner: the model on one batch.
        embeddings: what the pass starts with, [E, T, D].
    """

    def __init__(self, runner: Runner, embeddings: Tensor) -> None:
        self._arch, self._batch = runner.arch, runner.batch
        self.embedding = self._rows(embeddings)  # [n, D]
        self.values: list[Tensor] = []  # per layer [n, H·K]
        self.mlps: list[Tensor] = []  # per layer [n, D]

    def watch(self, hooks: Hooks) -> None:
        """Record the pass that has these hooks."""
        for layer in self._arch.layers:
            hooks.on_input(layer.out, partial(self._keep_values, layer))
            hooks.on_output(layer.mlp_out, partial(self._keep_mlp, layer))

    def less(self, other: Contributions) -> list[Nodes]:
        """The senders' differences, this pass's contributions less another's, in the graph's order."""
        nodes = [Nodes((self.embedding - other.embedding)[:, None])]
        for index, layer in enumerate(self._arch.layers):
            heads = heads_of(layer, self.values[index] - other.values[index])
            nodes += [heads, Nodes((self.mlps[index] - other.mlps[index])[:, None])]
        return nodes

    def _rows(self, x: Tensor) -> Tensor:
        # A copy: some models add to the MLP's output in place.
        return self._batch.active(x)[0].to(self._arch.accumulate, copy=True)

    def _keep_values(self, layer: Layer, z: Tensor) -> None:
        self.values.append(self._rows(layer.written(z.detach())))

    def _keep_mlp(self, layer: Layer, y: Tensor) -> None:
        self.mlps.append(self._rows(y) * layer.scale)
