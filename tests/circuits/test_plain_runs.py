"""The specification runs the models as they are, and numbers senders and receivers as the graph does."""

from __future__ import annotations

import pytest
import torch

from eap_circuits.adapters import bind
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import of_circuit, of_model, plain_run


@pytest.mark.parametrize("heads", ["kv", "query"])
@torch.no_grad()
def test_a_run_is_the_models(kind, heads, make_model, make_pairs):
    model, data = make_model(kind), make_pairs(n=2)
    graph, decoder = bind(model).graph(heads), Decoder(model, heads)
    with StayDouble():
        for tokens in (tokens for e in range(len(data)) for tokens in prompts(data, e)):
            run = plain_run(decoder, decoder.embed(tokens))
            torch.testing.assert_close(run.logits, model(input_ids=tokens[None]).logits[0, -1])
            reach = []
            plain_run(decoder, run.c[0], lambda v, c, reach=reach: reach.append(len(c)) or of_model(v, c))
            assert reach == graph.reach.tolist() and len(run.c) == graph.n_senders
            full = of_circuit(graph.edge_mask, [torch.randn_like(c) for c in run.c])
            torch.testing.assert_close(plain_run(decoder, run.c[0], full).logits, run.logits)
