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
from eap_circuits.selfcheck import StayDouble
from eap_kernels.testing import relative_error as relative
from tests.circuits.conftest import logit_difference, prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import differences, gradients, plain_run

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_mlp_scores_are_derivatives_by_what_the_mlp_writes(name):
    oracle = load_file(DATA / name / "oracle.safetensors")
    # In float64 altogether: the frequencies of rotary positions, too.
    model = AutoModelForCausalLM.from_pretrained(DATA / name).double()
    data = eap.PairedDataset.from_tokens(oracle["clean"], oracle["corrupted"], oracle["lengths"], oracle["answers"])
    data, decoder = data[[0, 1, 2]], Decoder(model)
    with StayDouble():
        scores = eap.attribute(model, data, method="eap").node_scores()
        graph = scores.graph.with_heads("query")
        written = [graph.mlp_sender(layer) for layer in range(graph.n_layers)]
        read = [graph.receivers.index(f"m{layer}") for layer in range(graph.n_layers)]
        right, published = (torch.zeros(graph.n_layers, dtype=torch.float64) for _ in range(2))
        for e in range(len(data)):
            clean, corrupted = (plain_run(decoder, decoder.embed(tokens)) for tokens in prompts(data, e))
            delta = differences(clean, corrupted)[written]
            for found, at in ((right, [clean.c[u] for u in written]), (published, [clean.x[v] for v in read])):
                gradient = gradients(-logit_difference(clean.logits, data, e), at)
                found += (delta * gradient).sum((1, 2)) / len(data)
    assert relative(scores.values[written], right) < 1e-6
    assert relative(published, right) > 0.1
