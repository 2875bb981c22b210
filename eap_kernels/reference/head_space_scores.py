"""Head-space scores in plain PyTorch: expand a tile of tokens to the residual stream, contract it, go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from eap_kernels.reference.edge_scores import edge_scores


def expanded(
    groups: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], rows: slice, features: int, dtype: torch.dtype
) -> Tensor:
    """Residual-space rows of some tokens: [nodes, n, D]."""
    first = groups[0][0]
    tokens = len(range(*rows.indices(first.shape[0])))
    out = first.new_empty((sum(group[0].shape[1] for group in groups), tokens, features), dtype=dtype)
    parts = out.split([group[0].shape[1] for group in groups])
    plain = [
        (to, group[0][rows].transpose(0, 1)) for to, group in zip(parts, groups, strict=True) if group[1].dim() < 3
    ]
    # All nodes without a weight at once: on a GPU, of rows that lie in memory like those of `out`, in one launch.
    plain = [(to[0], x[0]) if len(to) == 1 else (to, x) for to, x in plain]
    if plain:
        torch._foreach_copy_([to for to, _ in plain], [x for _, x in plain])
    for to, (values, weight, coefficients, normalised) in zip(parts, groups, strict=True):
        if weight.dim() == 3:
            x = values[rows].transpose(0, 1).to(dtype)  # [h, n, K]
            # Nodes that share a weight are one product with it.
            alike = len(weight), len(x) // max(len(weight), 1) * tokens
            torch.bmm(x.reshape(*alike, x.shape[2]), weight.to(dtype), out=to.view(*alike, features))
        if normalised.dim() == 3:
            along = coefficients[:, :, rows].to(dtype).permute(2, 0, 1)  # [n, h, M]
            to.transpose(0, 1).baddbmm_(along, normalised[:, rows].to(dtype).transpose(0, 1), alpha=-1)
    return out


def head_space_scores(
    values: list[Tensor],
    weights: list[Tensor],
    coefficients: list[Tensor],
    normalised: list[Tensor],
    sender_groups: int,
    features: int,
    reach: Tensor,
    out: Tensor,
    workspace: int,
    contract: Callable[..., None] = edge_scores,
    rounded: bool = False,
    expand: Callable[..., Tensor] = expanded,
) -> None:
    """Add the scores to out [S, R]; each list holds one tensor a group, the first `sender_groups` are senders.

    values [N, h, K], weights [g, K, D] or empty, coefficients [h, M, N] and normalised [M, N, D] or empty. At most
    `workspace` bytes are expanded at once, but at least one token. `contract` multiplies a tile; its rows are in the
    accumulation dtype, or in the values' dtype if `rounded`. `expand` makes the rows of a tile.
    """
    groups = list(zip(values, weights, coefficients, normalised, strict=True))
    senders, receivers = groups[:sender_groups], groups[sender_groups:]
    tokens = values[0].shape[0]
    dtype = values[0].dtype if rounded else out.dtype
    tile = max(1, workspace // max(1, (out.shape[0] + out.shape[1]) * features * dtype.itemsize))
    for start in range(0, tokens, tile):
        rows = slice(start, start + tile)
        delta, grad = (expand(side, rows, features, dtype) for side in (senders, receivers))
        contract(delta, grad, reach, out, None)
