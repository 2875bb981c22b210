"""A model to learn circuits of, and one so small that all of its circuits can be run."""

from itertools import combinations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import eap_circuits as eap
from tests.circuits.conftest import VOCABULARY


@pytest.fixture
def model(make_model):
    return make_model("llama", torch.float32)


@pytest.fixture
def data(make_pairs):
    return make_pairs(seed=3, n=6)


@pytest.fixture
def scores(model, data):
    return eap.attribute(model, data, method="eap")


@pytest.fixture
def all_circuits(make_pairs):
    """(number, size) -> a layer of two heads, which has 11 edges; prompt pairs; the scores of EAP; and every circuit of
    so many edges that lie on paths."""

    def make(number, size):
        torch.manual_seed(number)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.5,
        )  # fmt: skip
        model, data = LlamaForCausalLM(config).eval(), make_pairs(seed=1, n=8)
        scores = eap.attribute(model, data, method="eap")
        every = []
        for chosen in combinations(scores.graph.edge_mask.nonzero().tolist(), size):
            mask = torch.zeros_like(scores.graph.edge_mask)
            mask[tuple(torch.tensor(chosen).T)] = True
            circuit = eap.Circuit.from_mask(scores.graph, mask)
            if circuit.pruned().n_edges == size:
                every.append(circuit)
        assert len(every) > 50
        return model, data, scores, every

    return make
