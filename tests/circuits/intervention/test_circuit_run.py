"""Circuits that run together, stored apart or in one group, whatever their masks ask for."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.pretended import pretending
from eap_circuits.adapters import bind
from eap_circuits.forward import Runner, make_batches
from eap_circuits.intervention import circuit_run, run_circuits
from eap_circuits.recording import record_run
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import of_circuit, plain_run


def mixed_mask(graph, generator):
    """Each group of receivers reads nothing, everything or some; some senders are read by nobody."""
    mask = graph.edge_mask & (torch.rand(graph.edge_mask.shape, generator=generator) < 0.5)
    groups = [graph.receivers_at(i, site) for i in range(graph.n_layers) for site in ("q", "k", "v", "mlp")]
    for receivers in [*groups, slice(graph.n_receivers - 1, graph.n_receivers)]:
        kind = int(torch.randint(4, (), generator=generator))
        if kind < 2:
            mask[:, receivers] = graph.edge_mask[:, receivers] & bool(kind)
    unread = torch.rand(graph.n_senders, generator=generator) < 0.3
    return mask & ~unread[:, None]


@pytest.mark.parametrize("grouped", [False, True], ids=["apart", "grouped"])
def test_any_masks_give_their_definition(grouped, kind, make_model, make_pairs, monkeypatch):
    if grouped:  # as on a GPU
        monkeypatch.setattr(circuit_run, "shared", lambda device: True)
    model, data = make_model(kind), make_pairs(seed=4, n=1)
    generator = torch.Generator().manual_seed(0)
    with StayDouble(), torch.no_grad():
        for heads in ("kv", "query"):
            graph, decoder = bind(model).graph(heads), Decoder(model, heads)
            masks = [mixed_mask(graph, generator) for _ in range(12)]
            (batch,) = make_batches(data, None, True, torch.device("cpu"))
            runner = Runner(bind(model), graph, batch)
            found = run_circuits(runner, graph, record_run(runner, True), masks)
            clean, corrupted = (decoder.embed(tokens) for tokens in prompts(data, 0))
            ablated = plain_run(decoder, corrupted).c
            for logits, mask in zip(found, masks):
                right = plain_run(decoder, clean, of_circuit(mask, ablated)).logits
                torch.testing.assert_close(logits[0], right, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("family", "soft"), [("gpt2", False), ("gemma2", True)])
def test_low_precision_on_a_gpu_is_as_near_to_the_truth_as_on_the_cpu(soft, family, make_model, make_pairs, relative):
    """Differences are kept in bfloat16 there, and in float32 on the CPU: the model's own rounding hides it."""
    model, data, generator = make_model(family).bfloat16(), make_pairs(seed=4, n=8), torch.Generator().manual_seed(0)
    graph = bind(model).graph("kv")
    masks = [mixed_mask(graph, generator) for _ in range(6)]
    if soft:
        masks = [mask * torch.rand(mask.shape, generator=generator) for mask in masks]

    def found(model):
        logits = []
        with torch.no_grad():
            for batch in make_batches(data, None, True, bind(model).device):
                runner = Runner(bind(model), graph, batch)
                logits += run_circuits(runner, graph, record_run(runner, True), masks)
        return torch.cat(logits).cpu()

    with StayDouble():
        right = found(copy.deepcopy(model).double())
    on_cpu = found(model)
    with pretending():
        on_gpu = found(model.to("cuda"))
    assert relative(on_gpu, right) <= 1.2 * relative(on_cpu, right)
