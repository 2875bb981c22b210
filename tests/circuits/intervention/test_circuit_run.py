"""Circuits that run together, stored apart or in one group, whatever their masks ask for."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from bench.pretended import pretending
from eap_circuits.adapters import bind
from eap_circuits.forward import Runner, make_batches
from eap_circuits.intervention import circuit_run, circuit_runs, run_circuits
from eap_circuits.intervention.groups import asked_of, grouping, shared_group
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


def begin_all_together(monkeypatch):
    """Reads of all layers, whatever that moves and in any dtype."""
    monkeypatch.setattr(circuit_run, "begun_together", lambda arch, graph: True)
    monkeypatch.setattr(shared_group, "sections", lambda reads, together: [slice(0, len(reads))])


@pytest.mark.parametrize("together", ["apart", "in one group", "in groups", "begun together"])
def test_any_masks_give_their_definition(together, kind, make_model, make_pairs, monkeypatch):
    if together != "apart":  # as on a GPU
        monkeypatch.setattr(circuit_runs, "shared", lambda device: True)
    if together == "begun together":
        begin_all_together(monkeypatch)
    if together == "in groups":
        monkeypatch.setattr(grouping, "_ANOTHER_GROUP", 0)
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


def test_groups_are_of_circuits_alike_and_the_cheapest(make_model, monkeypatch):
    graph, generator = bind(make_model("gpt2")).graph("kv"), torch.Generator().manual_seed(0)
    order = torch.rand(graph.edge_mask.shape, generator=generator)
    masks = [graph.edge_mask & (order < share) for share in (0.9, 0, 0.03, 1, 0.5, 0.05, 0.2)]
    asked = asked_of(graph, torch.stack(masks))

    def cost(groups, another):
        computed = [asked.of([order[c] for c in range(*group.indices(len(masks)))]) for group in groups]
        moved = [4 * group.partial.any(0).sum() + 3 * group.stored.any(0).sum() for group in computed]
        return sum(int(m) * len(group) + another for m, group in zip(moved, computed))

    for another in (0, 40, 10**6):
        monkeypatch.setattr(grouping, "_ANOTHER_GROUP", another)
        order, groups = grouping.arrange(asked, True, 1, 1)
        assert sorted(order) == list(range(len(masks)))
        assert [int(masks[c].sum()) for c in order] == sorted(int(mask.sum()) for mask in masks)
        # Nothing is computed of the circuit without edges and of the one with all.
        cuts = [list(cut) for n in range(5) for cut in itertools.combinations(range(2, 6), n)]
        every = [[slice(*ends) for ends in itertools.pairwise([1, *cut, 6])] for cut in cuts]
        assert cost(groups, another) == min(cost(some, another) for some in every)
    assert len(groups) == 1


@pytest.mark.parametrize("shared", [False, True])
def test_layers_side_by_side_are_read_as_one_after_another(shared, make_model, make_pairs, monkeypatch):
    """A circuit that keeps nearly all of each edge gives what the clean run gives, as does that of all edges."""
    monkeypatch.setattr(circuit_runs, "shared", lambda device: shared)
    model, data = make_model("falcon-h1"), make_pairs(seed=4, n=1)
    with StayDouble(), torch.no_grad():
        graph = bind(model).graph("kv")
        assert any(graph.beside)
        (batch,) = make_batches(data, None, False, torch.device("cpu"))
        runner = Runner(bind(model), graph, batch)
        whole = graph.edge_mask.double()
        found = run_circuits(runner, graph, record_run(runner, True), [whole * (1 - 1e-13), whole])
        for logits in found:
            torch.testing.assert_close(logits, record_run(runner, False).logits, rtol=0, atol=1e-9)


def test_reads_are_begun_together_where_they_move_the_fewest_rows():
    """Counted read by read for every way to cut the layers."""

    def moved(reads, cuts):
        rows = 0
        for section in cuts:
            (known, _), *later = reads[section]
            rows += known
            for stored, receivers in later:
                rows += stored - known + 2 * receivers
        return rows

    draw = torch.Generator().manual_seed(0)
    for receivers in (1, 5, 50):
        stored = torch.randint(30, (9,), generator=draw).cumsum(0).tolist()
        reads = [(n, int(torch.randint(receivers + 1, (), generator=draw))) for n in stored]
        ends = [[0, *cut, 9] for n in range(9) for cut in itertools.combinations(range(1, 9), n)]
        every = [[slice(*pair) for pair in itertools.pairwise(cut)] for cut in ends]
        assert moved(reads, grouping.sections(reads, True)) == min(moved(reads, cuts) for cuts in every)
    assert grouping.sections(reads, False) == [slice(i, i + 1) for i in range(9)]


@pytest.mark.parametrize(
    ("family", "soft", "begun"), [("gpt2", 0, 0), ("gpt2", 0, 1), ("gemma2", 1, 0), ("gemma2", 1, 1)]
)
def test_low_precision_on_a_gpu_is_as_near_to_the_truth_as_on_the_cpu(
    soft, family, begun, make_model, make_pairs, relative, monkeypatch
):
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
    if begun:
        begin_all_together(monkeypatch)
    with pretending():
        on_gpu, again = found(model.to("cuda")), found(model)
    assert torch.equal(on_gpu, again)
    assert relative(on_gpu, right) <= 1.2 * relative(on_cpu, right)
