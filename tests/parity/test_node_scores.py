"""The published package takes an MLP's node score with the gradient at its input; the one at its output is right.

EAP-IG 795f560, `attribute_node.py`: a backward hook at `node.in_hook` of MLPs, at `node.out_hook` of all else.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eap_circuits as eap
from eap_circuits.evaluation.check import StayDouble
from eap_kernels.testing import relative_error as relative

DATA = Path(__file__).parent / "data"


def sites(model):
    """(the norm before the MLP, the MLP) of each layer."""
    if model.config.model_type == "gpt2":
        return [(layer.ln_2, layer.mlp) for layer in model.transformer.h]
    decoder = model.gpt_neox if model.config.model_type == "gpt_neox" else model.model
    return [(layer.post_attention_layernorm, layer.mlp) for layer in decoder.layers]


def at_inputs(model, tokens, answers):
    """MLP outputs, and the gradients of −logit difference where the MLPs read the residual stream: [L, T, D] each."""
    outputs, inputs, handles = [], [], []

    def read(_, args):
        x = args[0].view_as(args[0])
        x.retain_grad()
        inputs.append(x)
        return (x,)

    for norm, mlp in sites(model):
        handles.append(norm.register_forward_pre_hook(read))
        handles.append(mlp.register_forward_hook(lambda _, __, y: outputs.append(y[0].detach().clone())))
    logits = model(input_ids=tokens[None]).logits[0, -1]
    (logits[answers[1]] - logits[answers[0]]).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return torch.stack(outputs), torch.stack([x.grad[0] for x in inputs])


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_mlp_scores_are_derivatives_by_what_the_mlp_writes(name):
    oracle = load_file(DATA / name / "oracle.safetensors")
    # In float64 altogether: the frequencies of rotary positions, too.
    model = AutoModelForCausalLM.from_pretrained(DATA / name).double()
    data = eap.PairedDataset.from_tokens(oracle["clean"], oracle["corrupted"], oracle["lengths"], oracle["answers"])
    data, step = data[[0, 1, 2]], 1e-5
    with StayDouble():
        scores = eap.attribute(model, data, method="eap").node_scores()
        right, published = (torch.zeros(len(sites(model)), dtype=torch.float64) for _ in range(2))
        for e in range(len(data)):
            n, answers = int(data.lengths[e]), data.answers[e]
            clean, gradients = at_inputs(model, data.clean[e, :n], answers)
            delta = at_inputs(model, data.corrupted[e, :n], answers)[0] - clean
            published += (delta * gradients).sum((1, 2)) / len(data)
            for layer, (_, mlp) in enumerate(sites(model)):
                losses = []
                for sign in (1, -1):
                    shift = sign * step * delta[layer]
                    handle = mlp.register_forward_hook(lambda _, __, y, shift=shift: y + shift)
                    with torch.no_grad():
                        logits = model(input_ids=data.clean[e : e + 1, :n]).logits[0, -1]
                    handle.remove()
                    losses.append(logits[answers[1]] - logits[answers[0]])
                right[layer] += (losses[0] - losses[1]) / (2 * step) / len(data)
    rows = [scores.graph.senders.index(f"m{layer}") for layer in range(len(right))]
    assert relative(scores.values[rows], right) < 1e-6
    assert relative(published, right) > 0.1
