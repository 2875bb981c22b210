"""Clean runs in which one group of senders moves towards its ablated contribution, for integrated gradients there.

The run starts at the group's layer, from the clean run's residual stream, and the gradient at the group: nothing before
it changes, and no gradient before it is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..forward import Hooks, LayerInputs, Runner
from ..recording import SenderDifferences

_ROUNDING = 2**-6  # relative; of embeddings scaled in bfloat16, with room


@dataclass(frozen=True)
class Group:
    """Senders that move together: the embedding, a layer's heads or its MLP."""

    index: int  # among the groups
    senders: slice
    layer: int = 0
    module: nn.Module | None = None  # its output, times `scale`, is what the group adds; None: the embedding
    scale: float = 1.0


class GroupPaths:
    """The paths of a batch's groups. Completes `senders`, and its `clean_logits`, by a run of the clean prompts.

    Args:
        runner: the model on one batch.
        senders: its differences, made with `clean=False`.
        through: run from the embeddings on, so that gradients reach the layers before the group too, past the group.
    """

    def __init__(self, runner: Runner, senders: SenderDifferences, through: bool = False) -> None:
        self._runner, self._senders, self._through = runner, senders, through
        arch, graph = runner.arch, senders.graph
        self.groups = [Group(0, slice(0, 1))]
        for index, layer in enumerate(arch.layers):
            # What a norm after attention writes is the heads' contribution.
            out = layer.out if layer.post_norm is None else layer.post_norm.module
            mlp = graph.mlp_sender(index)
            self.groups += [
                Group(2 * index + 1, graph.head_senders(index), index, out, layer.scale),
                Group(2 * index + 2, slice(mlp, mlp + 1), index, layer.mlp_out, layer.scale),
            ]
        self._layers = LayerInputs(arch.layers)

        def register(hooks: Hooks) -> None:
            senders.register_clean(hooks)
            self._layers.watch(hooks)

        with torch.no_grad():
            senders.clean_logits = runner.logits(senders.clean_embeddings, register)

    @property
    def only_tokens(self) -> bool:
        """Does the first layer read the token embeddings alone, without position embeddings?"""
        clean = self._senders.clean_embeddings
        return bool((self._layers.first.to(clean.device) - clean).norm() < _ROUNDING * clean.norm())

    def embeddings(self, group: Group, alphas: Tensor) -> Tensor:
        """What the runs at these points start with, [m·E, T, D]."""
        clean = self._senders.clean_embeddings
        if group.module is not None:
            return clean.repeat(len(alphas), 1, 1)
        towards = self._towards(group)
        return torch.cat([clean + (1 - float(alpha)) * towards for alpha in alphas])

    def watch(self, group: Group, alphas: Tensor) -> Callable[[Hooks], None]:
        """What puts the group's contribution at these points, for a pass of `embeddings`."""
        return partial(self._register, group, alphas)

    def _register(self, group: Group, alphas: Tensor, hooks: Hooks) -> None:
        if group.module is None:
            return
        if not self._through:
            self._layers.start_at(group.layer, len(alphas), hooks)
        # Before the group all is the clean run's, so the module gives the clean contribution itself.
        towards = self._towards(group)
        moved = ((1 - alphas).to(towards)[:, None, None, None] * towards).flatten(0, 1).requires_grad_()
        hooks.on_output(group.module, lambda y: y.detach() + moved)

    def _towards(self, group: Group) -> Tensor:
        """Ablated less clean output of the group's module, or embedding, [E, T, D]; zero but for the batch's rows."""
        batch, nodes = self._runner.batch, self._senders.group(group.index)
        x = nodes.values.flatten(1)  # [n, D], or [n, H·K]
        x = x if nodes.weight is None else x @ nodes.weight.flatten(0, 1)
        like = self._senders.clean_embeddings
        full = x.new_zeros(batch.clean.numel(), like.shape[-1], dtype=like.dtype)
        full[batch.rows_on(x.device)] = (x / group.scale).to(like.dtype)
        return full.view_as(like)
