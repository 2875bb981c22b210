"""Encoder-decoders: two residual streams, whose runs, circuits and scores are those written out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import combinations

import pytest
import torch
from transformers import BartForSequenceClassification

import eap_circuits as eap
from docs import verdicts
from eap_circuits.adapters import ENCODER_DECODERS as TABLES
from eap_circuits.adapters import bind, pretrained
from eap_circuits.intervention import circuit_runs
from eap_circuits.selfcheck import check_model
from eap_circuits.tasks import PairedDataset
from tests.circuits.cli.conftest import run
from tests.circuits.conftest import (
    ENCODER_DECODERS,
    VOCABULARY,
    loss_of,
    pairs_for,
    prompts,
    random_circuit,
    tiny_model,
)
from tests.circuits.texts.test_decoders import RECORDS, tokenizer
from tests.circuits.two_sides import TwoSides, differences, gradients, of_circuit, scores

BY_HAND = ["t5", "bart-two-sides"]
GRAPH = eap.Graph((2, 2, 2), (2, 2, 2), 8, encoder=1, mlps=(True, False, True))


@pytest.fixture(params=ENCODER_DECODERS)
def name(request):
    return request.param


@pytest.fixture(params=BY_HAND)
def by_hand(request):
    model = tiny_model(request.param)
    return model, TwoSides(model), pairs_for(request.param)


def read(model, data, e):
    """What the decoder reads of a pair, with its start token."""
    own = data.decoder[e]
    return torch.cat([torch.tensor([model.config.decoder_start_token_id]), own[own >= 0]])


def close(found, right):
    return (found - right).abs().max() < 1e-5 * right.abs().max()


# The graph.


def test_a_small_graph_by_hand():
    assert GRAPH.senders == [
        *["enc.input", "enc.a0.h0", "enc.a0.h1", "enc.m0"],
        *["dec.input", "dec.a0.h0", "dec.a0.h1", "dec.x0.h0", "dec.x0.h1", "dec.m0"],
    ]
    heads = [
        f"{layer}.h{head}<{site}>" for layer in ("enc.a0", "dec.a0", "dec.x0") for site in "qkv" for head in (0, 1)
    ]
    assert GRAPH.receivers == [*heads[:6], "enc.m0", *heads[6:], "dec.m0", "logits"]
    seen = {
        **dict.fromkeys(heads[:6], (0, 1)),
        "enc.m0": (0, 3),
        **dict.fromkeys(heads[6:12], (4, 5)),
        **dict.fromkeys(heads[12:14], (4, 7)),
        **dict.fromkeys(heads[14:], (0, 4)),  # keys and values of cross-attention
        "dec.m0": (4, 9),
        "logits": (4, 10),
    }
    right = torch.zeros(10, 21, dtype=torch.bool)
    for v, receiver in enumerate(GRAPH.receivers):
        right[slice(*seen[receiver]), v] = True
    assert torch.equal(GRAPH.edge_mask, right) and GRAPH.n_edges == int(right.sum())
    assert GRAPH.input_senders == [0, 4]
    between = replace(GRAPH, mlps=None)
    assert between.senders[7] == "dec.n0" and between.receivers[13] == "dec.n0"


def test_a_graph_that_is_no_encoder_decoders_is_refused():
    for wrong in ({"encoder": 2}, {"encoder": 3}, {"parallel": True}, {"n_heads": (2, 0, 2)}):
        with pytest.raises(eap.InputError, match=r"^(encoder|mlps): expected .*, found .*\.$"):
            replace(GRAPH, **wrong)


def paths(circuit):
    """Edges that a walk from an input to the logits goes through, node by node."""
    inputs = dict(zip(circuit.graph.senders, circuit.graph.inputs, strict=True))
    names = circuit.graph.receivers
    node = {names[v]: u for u, receivers in inputs.items() for v in receivers}  # one for each head here
    ahead, behind = {"enc.input", "dec.input"}, {"logits"}
    for _ in range(len(circuit.graph.senders)):
        ahead |= {node[v] for u, v in circuit.edges if u in ahead and v in node}
        behind |= {u for u, v in circuit.edges if node.get(v, v) in behind}
    return [(u, v) for u, v in circuit.edges if u in ahead and node.get(v, v) in behind]


@pytest.mark.parametrize("how", ["top", "greedy", "optimal"])
@pytest.mark.parametrize("exactly", [False, True])
def test_chosen_edges_are_on_paths_through_both_streams(how, exactly):
    generator = torch.Generator().manual_seed(0)
    graph = replace(GRAPH, mlps=None)
    found = eap.EdgeScores(graph, torch.randn(graph.n_senders, graph.n_receivers, generator=generator))
    for n in (3, 12, 40):
        circuit = found.select(n, how=how, exactly=exactly)
        assert circuit.n_edges <= n and (not exactly or circuit.n_edges == n)
        assert paths(circuit) == circuit.edges
    assert any(u.startswith("enc.") for u, _ in circuit.edges)
    chance = eap.random_circuit(graph, 20, seed=1)
    assert chance.n_edges == 20 and paths(chance) == chance.edges


def test_the_best_circuit_of_a_few_edges_is_the_best_of_all():
    """Against all sets of so many edges of a small part of the graph."""
    graph = eap.Graph((1, 1, 1), (1, 1, 1), 8, encoder=1, mlps=(True, False, True))
    values = torch.rand(graph.n_senders, graph.n_receivers, generator=torch.Generator().manual_seed(3))
    among = graph.edge_mask.nonzero()[torch.randperm(graph.n_edges, generator=torch.Generator().manual_seed(1))[:12]]
    mask = torch.zeros_like(graph.edge_mask)
    mask[tuple(among.T)] = True
    best = 0.0
    for some in combinations(among.tolist(), 4):
        chosen = torch.zeros_like(mask)
        chosen[tuple(torch.tensor(some).T)] = True
        circuit = eap.Circuit(graph, chosen)
        if paths(circuit) == circuit.edges:
            best = max(best, float(values[chosen].sum()))
    found = eap.EdgeScores(graph, values).select(4, how="optimal", among=mask)
    assert best > 0 and float(values[found.mask].sum()) == pytest.approx(best, rel=1e-6)


# Runs.


def test_self_check_passes(name):
    checks = check_model(tiny_model(name), n_edges=4)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]


@pytest.mark.parametrize("wrong", ["queries", "swapped", "norm"])
def test_a_table_that_is_wrong_does_not_pass(wrong):
    """Self-attention's queries in cross-attention, keys as values, or a norm that the keys do not read through."""
    table = TABLES["t5"]
    own, cross = table.decoder
    paths = {"queries": {"q": own.q}, "swapped": {"k": cross.v, "v": cross.k}, "norm": {}}[wrong]
    table = replace(
        table, decoder=(own, replace(cross, **paths)), final_norm="" if wrong == "norm" else table.final_norm
    )
    assert not all(check.passed for check in check_model(tiny_model("t5"), family=table))


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs", "clean-corrupted"])
def test_scores_are_those_by_hand(by_hand, method):
    model, hand, data = by_hand
    found = eap.attribute(model, data, method=method, steps=2)
    points = {
        "eap": [(1.0, 1.0)],
        "eap-ig-inputs": [(0.5, 0.5), (1.0, 0.5)],
        "clean-corrupted": [(0.0, 0.5), (1.0, 0.5)],
    }[method]
    right = []
    for e in range(len(data)):
        decoder, (clean, corrupted) = read(model, data, e), prompts(data, e)
        ends = [hand.begin("encoder", tokens) for tokens in (corrupted, clean)]
        runs = [(w, hand.run(clean, decoder, start=torch.lerp(*ends, alpha))) for alpha, w in points]
        delta = differences(hand.run(clean, decoder).c, hand.run(corrupted, decoder).c)
        right.append(scores(found.graph.edge_mask, delta, gradients(runs, loss_of(data, e))))
    assert close(found.values, torch.stack(right).mean(0))
    alone = eap.attribute(model, data, method=method, steps=2, batch_size=1, heads="query")
    torch.testing.assert_close(alone.values, found.values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("together", [False, True])
def test_circuits_are_those_by_hand(by_hand, together, monkeypatch):
    if together:  # as on a GPU
        monkeypatch.setattr(circuit_runs, "shared", lambda device: True)
    model, hand, data = by_hand
    graph = bind(model).graph("kv")
    circuits = [random_circuit(graph, seed, share) for seed, share in enumerate((0.3, 0.6, 0.9))]
    # One that leaves the whole encoder as it is, one without what crosses, one that reads all of what crosses.
    crosses = torch.tensor(["dec.x" in v and "<q>" not in v for v in graph.receivers])
    encoders = torch.tensor([v.startswith("enc.") for v in graph.receivers])
    circuits += [eap.Circuit(graph, graph.edge_mask & kept) for kept in (encoders, ~crosses, crosses)]
    found = eap.evaluate(model, circuits, data)
    for circuit, result in zip(circuits, found, strict=True):
        for e in range(len(data)):
            decoder, (clean, corrupted) = read(model, data, e), prompts(data, e)
            ablated = hand.run(corrupted, decoder).c
            with torch.no_grad():
                own = hand.run(clean, decoder, of_circuit(circuit.mask.double(), ablated))
            assert float(result.values[e]) == pytest.approx(-float(loss_of(data, e)(own.logits)), rel=1e-5, abs=1e-6)


def test_all_edges_are_the_model_and_none_the_corrupted_run(name):
    """The plain model on each prompt by itself, without padding."""
    model, data = tiny_model(name), pairs_for(name)
    full = bind(model).graph("kv").edge_mask
    found = eap.evaluate(model, eap.Circuit(bind(model).graph("kv"), full), data)
    for side, values in enumerate((found.clean_values, found.corrupted_values)):
        for e in range(len(data)):
            given = {"input_ids": prompts(data, e)[side][None], "decoder_input_ids": read(model, data, e)[None]}
            with torch.no_grad():
                logits = model(**given).logits[0, -1]
            assert float(values[e]) == pytest.approx(-float(loss_of(data, e)(logits)), rel=1e-5, abs=1e-6)
    assert found.faithfulness == pytest.approx(1, abs=1e-6)


def test_a_decoder_with_a_vocabulary_of_its_own():
    """Tokens beyond the encoder's are taken, and none beyond the decoder's."""
    shared, data = tiny_model("marian-two-sides"), pairs_for("marian-two-sides")
    made = {}
    for size in (VOCABULARY - 9, VOCABULARY + 9):
        apart = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": size}
        made[size] = type(shared)(type(shared.config).from_dict(shared.config.to_dict() | apart)).double().eval()
    small, large = made.values()
    data = replace(data, decoder=torch.where(data.decoder < 0, -1, VOCABULARY + 8), answers=data.answers + 6)
    found = eap.evaluate(large, eap.Circuit(bind(large).graph("kv"), bind(large).graph("kv").edge_mask), data)
    for e in range(len(data)):
        with torch.no_grad():
            logits = large(input_ids=prompts(data, e)[0][None], decoder_input_ids=read(large, data, e)[None]).logits
        assert float(found.values[e]) == pytest.approx(-float(loss_of(data, e)(logits[0, -1])), rel=1e-5, abs=1e-6)
    for wrong, part in ((replace(data, answers=data.answers % 50), "decoder"), (data, "answers")):
        with pytest.raises(eap.InputError, match=f"{part} of example .* below the model's 50"):
            eap.attribute(small, wrong)


def test_a_curve_with_random_circuits_and_a_file(tmp_path):
    model, data = tiny_model("t5"), pairs_for("t5")
    found = eap.attribute(model, data, method="eap")
    curve = eap.faithfulness_curve(model, found, data, (0.1, 0.5, 1), baselines=["random", "complement"], seeds=[0])
    assert curve.faithfulness[-1] == pytest.approx(1, abs=1e-6)
    assert all(paths(circuit) == circuit.edges for circuit in curve.circuits)
    for each, kind in (
        (found, eap.EdgeScores),
        (curve.circuits[1], eap.Circuit),
        (found.node_scores(), eap.NodeScores),
    ):
        each.save(tmp_path / "x.safetensors")
        assert kind.load(tmp_path / "x.safetensors").graph == each.graph
    assert found.heatmap() and curve.circuits[1].plot() and "<svg" in curve.circuits[1]._repr_html_()
    with pytest.raises(eap.InputError, match="one residual stream"):
        found.save(tmp_path / "x.json")
    assert eap.plan(tiny_model("t5", torch.float32).to("meta"), data, method="eap").bytes > 0


# Files.


def test_from_a_file_of_texts_to_scores_and_curves(tmp_path):
    """By the commands: the model is loaded with its decoder, and the file says what that reads."""
    tiny_model("t5", torch.float32).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    out, given = tmp_path / "scores.safetensors", ("--data", tmp_path / "pairs.jsonl")
    run("attribute", tmp_path / "model", *given, "-o", out, "--method", "eap")
    run("curve", tmp_path / "model", out, *given, "-o", tmp_path / "curve.json")
    run("report", out, "-o", tmp_path / "report.html")
    assert "dec.x1.h0" in (tmp_path / "report.html").read_text()
    scores = eap.EdgeScores.load(out)
    assert scores.values.any() and scores.graph.encoder == 2


@pytest.mark.parametrize("name", BY_HAND)
def test_a_saved_model_is_loaded_with_its_decoder(name, tmp_path, monkeypatch):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda *_, **__: None)
    for weights in (True, False):
        assert type(pretrained.load_model(str(tmp_path), weights=weights)[0]) is type(model)


# What is refused.


def test_what_is_not_there_yet_is_refused_in_one_sentence():
    model, data = tiny_model("t5"), pairs_for("t5")
    scores = eap.attribute(model, data, method="eap")
    circuit = scores.select(40)
    attribute, short = partial(eap.attribute, model, data, method="eap"), replace(data, decoder=data.decoder[:, :1])
    spans = replace(data, spans=torch.zeros_like(data.clean))
    several = replace(data, answers=data.answers[..., None, None].repeat(1, 1, 1, 2))
    start = tiny_model("t5")
    start.config.decoder_start_token_id = start.generation_config.decoder_start_token_id = None
    unequal = PairedDataset.from_tokens(
        data.clean, data.corrupted, data.lengths, data.answers, corrupted_lengths=data.lengths - 1, decoder=data.decoder
    )
    for call, said in (
        (lambda: eap.attribute(model, spans, keep="spans"), "no encoder-decoder, for keep='spans'"),
        (lambda: eap.attribute(model, data, compat="eap-ig"), "no encoder-decoder, for compat="),
        (lambda: attribute(ablation="mean", ablation_data=replace(data, decoder=None)), "ablation_data: expected what"),
        (lambda: attribute(ablation="mean-positional", ablation_data=short), "expected decoders of 3 tokens, the data"),
        (lambda: eap.circuit_model(model, circuit), "no encoder-decoder, for circuit_model"),
        (lambda: eap.export_model(model, circuit, "folder"), "one residual stream, found an encoder-decoder's"),
        (lambda: eap.discover(model), "as none is discovered, found 't5'"),
        (lambda: eap.attribute(model, replace(data, decoder=None)), "decoder reads behind its start token"),
        (lambda: eap.attribute(model, several, "sequence_logprob"), "found answers of several tokens"),
        (lambda: eap.attribute(model, replace(data, scored=data.lengths[:, None] // 2)), "found scored positions"),
        (lambda: eap.attribute(model, unequal), "found prompts of unequal lengths"),
        (lambda: eap.attribute(model, replace(data, decoder=data.decoder + 60)), "decoder of example"),
        (lambda: eap.attribute(start, data), "decoder_start_token_id: expected a token id"),
        (lambda: eap.attribute(tiny_model("llama"), data), "is no encoder-decoder, found some"),
        (lambda: bind(BartForSequenceClassification(tiny_model("bart-two-sides").config)), "that classifies"),
    ):
        with pytest.raises(eap.InputError) as error:
            call()
        assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("own", [[2, 7], [7, 0], [7, 1], []])
def test_a_decoder_that_starts_twice_or_ends_is_warned_of(own, recwarn):
    model, data = tiny_model("bart-two-sides"), pairs_for("bart-two-sides", n=2)
    model.config.eos_token_id = 1  # 0 pads, and 2 starts
    read = torch.tensor([[7, 0, 8], [*own, *[-1] * (3 - len(own))]])
    eap.evaluate(model, random_circuit(bind(model).graph("kv"), 0, 0.5), replace(data, decoder=read))
    said = [str(each.message) for each in recwarn if "decoder" in str(each.message)]
    assert len(said) == bool(own)
    assert not own or f"data: of example 1 the decoder reads {own} behind its start token, 2" in said[0]


def test_every_table_has_a_tiny_model():
    """Here, or in docs/verdicts.py, whose committed results say that the self-check passed."""
    here = {model_type for model_type, _ in ENCODER_DECODERS.values()}
    verdict = {kind: one["verdict"] for kind, one in verdicts.read()["5.24.0"].items()}
    assert here <= set(TABLES) and all(verdict[kind + verdicts.SEQ2SEQ] == "table" for kind in TABLES)
