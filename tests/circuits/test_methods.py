"""Paths of activations, conductance and information flow routes: against plain runs written out, and invariance."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import eap_circuits as eap
from eap_circuits.capture import PeakBytes, RecordedRun, Runner, borrowed, make_batches, prepare
from eap_circuits.errors import InputError
from eap_circuits.evaluation.check import StayDouble
from eap_circuits.methods import METHODS, activations, flow, gradient, planning
from tests.circuits.conftest import FAMILIES, KINDS
from tests.circuits.test_attribute import losses
from tests.circuits.test_memory import longer_pairs

NEW = ["eap-ig-activations", "eap-conductance", "information-flow-routes"]


def chosen_edges(graph, n, seed=1):
    edges = graph.edge_mask.nonzero()
    return edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed))[:n]].tolist()


def group_of(graph, sender):
    """The senders that move with one: the input, a layer's heads, its MLP, found by their names."""
    name = graph.senders[sender].split(".")[0]
    return [u for u, other in enumerate(graph.senders) if other.split(".")[0] == name]


# Paths of activations.


@pytest.mark.parametrize(("name", "quadrature"), [*((name, "right") for name in FAMILIES), ("gemma2", "midpoint")])
def test_activation_paths_give_derivatives_at_points_of_the_senders_own_path(name, quadrature, make_model, make_pairs):
    """Where every edge out of u's group carries corrupted + α (clean − corrupted), which the circuit run does with a
    soft mask, the derivative by the mask of (u, v) is u's part of the score."""
    model, data, steps, step = make_model(name), make_pairs(n=4), 2, 1e-5
    given = {"method": "eap-ig-activations", "steps": steps, "quadrature": quadrature}
    with StayDouble():
        scores = eap.attribute(model, data, heads="query", **given)
        graph, masks = scores.graph, []
        edges = chosen_edges(graph, 6)
        for u, v in edges:
            for k in range(steps):
                alpha = (k + 1) / steps if quadrature == "right" else (k + 0.5) / steps
                for sign in (1, -1):
                    mask = graph.edge_mask.double()
                    mask[group_of(graph, u)] *= alpha
                    mask[u, v] -= sign * step
                    masks.append(mask)
        found = losses(model, graph, data, masks).view(len(edges), steps, 2)
    derivatives = (found[..., 0] - found[..., 1]).mean(1) / (2 * step) / len(data)
    scale = float(scores.values.abs().max())
    for (u, v), derivative in zip(edges, derivatives.tolist()):
        assert abs(float(scores.values[u, v]) - derivative) <= 1e-6 * scale, graph.edge_name(u, v)


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


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("kind", SITES)
def test_activation_paths_head_by_head_with_plain_autograd(kind, published, make_model, make_pairs, relative):
    model, data, steps = make_model(kind), make_pairs(n=3), 3
    compat = "eap-ig" if published else None
    with StayDouble():
        scores = eap.attribute(model, data, method="eap-ig-activations", steps=steps, compat=compat)
        graph = scores.graph
        groups = [group_of(graph, u) for u in range(graph.n_senders)]
        groups = [list(group) for group in dict.fromkeys(map(tuple, groups))]
        right = torch.zeros(graph.n_senders, len(groups), dtype=torch.float64)
        for e in range(len(data)):
            n, (good, bad) = int(data.lengths[e]), data.answers[e].tolist()
            embed = model.get_input_embeddings()
            clean, corrupted = (embed(x[e, None, :n]).detach() for x in (data.clean, data.corrupted))
            (_, from_clean, _, c), (_, from_corrupted, _, c_corrupted) = (
                plain_run(model, kind, x) for x in (clean, corrupted)
            )
            delta = (c_corrupted - c).detach()  # [S, T, D]
            for index, group in enumerate(groups):
                for k in range(1, steps + 1):
                    point = torch.lerp(from_corrupted[index], from_clean[index], k / steps).detach()
                    if index == 0:
                        logits, _, reads, _ = plain_run(model, kind, point)
                    else:
                        logits, _, reads, _ = plain_run(model, kind, clean, (index, point))
                    (logits[bad] - logits[good]).backward()
                    model.zero_grad()
                    for site, x in enumerate(reads):
                        if x.grad is None:
                            continue  # what it feeds was replaced
                        if published and index == 0 and site == 0 and kind == "llama":
                            continue  # the package's embeddings are constants there
                        part = (delta @ x.grad[0].T).diagonal(dim1=1, dim2=2).sum(1) / steps / len(data)
                        if published:
                            right[:, site] += part / len(groups)
                        else:
                            right[group, site] += part[group]
    right *= by_layer(graph, graph.edge_mask.double()) > 0
    assert relative(by_layer(graph, scores.values), right) < 1e-6


# Conductance.


def test_conductance_of_the_input_is_integrated_gradients(family, make_model, make_pairs, relative):
    """The embeddings change evenly along the path: their edges have EAP-IG's scores, by the trapezoid rule."""
    model, data = make_model(family), make_pairs(n=4)
    with StayDouble():
        found = eap.attribute(model, data, method="eap-conductance", steps=3)
        left, right = (eap.attribute(model, data, steps=3, quadrature=side).values for side in ("left", "right"))
    assert relative(found.values[0], (left + right)[0] / 2) < 1e-6


def test_conductance_of_one_segment_is_clean_corrupted(family, make_model, make_pairs, relative):
    """Then every sender's change is its whole difference, and the gradients are those of the two ends."""
    model, data = make_model(family), make_pairs(n=4)
    with StayDouble():
        found = eap.attribute(model, data, method="eap-conductance", steps=1, heads="query")
        right = eap.attribute(model, data, method="clean-corrupted", heads="query")
    assert relative(found.values, right.values) < 1e-6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3-moe"])  # experts' choice jumps on the path
def test_conductance_over_every_cut_is_the_metrics_difference(kind, make_model, make_pairs):
    """Each layer's boundary separates `input` from `logits`; the trapezoid rule's error falls with M²."""
    model, data = make_model(kind), make_pairs(n=2)
    errors = []
    with StayDouble():
        for steps in (16, 64):
            scores = eap.attribute(model, data, method="eap-conductance", steps=steps)
            graph = scores.graph
            result = eap.evaluate(model, eap.Circuit.from_mask(graph, graph.edge_mask), data)
            cuts = []
            for layer in range(graph.n_layers):
                first = graph.receivers_at(layer, "q").start
                cuts.append(float(scores.values[: graph.attention_reach(layer), first:].double().sum()))
            cuts.append(float(scores.values[:, -1].double().sum()))
            errors.append([abs(cut - (result.clean - result.corrupted)) for cut in cuts])
    scale = float(scores.values.abs().max())
    coarse, fine = (max(error) for error in errors)
    assert fine <= coarse / 8 or fine <= 1e-5 * scale  # a sixteenth, were the fourth power of the step nothing
    assert fine <= 0.01 * scale


@pytest.mark.parametrize("kind", SITES)
def test_conductance_head_by_head_with_plain_autograd(kind, make_model, make_pairs, relative):
    model, data, steps = make_model(kind), make_pairs(n=3), 4
    with StayDouble():
        scores = eap.attribute(model, data, method="eap-conductance", steps=steps)
        graph = scores.graph
        right = torch.zeros(graph.n_senders, 2 * graph.n_layers + 1, dtype=torch.float64)
        for e in range(len(data)):
            n, (good, bad) = int(data.lengths[e]), data.answers[e].tolist()
            embed = model.get_input_embeddings()
            clean, corrupted = (embed(x[e, None, :n]).detach() for x in (data.clean, data.corrupted))
            points = []
            for k in range(steps + 1):
                logits, _, reads, contributions = plain_run(model, kind, torch.lerp(corrupted, clean, k / steps))
                (logits[bad] - logits[good]).backward()
                model.zero_grad()
                points.append((contributions.detach(), torch.stack([x.grad[0] for x in reads])))
            for (c, g), (c_next, g_next) in pairwise(points):
                right += torch.einsum("std,vtd->sv", c - c_next, (g + g_next) / 2) / len(data)
    right *= by_layer(graph, graph.edge_mask.double()) > 0
    assert relative(by_layer(graph, scores.values), right) < 1e-6


# Information flow routes.


def shares(x, contributions):
    """The definition for one token: x [D], contributions [S, D] -> [S]."""
    proximity = [max(0.0, float(x.abs().sum() - (x - c).abs().sum())) for c in contributions]
    total = sum(proximity)
    return torch.tensor([p / total if total else 0.0 for p in proximity], dtype=torch.float64)


@pytest.mark.parametrize("heads", ["kv", "query"])
@pytest.mark.parametrize("kind", SITES)
def test_flow_head_by_head(kind, heads, make_model, make_pairs, relative):
    model, data = make_model(kind), make_pairs(n=3)
    with StayDouble(), torch.no_grad():
        scores = eap.attribute(model, data, method="information-flow-routes", heads=heads)
        graph = scores.graph
        right = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
        places = list(dict.fromkeys(name.split(".")[0] for name in graph.receivers))
        for e in range(len(data)):
            n = int(data.lengths[e])
            embeddings = model.get_input_embeddings()(data.clean[e, None, :n])
            _, _, reads, contributions = plain_run(model, kind, embeddings)
            for column, name in enumerate(graph.receivers):
                x, reach = reads[places.index(name.split(".")[0])][0], int(graph.reach[column])
                for t in range(n):
                    right[:reach, column] += shares(x[t], contributions[:reach, t]) / n / len(data)
    assert relative(scores.values, right) < 1e-6


def test_what_flow_takes_for_contributions_adds_up(family, make_model, make_pairs, relative):
    """Between two runs the last norm's input differs by what the senders' contributions do: nothing else does."""
    model, data = make_model(family), make_pairs()
    run = prepare(model, data, "logit_diff", "patching", None)
    (batch,) = make_batches(data, len(data), False, run.arch.device)
    with borrowed(model), torch.no_grad(), StayDouble():
        runner, rows, sums, reads = Runner(run.arch, run.arch.graph("kv"), batch), batch.rows, [], []
        for corrupted in (False, True):
            record = RecordedRun(runner, corrupted)
            sums.append(sum(written.sum(1) for written in flow._contributions(run, record, rows)))
            reads.append(record.norm_inputs[id(run.arch.final_norm.module)].flatten(0, 1)[rows])
    assert relative(sums[0] - sums[1], reads[0] - reads[1]) < 1e-8


def test_flow_is_shares_of_the_clean_prompts_inputs(family, make_model, make_pairs, relative):
    model, data = make_model(family), make_pairs()
    scores = eap.attribute(model, data, method="information-flow-routes")
    graph = scores.graph
    assert float(scores.values.min()) >= 0 and not scores.values[~graph.edge_mask].any()
    # Not all: a token where no sender brings a receiver nearer to its input has no shares.
    assert float(scores.values.sum(0).max()) <= 1 + 1e-6 and float(scores.values.sum(0).min()) > 0
    other = eap.PairedDataset.from_tokens(data.clean, data.clean.flip(0), data.lengths, data.answers.flip(0))
    assert (
        relative(eap.attribute(model, other, "kl_divergence", "information-flow-routes").values, scores.values) < 1e-6
    )
    assert scores.info["metric"] is None and scores.info["steps"] is None
    query = eap.attribute(model, data, method="information-flow-routes", heads="query")
    columns = [graph.receivers.index("logits"), graph.receivers.index("a1.h0<k>")]
    names = [query.graph.receivers.index(graph.receivers[column]) for column in columns]
    assert relative(query.values[:, names], scores.values[:, columns]) < 1e-6


def test_flow_needs_no_tensor_of_all_senders(make_model, relative, monkeypatch):
    model, data = make_model("llama"), longer_pairs()
    right = eap.attribute(model, data, method="information-flow-routes").values
    with PeakBytes() as whole:
        eap.attribute(model, data, method="information-flow-routes")
    monkeypatch.setattr(flow, "WORKSPACE", 2**14)
    with PeakBytes() as tiled:
        found = eap.attribute(model, data, method="information-flow-routes").values
    assert relative(found, right) < 1e-6 and tiled.peak < whole.peak


def test_flow_of_a_token_without_input_counts_nothing(make_model, make_pairs):
    """Gemma's padding token has a zero embedding: 0 / 0 in the published package, whose scores are then NaN."""
    model, data = make_model("llama"), make_pairs(n=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[data.clean[0, 0]] = 0
    values = eap.attribute(model, data, method="information-flow-routes").values
    n, missing = int(data.lengths[0]), int((data.clean[0, : data.lengths[0]] == data.clean[0, 0]).sum())
    assert abs(float(values[0, 0]) - (n - missing) / n) < 1e-6


# All of them.


@pytest.mark.parametrize(("method", "compat"), [*((method, None) for method in NEW), (NEW[0], "eap-ig")])
def test_scores_do_not_depend_on_batching(kind, method, compat, make_model, make_pairs, relative):
    model, data = make_model(kind), make_pairs(seed=3, n=5)
    given = {"method": method, "steps": 2, "compat": compat}
    right = eap.attribute(model, data, **given).values
    for settings in ({"batch_size": 1}, {"batch_size": 3, "reuse_prefix": False}):
        assert relative(eap.attribute(model, data, **given, **settings).values, right) < 1e-6


@pytest.mark.parametrize("method", NEW)
def test_scores_do_not_depend_on_padding(method, make_model, make_pairs, relative):
    model, data = make_model("llama"), make_pairs(seed=4)
    wide = (torch.nn.functional.pad(x, (0, 6), value=7) for x in (data.clean, data.corrupted))
    padded = eap.PairedDataset.from_tokens(*wide, data.lengths, data.answers)
    right = eap.attribute(model, data, method=method, steps=2).values
    assert relative(eap.attribute(model, padded, method=method, steps=2, batch_size=4).values, right) < 1e-6


@pytest.mark.parametrize("method", ["eap-ig-activations", "eap-conductance"])
def test_key_value_scores_are_group_sums(method, make_model, make_pairs, relative):
    model, data = make_model("gemma2"), make_pairs(seed=5)
    query, kv = (eap.attribute(model, data, method=method, steps=2, heads=heads) for heads in ("query", "kv"))
    assert relative(query.to_kv().values, kv.values) < 1e-6


def test_activation_paths_in_bounded_memory(make_model, make_pairs, relative, monkeypatch):
    model, data = make_model("qwen2"), make_pairs(seed=8)
    given = {"method": "eap-ig-activations", "steps": 4, "quadrature": "left"}
    right = eap.attribute(model, data, **given).values
    monkeypatch.setattr(gradient, "HELD_BYTES", 1)
    monkeypatch.setattr(gradient, "HELD_POINTS", 1)
    assert relative(eap.attribute(model, data, **given).values, right) < 1e-6


@pytest.mark.parametrize("settings", [{}, {"quadrature": "left"}, {"steps": 2}, {"steps": 1}])
def test_what_activation_paths_take_is_predicted(settings, make_model, monkeypatch):
    model, data = make_model("llama"), longer_pairs()
    monkeypatch.setattr(planning, "most_tokens", lambda device: 300)
    quadrature = settings.pop("quadrature", "right")
    plan = eap.plan(model, data, method="eap-ig-activations", **settings)
    with PeakBytes() as count:
        eap.attribute(model, data, method="eap-ig-activations", quadrature=quadrature, **settings)
    assert abs(plan.bytes - count.peak) <= 0.1 * count.peak


def test_runs_start_at_the_senders_layer(make_model, make_pairs, monkeypatch):
    """The layers before a group do not run again: counted by the calls of each layer's MLP."""
    model, data = make_model("llama"), make_pairs(n=2)
    calls = [0] * 3
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, i=index: calls.__setitem__(i, calls[i] + 1))
    eap.attribute(model, data, method="eap-ig-activations", steps=1, quadrature="midpoint", reuse_prefix=False)
    # Two plain runs, the path of the embeddings, and those of a layer's heads and MLP for every layer up to one's own.
    batches = calls[0] // 5
    assert calls == [5 * batches, 7 * batches, 9 * batches]


@pytest.mark.parametrize("method", NEW)
def test_the_model_is_untouched_also_after_an_error(method, kind, make_model, make_pairs, monkeypatch):
    from tests.circuits.test_untouched import snapshot

    model, data = make_model(kind).train(), make_pairs(n=3)
    before = snapshot(model)
    eap.attribute(model, data, method=method, steps=2)
    assert snapshot(model) == before
    last = [m for m in model.modules() if not list(m.children())][-2]
    handle = last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("inside")))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="inside"):
        eap.attribute(model, data, method=method, steps=2)
    assert snapshot(model) == before
    handle.remove()


@pytest.mark.parametrize("method", NEW)
def test_half_precision_weights(method, make_model, make_pairs, relative):
    data = make_pairs(seed=9)
    right = eap.attribute(make_model("llama"), data, method=method).values
    found = eap.attribute(make_model("llama", dtype=torch.bfloat16), data, method=method).values
    # As for the other methods: the order of 2⁻⁸ times ten.
    assert found.dtype == torch.float32 and relative(found, right) < 0.1


@pytest.mark.parametrize("method", NEW)
def test_where_memory_runs_out_the_rest_goes_on(method, make_model, relative, monkeypatch):
    model, data = make_model("gpt2"), longer_pairs()
    right = eap.attribute(model, data, method=method, steps=2).values
    original, scored = METHODS[method].scorer, []

    def run(run_, graph, path, batch, tokens):
        if batch.clean.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        scored.extend(batch.index.tolist())
        return original(run_, graph, path, batch, tokens)

    monkeypatch.setitem(METHODS, method, replace(METHODS[method], scorer=run))
    found = eap.attribute(model, data, method=method, steps=2).values
    assert sorted(scored) == list(range(len(data))) and relative(found, right) < 1e-6


@pytest.mark.parametrize("method", [*NEW, "eap"])
def test_what_a_method_does_not_know_is_refused(method, make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs()
    with pytest.raises(InputError, match='edges and checkpoint: expected method="exact"'):
        eap.attribute(model, data, method=method, checkpoint="x.safetensors")
    if not METHODS[method].planned:
        with pytest.raises(InputError, match=f"method: expected one whose memory is planned .*found '{method}'"):
            eap.plan(model, data, method=method)


def test_specs_are_whole():
    for name, method in METHODS.items():
        assert name == method.name and method.description and method.passes
        assert method.tier in ("stable", "experimental")
    assert activations.score_batch is METHODS["eap-ig-activations"].scorer
