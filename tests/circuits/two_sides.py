"""Encoder-decoders by hand: plain_runs.py's runs, circuits and scores of T5 and BART, on one prompt. x are [T, D].

A receiver reads x_v = read(v, first, c), where c are the contributions of the senders before it and `first` is the
first one of its own residual stream; the keys and values of cross-attention get the encoder's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.circuits.plain_runs import Run

Read = Callable[[int, int, list[Tensor]], Tensor]


def of_model(v: int, first: int, c: list[Tensor]) -> Tensor:
    return torch.stack(c[first:]).sum(0)


def of_circuit(m: Tensor, ablated: list[Tensor]) -> Read:
    """Of a mask [S, R], and what every sender contributes where an edge is ablated."""

    def read(v: int, first: int, c: list[Tensor]) -> Tensor:
        return sum(m[u, v] * c[u] + (1 - m[u, v]) * ablated[u] for u in range(first, len(c)))

    return read


class TwoSides:
    """The pieces of a T5 or a BART."""

    def __init__(self, model: Any) -> None:
        self.model, self.t5 = model, model.config.model_type == "t5"
        self.body = model if self.t5 else model.model

    def run(self, tokens: Tensor, decoder: Tensor, read: Read = of_model, start: Tensor | None = None) -> Run:
        """The run of one prompt; `start`: what the encoder's stream begins with, in place of the tokens' embeddings."""
        x: list[Tensor] = []
        c = [self.begin("encoder", tokens) if start is None else start]

        def take(first: int, stop: int | None, fixed: Tensor | float) -> Tensor:
            x.append((read(len(x), first, c[:stop]) + fixed).requires_grad_())
            return x[-1]

        fixed: Tensor | float = 0.0  # what no sender contributes: biases of output projections
        for layer in self.layers("encoder"):
            fixed = fixed + self.attend(
                layer, False, self.distances("encoder", tokens), take, c, (0, fixed), (0, fixed)
            )
            c.append(self.mlp(layer, "self_attn_layer_norm", take(0, None, fixed)))
        n, of_encoder = len(c), fixed
        c.append(self.begin("decoder", decoder))
        fixed = 0.0
        for layer in self.layers("decoder"):
            fixed = fixed + self.attend(
                layer, False, self.distances("decoder", decoder), take, c, (n, fixed), (n, fixed)
            )
            if not self.t5:
                between = take(n, None, fixed)
                c.append(self.norm(layer.self_attn_layer_norm, between) - between)
            fixed = fixed + self.attend(layer, True, 0.0, take, c, (n, fixed), (0, of_encoder), n)
            c.append(self.mlp(layer, "encoder_attn_layer_norm", take(n, None, fixed)))
        return Run(x, c, self.unembed(take(n, None, fixed)[-1]))

    def attend(
        self,
        layer: Any,
        cross: bool,
        distances: Tensor | float,
        take: Callable[..., Tensor],
        c: list[Tensor],
        own: tuple[int, Any],
        other: tuple[int, Any],
        stop: int | None = None,
    ) -> Tensor | float:
        """Adds what the heads contribute to c; gives what attention adds that is no head's. Queries read what begins
        at `own`, keys and values at `other`, up to `stop`."""
        if self.t5:
            part = layer.layer[int(cross)]
            attention, norm = (part.EncDecAttention if cross else part.SelfAttention), part.layer_norm
            memory, heads, out = self.body.encoder.final_layer_norm, self.model.config.num_heads, attention.o
        else:
            attention, norm = (layer.encoder_attn if cross else layer.self_attn), None
            memory, heads, out = None, attention.num_heads, attention.out_proj
        before = memory if cross else norm
        q = [self.project(attention, "q", h, heads, self.norm(norm, take(own[0], None, own[1]))) for h in range(heads)]
        k, v = (
            [
                self.project(attention, s, h, heads, self.norm(before, take(other[0], stop, other[1])))
                for h in range(heads)
            ]
            for s in "kv"
        )
        scale = 1.0 if self.t5 else q[0].shape[-1] ** -0.5
        for h, weight in enumerate(out.weight.T.chunk(heads)):
            bias = distances if isinstance(distances, float) else distances[h]
            c.append((q[h] @ k[h].T * scale + bias).softmax(-1) @ v[h] @ weight)
        return 0.0 if out.bias is None else out.bias

    def project(self, attention: Any, site: str, head: int, heads: int, x: Tensor) -> Tensor:
        linear = getattr(attention, site if self.t5 else f"{site}_proj")
        y = x @ linear.weight.chunk(heads)[head].T
        return y if linear.bias is None else y + linear.bias.chunk(heads)[head]

    def layers(self, side: str) -> Any:
        return getattr(self.body, side).block if self.t5 else getattr(self.body, side).layers

    def begin(self, side: str, tokens: Tensor) -> Tensor:
        """What a side's residual stream begins with."""
        x = self.body.shared.weight[tokens]
        if self.t5:
            return x.detach()
        part = getattr(self.body, side)
        x = x * part.embed_tokens.embed_scale + part.embed_positions.weight[torch.arange(len(tokens)) + 2]
        return self.norm(part.layernorm_embedding, x).detach()

    def distances(self, side: str, tokens: Tensor) -> Tensor:
        """What is added to the scores of self-attention, [H, T, T]."""
        size, seen = len(tokens), torch.ones(len(tokens), len(tokens), dtype=torch.bool)
        if side == "decoder":
            seen = seen.tril()
        bias = torch.zeros(self.model.config.num_attention_heads * 2, size, size, dtype=torch.float64)
        if self.t5:
            bias = self.layers(side)[0].layer[0].SelfAttention.compute_bias(size, size)[0]
        return bias.masked_fill(~seen, -torch.inf)

    def norm(self, module: Any, x: Tensor) -> Tensor:
        if module is None:
            return x
        if not self.t5:
            return functional.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)
        return x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight

    def mlp(self, layer: Any, first: str, x: Tensor) -> Tensor:
        """What the last block contributes; BART's takes the stream's place, from the norm `first` to the last one."""
        if self.t5:
            return layer.layer[-1].DenseReluDense(self.norm(layer.layer[-1].layer_norm, x))
        y = self.norm(getattr(layer, first), x)
        return self.norm(layer.final_layer_norm, y + layer.fc2(layer.activation_fn(layer.fc1(y)))) - x

    def unembed(self, x: Tensor) -> Tensor:
        if not self.t5:
            return self.model.lm_head(x) + self.model.final_logits_bias[0]
        x = self.norm(self.body.decoder.final_layer_norm, x)
        return self.model.lm_head(x * x.shape[-1] ** -0.5 if self.model.config.scale_decoder_outputs else x)


def scores(
    edges: Tensor, clean: Run, corrupted: Run, points: Iterable[tuple[float, Run]], loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """S[u, v] of one prompt pair at edges bool [S, R], from (w_k, run) of every path point."""
    delta = [(b - a).detach() for a, b in zip(clean.c, corrupted.c, strict=True)]
    found = torch.zeros(edges.shape, dtype=torch.float64)
    for weight, at in points:
        gradients = torch.autograd.grad(loss(at.logits), at.x, materialize_grads=True)
        for u, v in edges.nonzero().tolist():
            found[u, v] += weight * (delta[u] * gradients[v]).sum()
    return found
