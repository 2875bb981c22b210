"""head_space_scores, and what it replaces: both operands expanded with torch, then scored by edge_scores."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import eap_kernels as ek
from bench import measure
from bench.kernels import shapes
from eap_kernels.testing.shapes import head_space

# Bytes of rows that are held at once where memory is measured: the default of a GPU holds as many as it has room for.
WORKSPACE = 2**28


inputs = partial(head_space, device=measure.DEVICE)


def expand(nodes: list) -> Tensor:
    """Every row in the residual stream: [rows, N, D]."""
    example = nodes[0].values if nodes[0].weight is None else nodes[0].weight
    rows = sum(node.values.shape[1] for node in nodes)
    result = example.new_empty(rows, nodes[0].values.shape[0], example.shape[2])
    first = 0
    for node in nodes:
        count = node.values.shape[1]
        part, values = result[first : first + count], node.values.transpose(0, 1)  # [h, N, K]
        first += count
        if node.weight is None:
            part.copy_(values)
        else:
            weight = node.weight.repeat_interleave(count // len(node.weight), 0)
            torch.bmm(values, weight, out=part)
        if node.coefficients is not None:
            # one product of all path points for each token: [N, h, M] x [N, M, D]
            product = torch.bmm(node.coefficients.permute(2, 0, 1), node.normalised.transpose(0, 1))
            part -= product.transpose(0, 1)
    return result


def expanded_scores(senders: list, receivers: list, reach: Tensor) -> Tensor:
    return ek.edge_scores(expand(senders), expand(receivers), reach)


def tokens_for(model: shapes.Model, dtype: torch.dtype, cpu_bytes: int) -> int:
    return shapes.tokens_for(model.senders + model.receivers, model.width, dtype, cpu_bytes)


def peak(what: str, name: str, tokens: int) -> int:
    """The peak bytes that "fused" or "expanded" scores of a model need above their inputs."""
    model, dtype = shapes.MODELS[name], torch.float32
    fused = partial(ek.head_space_scores, workspace=WORKSPACE)
    run = {"fused": fused, "expanded": expanded_scores}[what]
    run(*inputs(model, 2, dtype))  # libraries load here
    given = inputs(model, tokens, dtype)
    return measure.peak_bytes(lambda: run(*given))
