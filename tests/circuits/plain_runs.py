"""Runs with plain hooks, which keep what each group of senders writes and what each norm reads."""

from __future__ import annotations

import torch

# Where plain hooks find the modules: (layers, attention norm, output projection, mlp norm, mlp, last norm)
SITES = {
    "llama": ("model.layers", "input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp", "model.norm"),
    "gpt2": ("transformer.h", "ln_1", "attn.c_proj", "ln_2", "mlp", "transformer.ln_f"),
}


def plain_run(model, kind, embeddings, replaced=None):
    """A run with plain hooks: (logits at the end, each group's output, each receiver norm's own copy of its input,
    each head's contribution [S, T, D]). `replaced`: (group, what it gives instead)."""
    where, attention_norm, out, mlp_norm, mlp, last = SITES[kind]
    written, reads, contributions, handles = [embeddings], [], [embeddings[0][None]], []

    def read(_, args):
        x = args[0].clone()
        x.requires_grad_() if not x.requires_grad else x.retain_grad()
        reads.append(x)
        return (x, *args[1:])

    def write(_, __, y):
        if replaced is not None and replaced[0] == len(written):
            y = replaced[1]
        written.append(y)
        return y

    def split(module, args):
        heads = model.config.num_attention_heads
        weight = module.weight.T if kind == "llama" else module.weight  # [H·K, D]
        z = args[0][0].unflatten(-1, (heads, -1))
        contributions.append(torch.einsum("thk,hkd->htd", z, weight.unflatten(0, (heads, -1))))

    for layer in model.get_submodule(where):
        handles += [
            layer.get_submodule(attention_norm).register_forward_pre_hook(read),
            layer.get_submodule(out).register_forward_pre_hook(split),
            layer.get_submodule(out).register_forward_hook(write),
            layer.get_submodule(mlp_norm).register_forward_pre_hook(read),
            layer.get_submodule(mlp).register_forward_hook(write),
            layer.get_submodule(mlp).register_forward_hook(lambda _, __, y: contributions.append(y)),
        ]
    handles.append(model.get_submodule(last).register_forward_pre_hook(read))
    logits = model(inputs_embeds=embeddings).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits, written, reads, torch.cat(contributions)


def by_layer(graph, values):
    """Columns of the q, k and v receivers of a layer added up: what reads a norm's output. [S, 2L + 1]"""
    columns = {}
    for column, name in enumerate(graph.receivers):
        place = name.split(".")[0]
        columns[place] = columns.get(place, 0) + values[:, column]
    return torch.stack(list(columns.values()), 1)
