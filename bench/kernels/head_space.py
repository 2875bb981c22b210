"""head_space_scores, and what it replaces: both operands expanded with torch, then scored by edge_scores."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import eap_kernels as ek
from bench import measure
from bench.kernels import shapes

POINTS = 5
# Bytes of rows that are held at once where memory is measured: the default of a GPU holds as many as it has room for.
WORKSPACE = 2**28
# Further layers reuse the weights of these, which are enough not to stay in a cache.
WEIGHT_BYTES = 2**29


def inputs(model: shapes.Model, tokens: int, dtype: torch.dtype) -> tuple[list, list, Tensor]:
    """Senders and receivers of every layer, as attribution keeps them, and reach."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=measure.DEVICE, dtype=dtype)

    groups = (model.heads, model.kv_heads, model.kv_heads, model.heads)  # q, k, v, o
    layer_bytes = sum(groups) * model.head_dim * model.width * dtype.itemsize
    distinct = min(model.layers, max(1, WEIGHT_BYTES // layer_bytes))
    weights = [[normal(g, model.head_dim, model.width) / model.width**0.5 for g in groups] for _ in range(distinct)]

    def residual() -> ek.Nodes:
        return ek.Nodes(normal(tokens, 1, model.width))

    def statistics(count: int) -> Tensor:
        return normal(count, POINTS, tokens) / POINTS

    def read() -> Tensor:
        return normal(POINTS, tokens, model.width)

    senders, receivers = [residual()], []
    for layer in range(model.layers):
        *qkv, out = weights[layer % distinct]
        senders += [ek.Nodes(normal(tokens, model.heads, model.head_dim), out), residual()]
        normalised = read()
        for weight in qkv:
            count = len(weight)
            values = normal(tokens, count, model.head_dim)
            receivers.append(ek.Nodes(values, weight, statistics(count), normalised))
        receivers.append(ek.Nodes(normal(tokens, 1, model.width), None, statistics(1), read()))
    receivers.append(ek.Nodes(normal(tokens, 1, model.width), None, statistics(1), read()))
    return senders, receivers, model.reach


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
