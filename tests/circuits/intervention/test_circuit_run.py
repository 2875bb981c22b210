"""Circuits that run together, stored apart or in one group, whatever their masks ask for."""

from __future__ import annotations

import pytest
import torch

from eap_circuits.adapters import bind
from eap_circuits.evaluation.check import StayDouble
from eap_circuits.forward import Runner, make_batches
from eap_circuits.intervention import circuit_run, run_circuits
from eap_circuits.recording import record_run
from tests.circuits.evaluation.test_faithfulness import graph_of, naive_llama_circuit


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


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("grouped", [False, True], ids=["apart", "grouped"])
def test_any_masks_give_their_definition(grouped, heads, make_model, make_pairs, monkeypatch):
    if grouped:  # as on a GPU
        monkeypatch.setattr(circuit_run, "circuits_in_group", lambda device, circuits: circuits)
    model, data = make_model("llama"), make_pairs(seed=4, n=2)
    graph = graph_of(model, heads)
    generator = torch.Generator().manual_seed(0)
    masks = [mixed_mask(graph, generator) for _ in range(24)]
    with StayDouble(), torch.no_grad():
        for batch in make_batches(data, None, True, torch.device("cpu")):
            runner = Runner(bind(model), graph, batch)
            found = torch.stack(list(run_circuits(runner, graph, record_run(runner, True), masks)))
            for e, example in enumerate(batch.index.tolist()):
                clean, corrupted = (
                    x[example : example + 1, : data.lengths[example]] for x in (data.clean, data.corrupted)
                )
                for logits, mask in zip(found[:, e], masks):
                    right = naive_llama_circuit(model, graph, mask, clean, corrupted)[0]
                    torch.testing.assert_close(logits, right, rtol=0, atol=1e-9)
