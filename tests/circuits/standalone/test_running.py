"""A circuit as a module: against `evaluate`, padded on either side, cached or not, beside hooks; what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.selfcheck import StayDouble
from eap_circuits.standalone import running
from tests.circuits.conftest import logit_difference, prompts, random_circuit, random_edges
from tests.circuits.decoders import Decoder
from tests.circuits.models import VOCABULARY
from tests.circuits.plain_runs import of_circuit, plain_run
from tests.circuits.untouched import differences, snapshot

ABLATIONS = ["patching", "zero", "mean", "mean-positional"]


def left(ids, lengths):
    """Right padded ids [E, T], padded on the left, and their mask."""
    mask = torch.arange(ids.shape[1]) >= (ids.shape[1] - lengths)[:, None]
    moved = torch.stack([row.roll(ids.shape[1] - int(n)) for row, n in zip(ids, lengths)])
    return moved, mask.long()


def values_of(logits, data, last):
    return torch.stack([logit_difference(logits[e, last[e]], data, e) for e in range(len(data))])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "qwen3-moe", "mamba"])
def test_metrics_are_those_of_evaluate(name, make_model, make_pairs):
    model, data = make_model(name), make_pairs(seed=3, n=5)
    circuit = random_circuit(bind(model).graph("kv"), 1, 0.5)
    mask = (torch.arange(data.clean.shape[1]) < data.lengths[:, None]).long()
    (ids, moved), corrupted = left(data.clean, data.lengths), left(data.corrupted, data.lengths)[0]
    with StayDouble():
        for ablation in ABLATIONS:
            patches = ablation == "patching"
            runs = eap.circuit_model(model, circuit, ablation, data if "mean" in ablation else None)
            right = eap.evaluate(model, circuit, data, ablation=ablation).values
            logits = runs(data.clean, mask, data.corrupted if patches else None).logits
            torch.testing.assert_close(values_of(logits, data, data.lengths - 1), right)
            assert not logits[mask == 0].any()
            logits = runs(ids, moved, corrupted if patches else None).logits
            torch.testing.assert_close(values_of(logits, data, [-1] * len(data)), right)


def test_all_edges_are_the_model(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(seed=1, n=3)
    graph = bind(model).graph("kv")
    runs = eap.circuit_model(model, eap.Circuit.from_mask(graph, graph.edge_mask), "zero")
    with torch.no_grad():
        torch.testing.assert_close(runs(data.clean).logits, model(data.clean).logits, atol=1e-5, rtol=1e-5)
        right = model.generate(data.clean, attention_mask=torch.ones_like(data.clean), max_new_tokens=3, num_beams=3)
    assert runs.generate(data.clean, max_new_tokens=3, num_beams=3).equal(right)


def test_constants_may_be_learned_or_given(make_model, make_pairs, monkeypatch):
    model, data = make_model("gpt2", torch.float32), make_pairs(seed=2, n=3)
    circuit = random_circuit(bind(model).graph("kv"), 2, 0.5)
    monkeypatch.setattr(running, "optimal_constants", partial(eap.optimal_constants, steps=2))
    learned = running.optimal_constants(model, circuit, data, "kl_divergence")
    right = eap.evaluate(model, circuit, data, ablation=learned).values
    for given in ((learned,), ("optimal", data)):
        logits = eap.circuit_model(model, circuit, *given)(data.clean).logits.double()
        torch.testing.assert_close(values_of(logits, data, data.lengths - 1), right, atol=1e-4, rtol=1e-4)


def by_hand(runs, ids, mask, other, new):
    """(Tokens, logits [E, new, V]) of a greedy run, each token from a run of all tokens before it."""
    found = []
    for _ in range(new):
        found.append(runs(ids, mask, other).logits[:, -1])
        token = found[-1].argmax(1, keepdim=True)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        other = None if other is None else torch.cat([other, token], 1)
    return ids, torch.stack(found, 1)


GENERATED = [
    *[("gpt2", "kv", each) for each in ABLATIONS],
    ("llama", "kv", "mean"),
    ("llama", "query", "mean-positional"),
    ("gemma2", "query", "zero"),
    ("qwen3-moe", "kv", "mean"),
    ("mamba", "kv", "mean"),
    ("qwen3-next", "kv", "mean"),
    ("opt", "kv", "mean-positional"),
    ("bart", "kv", "mean"),
    ("marian", "kv", "mean"),
]


@pytest.mark.parametrize(("name", "heads", "ablation"), GENERATED)
def test_generated_tokens_are_those_of_whole_runs(name, heads, ablation, make_model, make_pairs):
    """Whether the circuit has a cache of its own or not."""
    model, data, longer = make_model(name), make_pairs(seed=3, n=3), make_pairs(seed=4, n=3, longest=16)
    (ids, mask), other = left(data.clean, data.lengths), None
    if ablation == "patching":
        other = left(data.corrupted, data.lengths)[0]
    model.generation_config.forced_eos_token_id = None  # BART's
    with StayDouble():
        circuit = random_circuit(bind(model).graph(heads), 1, 0.6)
        runs = eap.circuit_model(model, circuit, ablation, longer if "mean" in ablation else None)
        said = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
        right, logits = by_hand(runs, ids, mask, other, 4)
        found = runs.generate(ids, mask, other, max_new_tokens=4, **said)
        right_alone, _ = by_hand(runs, ids[:, -4:], mask[:, -4:], None if other is None else other[:, -4:], 3)
        alone = runs.generate(ids[:, -4:], None, None if other is None else other[:, -4:], max_new_tokens=3, **said)
    torch.testing.assert_close(torch.stack(found.logits, 1), logits)
    assert found.sequences.tolist() == right.tolist()
    assert alone.sequences.tolist() == right_alone.tolist()


@pytest.mark.parametrize("ablation", ["mean", "patching"])
def test_beams_and_samples_do_not_depend_on_the_cache(ablation, make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(seed=5, n=2)
    patches = ablation == "patching"
    runs = eap.circuit_model(
        model, random_circuit(bind(model).graph("kv"), 3, 0.6), ablation, None if patches else data
    )
    other = data.corrupted if patches else None

    def generated(**options):
        torch.manual_seed(0)
        return runs.generate(data.clean, None, other, max_new_tokens=4, pad_token_id=0, **options)

    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        assert generated(**options).equal(generated(**options, use_cache=False))


def test_factors_scale_edges(make_model, make_pairs):
    """Against the specification, edge by edge."""
    model, data = make_model("llama"), make_pairs(seed=6, n=2)
    decoder, graph = Decoder(model, "kv"), bind(model).graph("kv")
    circuit = random_circuit(graph, 4, 0.4)
    mask, factors = circuit.mask.double(), {}
    for (u, v), factor in zip(random_edges(graph, 6), (2.0, -1.0, 0.0, 0.5, 3.0, 1.0)):
        factors[graph.senders[u], graph.receivers[v]] = mask[u, v] = factor
    with StayDouble(), torch.no_grad():
        logits = eap.circuit_model(model, circuit, "zero", factors=factors)(data.clean).logits
        for e in range(len(data)):
            tokens, _ = prompts(data, e)
            nothing = [torch.zeros(len(tokens), graph.d_model).double()] * graph.n_senders
            right = plain_run(decoder, decoder.embed(tokens), of_circuit(mask, nothing)).logits
            torch.testing.assert_close(logits[e, len(tokens) - 1], right)


def test_hooks_of_others_see_the_circuit_and_change_it(make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs(seed=7, n=3)
    circuit = random_circuit(bind(model).graph("kv"), 5, 0.5)
    runs, plain = (eap.circuit_model(model, circuit, "mean", data) for _ in range(2))
    before = plain(data.clean).logits
    push, seen = torch.randn(24, dtype=torch.float64), []
    steer = model.transformer.h[0].register_forward_hook(lambda _, __, y: y + push)
    look = model.transformer.h[1].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    runs(data.clean)  # which tries the model with its hooks
    seen.clear()
    state = snapshot(model)
    logits, generated = runs(data.clean).logits, runs.generate(data.clean, max_new_tokens=3, pad_token_id=0)
    right, _ = by_hand(runs, data.clean, torch.ones_like(data.clean), None, 3)
    assert not torch.allclose(logits, before) and generated.equal(right)
    assert all(len(x) == len(data) for x in seen) and seen[1].shape == (3, data.clean.shape[1], 24)
    measured = eap.evaluate(model, circuit, data, ablation=runs.constants).values
    torch.testing.assert_close(values_of(logits, data, data.lengths - 1), measured)
    assert not differences(state, snapshot(model))
    steer.remove(), look.remove()
    assert runs(data.clean).logits.equal(before)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_as_it_was(training, make_model, make_pairs):
    """Also after an error in the middle of it."""
    model, data = make_model("llama").train(training), make_pairs(seed=8, n=2)
    runs = eap.circuit_model(model, random_circuit(bind(model).graph("query"), 6, 0.5), "zero")
    state = snapshot(model)

    runs(data.clean), runs.generate(data.clean, max_new_tokens=2, pad_token_id=0)
    assert not differences(state, snapshot(model))

    def stop(*_):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        runs.generate(data.clean, max_new_tokens=2, stopping_criteria=[stop])
    assert not differences(state, snapshot(model)) and model.training is training


def test_what_is_refused(make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs(seed=9, n=2, longest=8)[0:2]
    graph = bind(model).graph("kv")
    circuit, ids = random_circuit(graph, 7, 0.5), data.clean
    patched, zero = eap.circuit_model(model, circuit), eap.circuit_model(model, circuit, "zero")
    short = eap.circuit_model(model, circuit, "mean-positional", data)
    wide = torch.ones(2, 20, dtype=torch.int64)
    for call, said in (
        (lambda: eap.circuit_model(model, circuit, "mean"), "ablation_data: expected prompts"),
        (lambda: eap.circuit_model(model, circuit, "zero", data), "ablation_data: expected none"),
        (lambda: eap.circuit_model(model, circuit, "men", data), "did you mean 'mean'"),
        (lambda: eap.circuit_model(model, circuit.mask), "circuit: expected a Circuit"),
        (lambda: eap.circuit_model(make_model("llama"), circuit), "circuit: expected one of"),
        (lambda: eap.circuit_model(model, circuit, factors={("m0", "a0.h0<q>"): 2}), "factors: expected edges"),
        (lambda: eap.circuit_model(model, circuit, factors={"m0": 2}), "factors: expected edges"),
        (lambda: eap.circuit_model(model, circuit, factors={("input", "logits"): float("nan")}), "finite numbers"),
        (lambda: patched(ids), "corrupted_ids: expected the corrupted prompts"),
        (lambda: patched.generate(ids), "corrupted_ids: expected the corrupted prompts"),
        (lambda: patched(ids, None, ids[:, 1:]), "corrupted_ids: expected a tensor of input_ids' shape"),
        (lambda: zero(ids, None, ids), "corrupted_ids: expected none"),
        (lambda: zero(ids[0]), "input_ids: expected a tensor of shape"),
        (lambda: zero("a text"), "input_ids: expected a tensor of shape"),
        (lambda: zero(ids, torch.ones(2, 3)), "attention_mask: expected a tensor of input_ids' shape"),
        (lambda: zero(ids, torch.zeros_like(ids)), "attention_mask: expected a real token"),
        (lambda: zero(ids + VOCABULARY), "token ids below"),
        (lambda: short(wide), "at most 8 tokens, for whose positions"),
        (lambda: short.generate(ids, max_new_tokens=3), "at most 8 tokens, for whose positions"),
        (lambda: zero.generate(ids, (ids < 0).long().index_fill(1, torch.tensor([0, 1]), 1)), "padding on the left"),
        (lambda: zero.generate(ids, inputs_embeds=torch.zeros(1)), "inputs_embeds: expected none"),
        (
            lambda: zero.generate(ids, cache_implementation="static", max_new_tokens=2),
            "cache_implementation: expected 'dynamic'",
        ),
    ):
        with pytest.raises(eap.InputError, match=said):
            call()
