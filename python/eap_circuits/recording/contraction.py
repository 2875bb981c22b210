"""The one place where senders meet receivers: S[u, v] += Σ_t ⟨Δ_u(t), gradient_v(t)⟩."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, groupby

import torch
from torch import Tensor

from eap_kernels import Nodes, head_space_scores

from ..adapters import Architecture, linear_shape

# Of attention's weights, copied for contraction at once; kernels take few features at a time anyway, but not too few.
# On a GPU so many times as much, as there every slice is launches for every layer.
COPIED_BYTES, ON_A_GPU = 2**28, 8
NARROWEST = 64


def contract(
    arch: Architecture,
    senders: Iterable[Nodes],
    receivers: Iterable[Nodes],
    reach: Tensor,
    rows: Tensor | slice = slice(None),
    workspace: int | None = None,
) -> Tensor:
    """Edge scores summed over the batch, or over some of its rows: float32 (or float64) [S, R].

    If the model is on several devices, receivers stay where they are, and the senders of one device after another are
    brought to them.

    Args:
        senders, receivers: `lowered` nodes, of the whole graph or of a part of it.
        reach: int64 [R], how many of these senders each of these receivers sees.
        rows: a slice of the batch's n rows, or int64 indices into them.
        workspace: as in `head_space_scores`.
    """
    with torch.no_grad():
        delta, grad = ([_rows(group, rows) for group in side] for side in (senders, receivers))
        scores = torch.zeros(_count(delta), len(reach), dtype=arch.accumulate, device=arch.device)
        for read, theirs in _by_device(grad):
            device = theirs[0].values.device
            for written, own in _by_device(delta):
                seen = (reach[read] - written.start).clamp(0, written.stop - written.start)
                if seen.any():
                    near = [_to(group, device) for group in own]
                    found = head_space_scores(near, theirs, seen, workspace=workspace)
                    scores[written, read] = found.to(arch.device)
        return scores


def contract_neurons(senders: list[Nodes], receivers: list[Nodes], reach: Tensor) -> Tensor:
    """Σ_t Δ_u(t) ⊙ Σ_v ∂loss/∂x_v(t), v every receiver that sees u, summed over the batch: [S, D].

    The inner sum is the gradient at what u writes to the residual stream. It is accumulated from the logits down to the
    embeddings, receiver by receiver.
    """
    with torch.no_grad():
        starts = accumulate((group.values.shape[1] for group in receivers[:-1]), initial=0)
        # In the graph's order: later receivers see at least what earlier ones see.
        waiting = [(int(reach[start]), group) for start, group in zip(starts, receivers, strict=True)]
        gradient = torch.zeros_like(_together(receivers[-1]))
        first, scores = _count(senders), []
        for group in reversed(senders):
            first -= group.values.shape[1]
            while waiting and waiting[-1][0] > first:
                gradient += _together(waiting.pop()[1]).to(gradient.device)
            gradient = gradient.to(group.values.device)
            scores.append(_elementwise(group, gradient))
        return torch.cat([part.to(gradient.device) for part in scores[::-1]])


def feature_slices(arch: Architecture) -> list[slice]:
    """The residual stream's features, or this rank's, in slices, of which senders meet receivers one after another.

    A slice needs only its part of the weights, so that copies of all attention weights are never held at once. All
    slices together cost what the whole costs, as every weight is copied once.
    """
    heads = sum(linear_shape(layer.out)[1] + sum(p.width for p in layer.projections.values()) for layer in arch.layers)
    copied = COPIED_BYTES * (ON_A_GPU if arch.device_kind == "cuda" else 1)
    most = copied // (max(heads, 1) * arch.contraction_dtype.itemsize)
    width = max(NARROWEST, most // NARROWEST * NARROWEST)
    if width >= arch.d_model:
        return [arch.features]
    first, last, _ = arch.features.indices(arch.d_model)
    return [slice(start, min(start + width, last)) for start in range(first, last, width)]


def lowered(arch: Architecture, nodes: Iterable[Nodes]) -> list[Nodes]:
    """Nodes in the dtype in which senders meet receivers, converted one at a time."""
    return [_to(group, arch.contraction_dtype) for group in nodes]


def _to(group: Nodes, where: torch.dtype | torch.device) -> Nodes:
    rest = (None if x is None else x.to(where) for x in (group.weight, group.coefficients, group.normalised))
    return Nodes(group.values.to(where), *rest)


def _count(nodes: list[Nodes]) -> int:
    return sum(group.values.shape[1] for group in nodes)


def _by_device(nodes: list[Nodes]) -> Iterator[tuple[slice, list[Nodes]]]:
    """Neighbours on one device together, and where among all nodes they are."""
    start = 0
    for _, run in groupby(nodes, lambda group: group.values.device):
        together = list(run)
        yield slice(start, start + _count(together)), together
        start += _count(together)


def _rows(group: Nodes, part: Tensor | slice) -> Nodes:
    if isinstance(part, Tensor):
        part = part.to(group.values.device)
    if group.coefficients is None or group.normalised is None:
        return replace(group, values=group.values[part])
    return replace(
        group,
        values=group.values[part],
        coefficients=group.coefficients[..., part],
        normalised=group.normalised[:, part],
    )


def _together(group: Nodes) -> Tensor:
    """The sum of a group of receivers' gradients in the residual stream, [n, D]."""
    x = group.values
    if group.weight is None:
        x = x.sum(1)
    else:
        shared = x.unflatten(1, (len(group.weight), -1)).sum(2)  # [n, g, K]
        x = shared.flatten(1) @ group.weight.flatten(0, 1)
    if group.coefficients is None or group.normalised is None:
        return x
    return x - torch.einsum("pn,pnd->nd", group.coefficients.sum(0), group.normalised.to(x.dtype))


def _elementwise(group: Nodes, gradient: Tensor) -> Tensor:
    """Σ_t Δ(t) ⊙ gradient(t) of a group of senders, [h, D]."""
    if group.weight is None:
        return (group.values * gradient[:, None]).sum(0)
    return (torch.einsum("nhk,nd->hkd", group.values, gradient) * group.weight).sum(1)
