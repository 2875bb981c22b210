"""The models on whose shapes operators are timed, and their operands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import eap_kernels as ek
from eap_kernels.testing.timing import PRETENDED

LAYOUTS = ("contiguous", "tokens_first")
POINTS = 5
# Further layers reuse the weights of these, which are enough not to stay in a cache.
WEIGHT_BYTES = 2**29


class Model(NamedTuple):
    """Layers, heads, key/value heads, d_model, head dimension, and whether attention and MLP read the same residual."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    head_dim: int
    parallel: bool = False

    def groups(self) -> Iterator[tuple[int, int]]:
        """(reach, receivers) of every q, k, v and m and of the logits, in the order of the receivers."""
        for layer in range(self.layers):
            seen = 1 + layer * (self.heads + 1)
            for count in (self.heads, self.kv_heads, self.kv_heads):
                yield seen, count
            yield (seen if self.parallel else seen + self.heads), 1
        yield self.senders, 1

    @property
    def senders(self) -> int:
        return 1 + self.layers * (self.heads + 1)

    @property
    def reach(self) -> Tensor:
        """int64 [R]."""
        return torch.tensor([reach for reach, count in self.groups() for _ in range(count)])

    @property
    def receivers(self) -> int:
        return sum(count for _, count in self.groups())

    @property
    def layer_receivers(self) -> int:
        return self.heads + 2 * self.kv_heads + 1

    def flops(self, tokens: int) -> float:
        """The useful operations: those of the staircase."""
        return 2.0 * sum(reach * count for reach, count in self.groups()) * tokens * self.width


MODELS = {
    "gpt2": Model(12, 12, 12, 768, 64),
    "qwen2.5-0.5b": Model(24, 14, 2, 896, 64),
    "pythia-2.8b": Model(32, 32, 32, 2560, 80, parallel=True),
    "gemma-2-2b": Model(26, 8, 4, 2304, 256),
    "llama-3.1-8b": Model(32, 32, 8, 4096, 128),
}
if PRETENDED:
    MODELS = {name: model._replace(layers=2) for name, model in MODELS.items()}


def normal(
    rows: int, tokens: int, width: int, dtype: torch.dtype, layout: str = "contiguous", *, device: torch.device | str
) -> Tensor:
    """Normal values [rows, tokens, width], made on the device in one of LAYOUTS."""
    if layout == "tokens_first":
        return torch.randn(tokens, rows, width, device=device, dtype=dtype).transpose(0, 1)
    return torch.randn(rows, tokens, width, device=device, dtype=dtype)


def head_space(
    model: Model, tokens: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[list[ek.Nodes], list[ek.Nodes], Tensor]:
    """Senders and receivers of every layer, as attribution keeps them, and reach."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

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

    senders, receivers = [residual()], list[ek.Nodes]()
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
