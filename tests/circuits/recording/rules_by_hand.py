"""Decoders written out head by head in which backward rules are detached factors, and the scores they give."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


class SoftmaxAtTwo(torch.autograd.Function):
    """GIM's softmax: the backward of softmax(x / 2), without the factor of its argument."""

    @staticmethod
    def forward(ctx, x):
        ctx.soft = torch.softmax(x / 2, -1)
        return torch.softmax(x, -1)

    @staticmethod
    def backward(ctx, g):
        return ctx.soft * (g - (g * ctx.soft).sum(-1, keepdim=True))


class ByHand:
    """A decoder-only model on one prompt, head by head, every receiver with an input of its own."""

    def __init__(self, model, rules):
        self.model, self.rules, self.config = model, rules, model.config

    # The pieces, with the rules as detached factors.

    def norm(self, module, x, offset=0.0):
        centred = isinstance(module, torch.nn.LayerNorm)
        if centred:
            x = x - x.mean(-1, keepdim=True)
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        if self.rules:
            scale = scale.detach()
        y = x * scale * (module.weight + offset)
        return y + module.bias if centred else y

    def activation(self, x, function):
        return x * (function(x) / x).detach() if self.rules in ("relp", "relp-ah") else function(x)

    def shared(self, product):
        return product / 2 + (product / 2).detach()

    def gated(self, a, b):
        return self.shared(a * b) if self.rules else a * b

    def attend(self, q, k, v, scale, allowed, cap=None):
        gim = self.rules == "gim"
        scores = q @ k.T
        scores = (self.shared(scores) if gim else scores) * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~allowed, -1e9)
        pattern = SoftmaxAtTwo.apply(scores) if gim else torch.softmax(scores, -1)
        if self.rules == "relp-ah":
            pattern = pattern.detach()
        return self.shared(pattern @ v) if gim else pattern @ v

    # A run: contributions [S, T, D], the inputs' gradients [R, T, D].

    def run(self, embeddings, tokens, answers, moved=None):
        """`moved` replaces a group's contributions; group 0 is the embedding, then each layer's heads and MLP."""
        self.group, self.moved = 0, moved or {}
        self.contributions, self.receivers, self.residual = [embeddings], [], embeddings
        logits = {"gpt2": self.gpt2, "llama": self.llama, "gemma2": self.gemma2}[self.config.model_type](tokens)
        loss = logits[-1, answers[1]] - logits[-1, answers[0]]
        gradients = torch.autograd.grad(loss, self.receivers, materialize_grads=True)
        return torch.stack(self.contributions).detach(), torch.stack(gradients)

    def read(self):
        own = torch.zeros_like(self.residual, requires_grad=True)
        self.receivers.append(own)
        return self.residual + own

    def heads(self, n):
        """Inputs of q of all heads, k of all heads, v of all heads, in the graph's order."""
        inputs = [[self.read() for _ in range(n)] for _ in range(3)]
        return list(zip(*inputs, strict=True))

    def write(self, *contributions):
        self.group += 1
        contributions = self.moved.get(self.group, contributions)
        self.contributions += contributions
        self.residual = self.residual + sum(contributions)

    def gpt2(self, tokens):
        body, n, size = self.model.transformer, self.config.n_head, self.config.n_embd
        dim, t = size // n, len(tokens)
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        self.residual = self.residual + body.wpe.weight[:t]
        for block in body.h:
            weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
            written = []
            for h, inputs in enumerate(self.heads(n)):
                q, k, v = (
                    self.norm(block.ln_1, x) @ weight[:, part] + bias[part]
                    for x, part in zip(inputs, (slice(i * size + h * dim, i * size + (h + 1) * dim) for i in range(3)))
                )
                z = self.attend(q, k, v, dim**-0.5, causal)
                written.append(z @ block.attn.c_proj.weight[h * dim : (h + 1) * dim])
            self.write(*written)
            self.residual = self.residual + block.attn.c_proj.bias
            x = self.norm(block.ln_2, self.read()) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
            x = self.activation(x, lambda x: functional.gelu(x, approximate="tanh"))
            self.write(x @ block.mlp.c_proj.weight + block.mlp.c_proj.bias)
        return self.norm(body.ln_f, self.read()) @ self.model.lm_head.weight.T

    def llama(self, tokens):
        layers = self.model.model.layers
        self.decoder(tokens, 0.0, lambda index: (layers[index].input_layernorm, None), functional.silu)
        return self.norm(self.model.model.norm, self.read()) @ self.model.lm_head.weight.T

    def gemma2(self, tokens):
        layers, cap = self.model.model.layers, self.config.final_logit_softcapping
        self.decoder(
            tokens,
            1.0,
            lambda index: (layers[index].input_layernorm, layers[index].post_attention_layernorm),
            lambda x: functional.gelu(x, approximate="tanh"),
        )
        logits = self.norm(self.model.model.norm, self.read(), 1.0) @ self.model.lm_head.weight.T
        return cap * torch.tanh(logits / cap)

    def decoder(self, tokens, offset, norms, function):
        """Layers of Llama, and of Gemma 2, which has norms after the blocks too."""
        c, t = self.config, len(tokens)
        n, dim = c.num_attention_heads, getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        group = n // c.num_key_value_heads
        rope = self.model.model.rotary_emb(self.residual[None], torch.arange(t)[None])
        distance = torch.arange(t)[:, None] - torch.arange(t)
        for index, layer in enumerate(self.model.model.layers):
            before, after = norms(index)
            attention, mlp = layer.self_attn, layer.mlp
            window = getattr(attention, "sliding_window", None) or math.inf
            allowed = (distance >= 0) & (distance < window)
            raw = []
            for h, inputs in enumerate(self.heads(n)):
                rows = [slice(i * dim, (i + 1) * dim) for i in (h, h // group, h // group)]
                modules = (attention.q_proj, attention.k_proj, attention.v_proj)
                q, k, v = (
                    self.norm(before, x, offset) @ module.weight[part].T
                    for x, module, part in zip(inputs, modules, rows, strict=True)
                )
                q, k = (x[0, 0] for x in apply_rotary_pos_emb(q[None, None], k[None, None], *rope))
                cap = getattr(c, "attn_logit_softcapping", None)
                z = self.attend(q, k, v, attention.scaling, allowed, cap)
                raw.append(z @ attention.o_proj.weight[:, h * dim : (h + 1) * dim].T)
            self.post(raw, after, offset)
            x = self.norm(
                layer.post_attention_layernorm if after is None else layer.pre_feedforward_layernorm,
                self.read(),
                offset,
            )
            a = self.activation(x @ mlp.gate_proj.weight.T, function)
            x = self.gated(a, x @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T
            self.post([x], None if after is None else layer.post_feedforward_layernorm, offset)

    def post(self, raw, norm, offset):
        """Write a block's contributions, through the norm after it."""
        if norm is None:
            return self.write(*raw)
        total = sum(raw)
        y = self.norm(norm, total, offset)
        scale = (total.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt().detach()
        self.group += 1
        given = self.moved.get(self.group)
        self.contributions += given or [(x * scale * (norm.weight + offset)).detach() for x in raw]
        self.residual = self.residual + (y if given is None else sum(given))
        return None


def scores_by_hand(model, data, rules, path, graph, groups=()):
    """Along the embeddings' path; with groups of senders, each along its own, from the clean run."""
    by_hand = ByHand(model, rules)
    total = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    factor = model.config.hidden_size**0.5 if model.config.model_type == "gemma2" else 1.0
    weight = model.get_input_embeddings().weight.detach() * factor
    for e in range(len(data)):
        n = int(data.lengths[e])
        tokens = [x[e, :n] for x in (data.clean, data.corrupted)]
        clean, corrupted = (weight[t] for t in tokens)
        answers = data.answers[e].tolist()
        runs = [by_hand.run(x.requires_grad_(), tokens[0], answers)[0] for x in (corrupted, clean)]
        difference = runs[0] - runs[1]
        for (index, group), (alpha, share) in product(enumerate(groups), path):
            given = [*(runs[1][group] + (1 - alpha) * difference[group])]
            start = (given[0] if index == 0 else clean.detach()).requires_grad_()
            gradients = by_hand.run(start, tokens[0], answers, {index: given})[1]
            total[group] += share * torch.einsum("utd,vtd->uv", difference[group], gradients)
        for alpha, share in () if groups else path:
            point = (corrupted + alpha * (clean - corrupted)).detach().requires_grad_()
            gradients = by_hand.run(point, tokens[0], answers)[1]
            total += share * torch.einsum("utd,vtd->uv", difference, gradients)
    return torch.where(graph.edge_mask, total / len(data), 0)
