"""The pieces of a decoder on one prompt: how families differ, and what backward rules change. x are [T, D]."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Names(NamedTuple):
    """What a family's modules are called; a norm that it lacks is ""."""

    body: str = "model"
    layers: str = "layers"
    norm: str = "input_layernorm"
    attention: str = "self_attn"
    out: str = "o_proj"
    mlp_norm: str = "post_attention_layernorm"
    last: str = "norm"


FAMILIES = {
    "falcon": Names("transformer", "h", "ln_attn", "self_attention", "dense", "ln_mlp", "ln_f"),
    "gemma2": Names(mlp_norm="pre_feedforward_layernorm"),
    "gpt2": Names("transformer", "h", "ln_1", "attn", "c_proj", "ln_2", "ln_f"),
    "gpt_neox": Names("gpt_neox", attention="attention", out="dense", last="final_layer_norm"),
    "llama": Names(),
    "mistral": Names(),
    "olmo2": Names(norm="", mlp_norm=""),
    "qwen3_moe": Names(),
}


NOTHING = torch.nn.Identity()


class Decoder:
    """A model of one of `FAMILIES`; `heads` as in the graph: the kind of head with <k> and <v> receivers of its own."""

    def __init__(self, model: Any, heads: str = "query") -> None:
        self.model, self.config, self.kind = model, model.config, model.config.model_type
        self.names = FAMILIES[self.kind]
        self.body = getattr(model, self.names.body)
        self.layers = getattr(self.body, self.names.layers)
        self.parallel = self.kind in ("falcon", "gpt_neox")
        self.n_heads = self.config.num_attention_heads
        of_groups = "num_kv_heads" if self.kind == "falcon" else "num_key_value_heads"
        self.n_kv_heads = getattr(self.config, of_groups, self.n_heads)
        self.n_inputs = self.n_kv_heads if heads == "kv" else self.n_heads  # of keys in a layer, and as many of values

    def embed(self, tokens: Tensor) -> Tensor:
        """What `input` contributes, of tokens [T]."""
        table = self.model.get_input_embeddings()
        scale = self.config.hidden_size**0.5 if self.kind == "gemma2" else 1.0
        return (table.weight[tokens] * getattr(table, "embed_scale", scale)).detach()

    def positions(self, t: int) -> Tensor:
        """What learned positions add to t tokens, [T, D], or zeros [T, 1]."""
        return self.body.wpe.weight[:t].detach() if self.kind == "gpt2" else torch.zeros(t, 1)

    def project(self, layer: Any, site: str, x: list[Tensor]) -> Tensor:
        """The queries, keys or values of a site's receivers, each of what it reads itself: [n, T, K]."""
        attention, H, G = getattr(layer, self.names.attention), self.n_heads, self.n_kv_heads
        together = self.norm(getattr(layer, self.names.norm, NOTHING), torch.stack(x))
        if self.kind == "gpt2":
            y = attention.c_attn(together).chunk(3, -1)["qkv".index(site)]
        elif self.kind in ("falcon", "gpt_neox"):  # of each group its queries, its key and its value
            groups = attention.query_key_value(together).unflatten(-1, (G, H // G + 2, -1))
            y = groups.tensor_split((-2, -1), -2)["qkv".index(site)].flatten(-3)
        else:
            y = getattr(attention, f"{site}_proj")(together)
        n = H if site == "q" else G
        heads = [i * n // len(x) for i in range(len(x))]
        y = torch.stack([own.chunk(n, -1)[head] for own, head in zip(y, heads, strict=True)])
        norm = getattr(attention, f"{site}_norm", NOTHING)
        if self.kind == "olmo2" and site != "v":  # one scale for all heads together
            y = self.scale(norm, torch.cat([*y], -1)) * norm.weight.unflatten(0, (n, 1, -1))[heads] * y
        else:
            y = norm(y)
        if self.kind == "gpt2" or site == "v":
            return y
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        angles = self.body.rotary_emb(y, torch.arange(y.shape[1])[None])
        return rotate(y[None], y[None], *angles)[0][0]

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The values that one head reads, [T, K]."""
        attention = getattr(layer, self.names.attention)
        scores = self.product(q, k.T) * getattr(attention, "scaling", q.shape[-1] ** -0.5)
        scores = capped(scores, getattr(self.config, "attn_logit_softcapping", None))
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))
        window = getattr(attention, "sliding_window", getattr(self.config, "sliding_window", None))
        seen = (back >= 0) & (back < (window or len(q)))
        return self.product(self.softmax(scores.masked_fill(~seen, -torch.inf)), v)

    def heads(self, layer: Any, z: list[Tensor]) -> list[Tensor]:
        """What each head contributes, from the values that it read."""
        out = getattr(getattr(layer, self.names.attention), self.names.out)
        weight = (out.weight if self.kind == "gpt2" else out.weight.T).chunk(self.n_heads)  # of [K, D]
        written = [z_h @ w for z_h, w in zip(z, weight, strict=True)]
        if not hasattr(layer, "post_feedforward_layernorm"):
            return written
        norm = layer.post_attention_layernorm  # divides every head by the scale of them all together
        factor = self.scale(norm, sum(written)) * self.gain(norm)
        return [factor * head for head in written]

    def bias(self, layer: Any) -> Tensor | float:
        """What attention adds that is no head's, [D]."""
        bias = getattr(getattr(layer, self.names.attention), self.names.out).bias
        return 0.0 if bias is None else bias

    def mlp(self, layer: Any, x: Tensor) -> Tensor:
        """What the MLP contributes."""
        y = self.feed_forward(layer.mlp, self.norm(getattr(layer, self.names.mlp_norm, NOTHING), x))
        return self.norm(getattr(layer, "post_feedforward_layernorm", NOTHING), y)

    def unembed(self, x: Tensor) -> Tensor:
        """Logits [..., V] of tokens, x [..., D]."""
        logits = self.model.get_output_embeddings()(self.norm(getattr(self.body, self.names.last), x))
        return capped(logits, getattr(self.config, "final_logit_softcapping", None))

    def gain(self, norm: Any) -> Tensor:
        return 1 + norm.weight if self.kind == "gemma2" else norm.weight

    # What backward rules change.

    def norm(self, module: Any, x: Tensor) -> Tensor:
        return module(x)

    def scale(self, norm: Any, x: Tensor) -> Tensor:
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        return (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    def feed_forward(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp(x[None])[0].view_as(x)  # experts may give two outputs

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def softmax(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


def capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)
