"""Parity with the published EAP-IG package, whose float64 results on tiny models and float32 results on SmolLM2
are in data/ (see each oracle.json)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.forward import Constants
from eap_circuits.selfcheck import StayDouble
from eap_kernels.testing import relative_error as relative
from tests.circuits.conftest import loss_of, prompts
from tests.circuits.decoders import Decoder
from tests.circuits.plain_runs import differences, plain_run
from tests.circuits.plain_runs import scores as scores_by_hand

pytestmark = pytest.mark.long

DATA = Path(__file__).parent / "data"
FAMILIES = ("gpt2", "llama", "qwen2", "neox", "gemma2")
PERCENTS = (2, 5, 10, 20, 50, 100)
# Gemma 2: the package takes a head's contribution before the norm that follows attention.
COMPAT = {"gemma2": "eap-ig"}
METHODS = {
    "eap": {"method": "eap"},
    "eap_ig_inputs": {"method": "eap-ig-inputs", "quadrature": "left"},
    "eap_ig_inputs_kl": {"method": "eap-ig-inputs", "quadrature": "left", "metric": "kl_divergence"},
    "clean_corrupted": {"method": "clean-corrupted"},
    "eap_ig_activations": {"method": "eap-ig-activations", "steps": 3, "compat": "eap-ig"},
}
TOLERANCE = 1e-5


def group_sums(graph, values):
    """Query-head columns summed over each group, written out from the names."""
    kv = graph.with_heads("kv")
    right = torch.zeros(kv.n_senders, kv.n_receivers, dtype=values.dtype)
    for column, name in enumerate(graph.receivers):
        if name.endswith(("<k>", "<v>")):
            layer, head = name[1:-3].split(".h")
            group = graph.n_heads[int(layer)] // graph.n_kv_heads[int(layer)]
            name = f"a{layer}.h{int(head) // group}{name[-3:]}"
        right[:, kv.receivers.index(name)] += values[:, column]
    return right


def load_case(name):
    folder = DATA / name
    oracle = load_file(folder / "oracle.safetensors")
    # Gemma 2 caps its attention; transformers 5.17 by itself takes an implementation that does not.
    attention = {"attn_implementation": "eager"} if name == "gemma2" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **attention)
    data = eap.PairedDataset.from_tokens(oracle["clean"], oracle["corrupted"], oracle["lengths"], oracle["answers"])
    return model, data, oracle, json.loads((folder / "oracle.json").read_text())


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    return load_case(request.param)


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_scores(case, name, reuse_prefix):
    model, data, oracle, facts = case
    right = oracle[f"scores.{name}"]
    settings = {"compat": COMPAT.get(facts["family"]), **METHODS[name], "reuse_prefix": reuse_prefix}
    query = eap.attribute(model, data, heads="query", **settings)
    assert query.graph.senders == facts["senders"] and query.graph.receivers == facts["receivers"]
    assert torch.equal(query.graph.edge_mask, oracle["real_edges"])
    assert relative(query.values, right) <= TOLERANCE
    kv = eap.attribute(model, data, heads="kv", **settings)
    assert relative(kv.values, group_sums(query.graph, right)) <= TOLERANCE


def test_information_flow_routes(case):
    """Receivers behind one norm read the same, so that key/value heads have their query heads' scores, not the sums."""
    model, data, oracle, facts = case
    right = oracle["scores.information_flow_routes"]
    known = ~right.isnan().any(0)
    settings = {"method": "information-flow-routes", "compat": COMPAT.get(facts["family"])}
    query = eap.attribute(model, data, heads="query", **settings)
    assert relative(query.values[:, known], right[:, known]) <= TOLERANCE
    # Gemma's padding has a zero embedding, 0 / 0 in the package wherever a prompt is shorter than the longest.
    for column in (~known).nonzero()[:, 0].tolist():
        assert facts["family"] == "gemma2" and facts["receivers"][column].startswith("a0.")
        assert query.values[:, column].tolist() == pytest.approx([1.0] + [0.0] * (len(right) - 1))
    kv = eap.attribute(model, data, heads="kv", **settings)
    for column, name in enumerate(kv.graph.receivers):
        if name.endswith(("<k>", "<v>")):
            layer, head = name[1:-3].split(".h")
            group = query.graph.n_heads[int(layer)] // query.graph.n_kv_heads[int(layer)]
            name = f"a{layer}.h{int(head) * group}{name[-3:]}"
        assert torch.allclose(kv.values[:, column], query.values[:, facts["receivers"].index(name)], atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_exact_scores(name):
    """The families for which the package's exact scores are stored."""
    model, data, oracle, _ = load_case(name)
    scores = eap.attribute(model, data, method="exact", heads="query")
    assert relative(scores.values, oracle["scores.exact"]) <= TOLERANCE


@pytest.mark.parametrize("how", ["top", "greedy"])
def test_circuits_and_their_metric(case, how):
    model, data, oracle, facts = case
    compat = COMPAT.get(facts["family"])
    scores = eap.attribute(model, data, heads="query", compat=compat, **METHODS["eap_ig_inputs"])
    circuits = [scores.select(int(scores.graph.n_edges * p / 100), how=how) for p in PERCENTS]
    results = eap.evaluate(model, circuits, data)
    spread = float((oracle["metric.clean"] - oracle["metric.corrupted"]).abs().max())
    key = {"top": "topn"}.get(how, how)
    for percent, circuit, result in zip(PERCENTS, circuits, results):
        assert torch.equal(circuit.mask, oracle[f"circuit.{key}.{percent}"])
        if compat is None:  # else the package's circuits, too, carry something else than the model does
            error = (result.values - oracle[f"metric.{key}.{percent}.patching"]).abs().max()
            assert float(error) <= 1e-4 * spread
    for found, name in ((results[0].clean_values, "clean"), (results[0].corrupted_values, "corrupted")):
        assert float((found - oracle[f"metric.{name}"]).abs().max()) <= 1e-4 * spread


def padded_means(model, data, compat):
    """What the package takes for means at each position: padding counts, with what its library computes there.

    That is: no key of padding is seen, and padding has the last token's position, or none where positions are learned.
    """
    arch = bind(model) if compat is None else bind(model).before_post_norms()
    mask = (torch.arange(data.clean.shape[1]) < data.lengths[:, None]).long()
    place = mask.cumsum(1) - 1
    values, mlps, handles = [], [], []
    for layer in arch.layers:
        keep = lambda _, args, layer=layer: values.append(layer.written(args[0]).mean(0))  # noqa: E731
        handles.append(layer.out.register_forward_pre_hook(keep))
        handles.append(layer.mlp_out.register_forward_hook(lambda _, __, y: mlps.append(y.mean(0))))
    with torch.no_grad():
        x = model.get_input_embeddings()(data.clean)
        learned = getattr(getattr(model, "transformer", None), "wpe", None)
        given = x if learned is None else x - learned(place) * (1 - mask)[..., None]
        model(inputs_embeds=given, attention_mask=mask, position_ids=place)
    for handle in handles:
        handle.remove()
    written = (x for layer in zip(values, mlps, strict=True) for x in layer)
    return Constants(arch.embed(data.clean).detach().mean(0), tuple(written))


def ablation(name, case, compat=None):
    model, data, _, _ = case
    return padded_means(model, data, compat) if name == "mean-positional" else name


@pytest.mark.parametrize("name", ["zero", "mean-positional"])
def test_scores_of_other_ablations(case, name):
    model, data, oracle, facts = case
    compat = COMPAT.get(facts["family"])
    scores = eap.attribute(
        model, data, method="eap", heads="query", compat=compat, ablation=ablation(name, case, compat)
    )
    assert relative(scores.values, oracle[f"scores.eap_{name.replace('-', '_')}"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["zero", "mean-positional"])
def test_circuits_under_other_ablations(case, name):
    model, data, oracle, facts = case
    graph = bind(model).graph("query")
    keys = [f"{how}.{percent}" for how in ("topn", "greedy") for percent in PERCENTS]
    if COMPAT.get(facts["family"]):
        # The package's heads carry something else than the model's do: only without heads it is the same.
        keys = ["topn.2"] if name == "zero" else []
        assert not oracle["circuit.topn.2"].any()
    circuits = [eap.Circuit.from_mask(graph, oracle[f"circuit.{key}"].bool()) for key in keys]
    spread = float((oracle["metric.clean"] - oracle["metric.corrupted"]).abs().max())
    for key, result in zip(keys, eap.evaluate(model, circuits, data, ablation=ablation(name, case))):
        error = (result.values - oracle[f"metric.{key}.{name}"]).abs().max()
        assert float(error) <= 1e-4 * spread, key


def test_gemma2_head_scores_of_ours_not_of_the_package_are_their_definition():
    """A head's contribution goes through the norm after attention."""
    oracle = load_file(DATA / "gemma2" / "oracle.safetensors")
    # In float64 altogether: the frequencies of rotary positions, too.
    model = AutoModelForCausalLM.from_pretrained(DATA / "gemma2", attn_implementation="eager").double()
    data = eap.PairedDataset.from_tokens(oracle["clean"], oracle["corrupted"], oracle["lengths"], oracle["answers"])
    decoder = Decoder(model)
    with StayDouble():
        ours, theirs = (eap.attribute(model, data, method="eap", heads="query", compat=c) for c in (None, "eap-ig"))
        right = torch.zeros(ours.values.shape, dtype=torch.float64)
        for e in range(len(data)):
            clean, corrupted = (plain_run(decoder, decoder.embed(tokens)) for tokens in prompts(data, e))
            delta = differences(clean, corrupted)
            right += scores_by_hand(delta, [(1, clean)], loss_of(data, e)) / len(data)
    heads = [ours.graph.senders.index(f"a1.h{head}") for head in range(4)]
    assert relative(ours.values[ours.graph.edge_mask], right[ours.graph.edge_mask]) < 1e-6
    assert relative(theirs.values[heads, -1], right[heads, -1]) > 0.1
    assert relative(theirs.values, oracle["scores.eap"]) < TOLERANCE


@pytest.fixture(scope="module")
def smollm2():
    from eap_circuits.adapters import load_model

    oracle = load_file(DATA / "smollm2-ioi.safetensors")
    model, _ = load_model("smollm2", device="cpu")
    data = eap.PairedDataset.from_tokens(oracle["clean"], oracle["corrupted"], oracle["lengths"], oracle["answers"])
    return model, data, oracle


@pytest.mark.parametrize("name", ["eap", "eap_ig_inputs"])
def test_smollm2(smollm2, name):
    model, data, oracle = smollm2
    scores = eap.attribute(model, data, heads="query", **METHODS[name])
    right = oracle[f"scores.{name}"]
    assert relative(scores.values, right) <= TOLERANCE
    spread = float((oracle["metric.clean"] - oracle["metric.corrupted"]).abs().max())
    sizes = (500, 2000, 8000, 30000)
    circuits = [scores.select(size) for size in sizes]
    exact = eap.EdgeScores(scores.graph, right)
    for size, circuit, result in zip(sizes, circuits, eap.evaluate(model, circuits, data)):
        assert circuit == exact.select(size)
        assert circuit.n_edges == int(oracle[f"n_edges.{name}.{size}"])
        error = (result.values - oracle[f"metric.{name}.{size}"]).abs().max()
        assert float(error) <= 1e-4 * spread


@pytest.mark.slow
def test_smollm2_key_value_heads_and_batching(smollm2):
    model, data, oracle = smollm2
    right = eap.attribute(model, data, quadrature="left")
    query = right.graph.with_heads("query")
    assert relative(right.values, group_sums(query, oracle["scores.eap_ig_inputs"])) <= TOLERANCE
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    for settings in ({"batch_size": 5}, {"batch_size": 3, "reuse_prefix": False}):
        scores = eap.attribute(model, data[order], quadrature="left", **settings)
        assert relative(scores.values, right.values) <= 1e-6
