"""Clean runs in which one group of senders moves towards its ablated contribution, for integrated gradients there.

A run starts at the group's layer, from the clean run's residual stream, because nothing before it changes. Gradients
stop at the group, because none is wanted before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from ..adapters import SenderSite
from ..forward import Constants, Hooks, Indices, LayerInputs, Register, Runner, each, record_layer_inputs
from ..recording import BothSides, less_clean, record_corrupted_side

_ROUNDING = 2**-6  # relative; of embeddings scaled in bfloat16, with room


@dataclass(frozen=True, eq=False)
class GroupPaths:
    """The paths of a batch's groups, which are the sender sites.

    Args:
        runner: the model on the batch.
        sides: what both of its sides gave.
        layers: what the layers read in the clean run.
        through: run from the embeddings on, so that gradients also reach the layers before the group.
        sent: lists that were sent to the model's devices.
    """

    runner: Runner
    sides: BothSides
    layers: LayerInputs
    through: bool
    sent: Indices

    @property
    def only_tokens(self) -> bool:
        """Does the first layer read only the token embeddings, without position embeddings?"""
        clean = self.sides.clean_embeddings
        return bool((self.layers.inputs[0].to(clean.device) - clean).norm() < _ROUNDING * clean.norm())

    def embeddings(self, group: SenderSite, alphas: Sequence[float]) -> Tensor:
        """What the runs at these points start with, [m·E, T, D]."""
        clean = self.sides.clean_embeddings
        if group.module is not None:
            return clean.repeat(len(alphas), 1, 1)
        towards = self._towards(group)
        return torch.cat([clean + (1 - alpha) * towards for alpha in alphas])

    def watch(self, group: SenderSite, alphas: Sequence[float]) -> Register:
        """What puts the group's contribution at these points, for a pass of `embeddings`."""
        return partial(self._register, group, alphas)

    def _register(self, group: SenderSite, alphas: Sequence[float], hooks: Hooks) -> None:
        if group.module is None:
            return
        if not self.through:
            self.layers.start_at(group.layer, len(alphas), hooks)
        # Before the group all is the clean run's, so the module gives the clean contribution itself.
        towards = self._towards(group)
        left = self.sent.on(towards.device, 1 - torch.tensor(alphas, dtype=torch.float64)).to(towards.dtype)
        moved = (left[:, None, None, None] * towards).flatten(0, 1).requires_grad_()
        hooks.on_output(group.module, lambda y: y.detach() + moved)

    def _towards(self, group: SenderSite) -> Tensor:
        """Ablated less clean output of the group's module, or embedding, [E, T, D]; zero except at the batch's rows."""
        batch, x = self.runner.batch.at(group.stream), self.sides.senders.values[group.index]  # [n, D], or [n, H·K]
        if group.heads is not None:
            by_head, weights = x.unflatten(1, (group.heads.n_heads, -1)), group.heads.out_weights(x.dtype)
            x = reduce(torch.add, (by_head[:, some].flatten(1) @ weight.flatten(0, 1) for some, weight in weights))
        full = x.new_zeros(batch.clean.numel(), x.shape[1], dtype=self.sides.clean_embeddings.dtype)
        full[batch.rows_on(x.device)] = (x / group.scale).to(full.dtype)
        return full.view(*batch.shape, -1)


def record_paths(runner: Runner, constants: Constants | None, through: bool, sent: Indices) -> GroupPaths:
    """Run the corrupted prompts of a batch and then the clean ones, for the paths between them; see `GroupPaths`."""
    side = record_corrupted_side(runner, constants)

    def run(layers: Register, senders: Register) -> Tensor:
        return runner.record(side.clean_embeddings, each(senders, layers))

    layers, (senders, logits) = record_layer_inputs(
        runner.arch, lambda layers: less_clean(side, runner.batch, partial(run, layers))
    )
    sides = BothSides(senders, side.clean_embeddings, side.corrupted_embeddings, side.corrupted_logits, logits)
    return GroupPaths(runner, sides, layers, through, sent)
