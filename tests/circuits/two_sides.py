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
from tests.circuits.recording.rules_by_hand import SoftmaxAtTwo, shared

Read = Callable[[int, int, list[Tensor]], Tensor]


def of_model(v: int, first: int, c: list[Tensor]) -> Tensor:
    return torch.stack(c[first:]).sum(0)


def of_circuit(m: Tensor, ablated: list[Tensor]) -> Read:
    """Of a mask [S, R], and what every sender contributes where an edge is ablated."""

    def read(v: int, first: int, c: list[Tensor]) -> Tensor:
        return sum(m[u, v] * c[u] + (1 - m[u, v]) * ablated[u] for u in range(first, len(c)))

    return read


def of_moved(group: list[int], alpha: float, clean: Run, delta: list[Tensor]) -> Read:
    """Of the model, except for a group of senders: they contribute c_u(x) + (1 − α) Δ_u."""
    moved = {u: clean.c[u].detach() + (1 - alpha) * delta[u] for u in group}
    return lambda v, first, c: sum(moved.get(u, c[u]) for u in range(first, len(c)))


class TwoSides:
    """The pieces of a T5 or a BART; under backward rules, these are detached factors."""

    def __init__(self, model: Any, rules: str | None = None) -> None:
        self.model, self.t5, self.rules = model, model.config.model_type == "t5", rules
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
            pattern = self.softmax(self.product(q[h], k[h].T) * scale + bias)
            c.append(self.product(pattern, v[h]) @ weight)
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
        x = x if self.t5 else x - x.mean(-1, keepdim=True)
        eps = module.variance_epsilon if self.t5 else module.eps
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        y = x * (scale.detach() if self.rules else scale) * module.weight
        return y if self.t5 else y + module.bias

    def mlp(self, layer: Any, first: str, x: Tensor) -> Tensor:
        """What the last block contributes; BART's takes the stream's place, from the norm `first` to the last one."""
        if self.t5:
            mlp = layer.layer[-1].DenseReluDense
            return mlp.wo(self.activation(mlp.wi(self.norm(layer.layer[-1].layer_norm, x)), functional.relu))
        y = self.norm(getattr(layer, first), x)
        return self.norm(layer.final_layer_norm, y + layer.fc2(self.activation(layer.fc1(y), functional.gelu))) - x

    def activation(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return x * (function(x) / x).detach() if self.rules in ("relp", "relp-ah") else function(x)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return shared(a @ b) if self.rules == "gim" else a @ b

    def softmax(self, x: Tensor) -> Tensor:
        pattern: Tensor = SoftmaxAtTwo.apply(x) if self.rules == "gim" else x.softmax(-1)
        return pattern.detach() if self.rules == "relp-ah" else pattern

    def unembed(self, x: Tensor) -> Tensor:
        if not self.t5:
            return self.model.lm_head(x) + self.model.final_logits_bias[0]
        x = self.norm(self.body.decoder.final_layer_norm, x)
        return self.model.lm_head(x * x.shape[-1] ** -0.5 if self.model.config.scale_decoder_outputs else x)


def differences(clean: list[Tensor], ablated: list[Tensor]) -> list[Tensor]:
    """Δ_u, [S] of [T, D]."""
    return [(b - a).detach() for a, b in zip(clean, ablated, strict=True)]


def gradients(points: Iterable[tuple[float, Run]], loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Σ_k w_k ∂loss/∂x_v of every receiver, [R] of [T, D], from (w_k, run) of every path point."""
    found = (torch.autograd.grad(w * loss(at.logits), at.x, materialize_grads=True) for w, at in points)
    return [sum(each) for each in zip(*found, strict=True)]


def scores(edges: Tensor, delta: list[Tensor], of_receivers: list[Tensor]) -> Tensor:
    """S[u, v] of one prompt pair at edges bool [S, R], from its differences and gradients."""
    found = torch.zeros(edges.shape, dtype=torch.float64)
    for v, gradient in enumerate(of_receivers):
        for u in edges[:, v].nonzero()[:, 0].tolist():
            found[u, v] = torch.dot(delta[u].flatten(), gradient.flatten())
    return found
