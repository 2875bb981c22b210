"""EAP-GP: its definition, written out with plain autograd."""

from __future__ import annotations

import pytest
import torch

import eap_circuits as eap
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import KINDS, logit_difference, prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import differences, gradients, plain_run


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3-moe"])  # experts' choice jumps on the path
def test_scores_are_their_definition(kind, make_model, make_pairs, relative):
    model, data, steps = make_model(kind), make_pairs(n=3), 3
    decoder = Decoder(model, heads="kv")
    with StayDouble():
        found = eap.attribute(model, data, method="eap-gp", steps=steps)
        right = torch.zeros(found.values.shape, dtype=torch.float64)
        for e in range(len(data)):
            clean, corrupted = (plain_run(decoder, decoder.embed(tokens)) for tokens in prompts(data, e))
            delta, here = differences(clean=clean, corrupted=corrupted), decoder.embed(prompts(data, e)[0])
            for _ in range(steps):
                here = here.detach().requires_grad_()
                apart = (plain_run(decoder, here).logits - corrupted.logits.detach()).square().sum()
                (slope,) = torch.autograd.grad(apart, here)
                here = (here - slope / slope.norm().clamp(min=1e-300)).detach()
                run = plain_run(decoder, here)
                g = gradients(-logit_difference(run.logits, data, e), run.x)
                right += torch.einsum("utd,vtd->uv", delta, g) / steps / len(data)
    edges = found.graph.edge_mask
    assert relative(found.values[edges], right[edges]) < 1e-6


def test_a_pair_of_equal_prompts_has_no_way_to_go(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=2)
    same = eap.PairedDataset.from_tokens(data.clean, data.clean, data.lengths, data.answers)
    assert not eap.attribute(model, same, method="eap-gp").values.any()
