"""The specification's decoders in which backward rules are detached factors, and the scores that they give."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from tests.circuits.conftest import loss_of, prompts
from tests.circuits.decoders import NOTHING, Decoder
from tests.circuits.plain_runs import differences, of_moved, plain_run, scores

TANH_GELU = partial(functional.gelu, approximate="tanh")


class SoftmaxAtTwo(torch.autograd.Function):
    """GIM's softmax: the backward of softmax(x / 2), without the factor of its argument."""

    @staticmethod
    def forward(ctx, x):
        ctx.soft = torch.softmax(x / 2, -1)
        return torch.softmax(x, -1)

    @staticmethod
    def backward(ctx, g):
        return ctx.soft * (g - (g * ctx.soft).sum(-1, keepdim=True))


def shared(product):
    """Each factor of a product gets half of the gradient."""
    return product / 2 + (product / 2).detach()


class UnderRules(Decoder):
    """The specification with the rules as detached factors."""

    def __init__(self, model, rules):
        super().__init__(model)
        self.rules = rules

    def norm(self, module, x):
        if module is NOTHING:
            return x
        centred = isinstance(module, torch.nn.LayerNorm)
        if centred:
            x = x - x.mean(-1, keepdim=True)
        y = x * self.scale(module, x) * self.gain(module)
        return y + module.bias if centred else y

    def scale(self, norm, x):
        scale = super().scale(norm, x)
        return scale.detach() if self.rules else scale

    def feed_forward(self, mlp, x):
        if self.kind == "gpt2":
            return mlp.c_proj(self.activation(mlp.c_fc(x), TANH_GELU))
        a = self.activation(mlp.gate_proj(x), functional.silu if self.kind == "llama" else TANH_GELU)
        gated = a * mlp.up_proj(x)
        return mlp.down_proj(shared(gated) if self.rules else gated)

    def activation(self, x, function):
        return x * (function(x) / x).detach() if self.rules in ("relp", "relp-ah") else function(x)

    def product(self, a, b):
        return shared(a @ b) if self.rules == "gim" else a @ b

    def softmax(self, x):
        pattern = SoftmaxAtTwo.apply(x) if self.rules == "gim" else x.softmax(-1)
        return pattern.detach() if self.rules == "relp-ah" else pattern


def scores_by_hand(model, data, rules, path, graph, groups=()):
    """Along the embeddings' path; with groups of senders, each along its own, from the clean run."""
    decoder = UnderRules(model, rules)
    total = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    for e in range(len(data)):
        x, y = (decoder.embed(tokens) for tokens in prompts(data, e))
        clean, corrupted = plain_run(decoder, x), plain_run(decoder, y)
        delta = differences(clean, corrupted)

        def along(runs, delta=delta, e=e):
            return scores(delta, runs, loss_of(data, e)) / len(data)

        if not groups:
            total += along((w, plain_run(decoder, torch.lerp(y, x, alpha))) for alpha, w in path)
        for group in groups:
            reads = ((w, of_moved(group, alpha, clean, delta)) for alpha, w in path)
            total[group] += along((w, plain_run(decoder, x, read)) for w, read in reads)[group]
    return total * graph.edge_mask
