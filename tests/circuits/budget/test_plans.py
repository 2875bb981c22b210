"""Plans: the operations and the time that they name, and plans for machines that are not at hand."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.methods.gradient import method as gradient
from eap_circuits.report.tables import duration, plan_table
from tests.circuits.conftest import pairs_for


def equal_pairs():
    """Prompts of one length that differ from the first token on, so that every pass runs all of them."""
    clean = torch.randint(0, 59, (6, 9), generator=torch.Generator().manual_seed(1))
    answers = torch.arange(12).view(6, 2)
    return eap.PairedDataset.from_tokens(clean, (clean + 7) % 59, torch.full((6,), 9), answers)


@pytest.mark.parametrize("settings", [{}, {"method": "eap-ig-activations", "steps": 2}, {"method": "eap"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_operations_are_those_that_a_run_is_counted_to_make(kind, settings, make_model):
    """Counted by torch, where attention is made of products. A run whose path has the clean prompts saves a forward,
    and there are some products of its own."""
    model, data = make_model(kind, torch.float32, attn_implementation="eager"), equal_pairs()
    plan = eap.plan(model, data, batch_size=6, **settings)
    with FlopCounterMode(display=False) as count:
        eap.attribute(model, data, batch_size=6, **settings)
    assert 0.97 < plan.passes / count.get_total_flops() < 1.12


def test_fused_attention_counts_like_products(make_model, make_pairs):
    model, data = (
        (make_model("llama", torch.float32, attn_implementation=kind) for kind in ("eager", "sdpa")),
        make_pairs(),
    )
    eager, fused = (eap.plan(each, data, batch_size=2).passes for each in model)
    assert fused == pytest.approx(eager, rel=0.05)


def test_weights_and_time_of_a_plan_for_gpus(make_model, make_pairs):
    model, data = make_model("llama", torch.bfloat16), make_pairs()
    with_weights = eap.plan(model, data, device="cuda", memory="1GiB", gpus=2)
    plan = eap.plan(copy.deepcopy(model).to("meta"), data, device="cuda", memory="1GiB", gpus=2)
    assert plan == with_weights
    assert plan.weights == sum(x.nbytes for x in {*model.parameters(), *model.buffers()})
    assert plan.device == "cuda" and plan.gpus == 2 and plan.budget == 2**30
    seconds = plan.passes / plan.rates.passes + plan.contraction / plan.rates.contraction
    assert plan.seconds == pytest.approx(seconds / 2)
    here = eap.plan(model, data, memory="1GiB")
    assert here.device == "cpu" and here.gpus == 1 and here.seconds is None and here.rates is None
    assert plan.tokens == 8 * here.tokens and plan.passes == here.passes
    # On a GPU, senders meet receivers in bfloat16, and their rows count.
    shapes = [(examples, suffix) for examples, suffix, _ in plan.batches]
    assert shapes == [(examples, suffix) for examples, suffix, _ in here.batches]
    graph = bind(model).graph("kv")
    row = (graph.n_senders + graph.n_receivers) * graph.d_model * 2
    assert plan.bytes - sum(examples * suffix * row for examples, suffix in shapes) < here.bytes
    wide = eap.plan(make_model("llama", torch.float32), data, device="cuda", memory="1GiB")
    assert wide.rates.passes < plan.rates.passes


@pytest.mark.parametrize("kind", ["llama", "gpt-neox"])
def test_the_contraction_is_one_product_of_every_edge_and_of_what_norms_read(kind, make_model, make_pairs):
    model, data = make_model(kind), make_pairs(n=3)
    plan = eap.plan(model, data, steps=4)
    graph = eap.attribute(model, data, method="eap").graph
    norms = {}  # what a norm's readers see; in parallel layers there may be two norms all the same
    for layer in range(graph.n_layers):
        norms[layer, "attention"], norms[layer, "mlp"] = graph.reach_at(layer, "q"), graph.reach_at(layer, "mlp")
    pairs = graph.n_edges + 4 * (sum(norms.values()) + graph.n_senders)
    tokens = sum(examples * suffix for examples, suffix, _ in plan.batches)
    assert plan.contraction == 2 * graph.d_model * pairs * tokens


def test_prompts_of_many_lengths_are_planned_from_few_runs(make_model, monkeypatch):
    generator = torch.Generator().manual_seed(2)
    clean = torch.randint(0, 59, (24, 40), generator=generator)
    corrupted, pairs = clean.clone(), torch.arange(24)
    first = torch.randint(2, 8, (24,), generator=generator)
    corrupted[pairs, first] = (clean[pairs, first] + 1) % 59
    lengths = torch.randint(20, 41, (24,), generator=generator)
    data = eap.PairedDataset.from_tokens(clean, corrupted, lengths, torch.tensor([[1, 2]]).expand(24, -1))
    model, runs = make_model("llama", torch.float32), []
    once = gradient.GradientMethod._cost
    monkeypatch.setattr(gradient.GradientMethod, "_cost", lambda *of: runs.append(1) or once(*of))
    monkeypatch.setattr(gradient, "most_tokens", lambda kind: 200)
    found, few = eap.plan(model, data), len(runs)
    monkeypatch.setattr(gradient, "_ALIKE", 2.0)  # every length is measured
    right = eap.plan(model, data)
    assert few < 4 < len(runs) - few
    assert found.batches == right.batches and found.tokens == right.tokens
    assert found.bytes == pytest.approx(right.bytes, rel=0.05)
    # Attention grows with the square of the tokens, and in so narrow a model it counts.
    assert found.passes == pytest.approx(right.passes, rel=0.1)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device": "tpu", "memory": 1}, "device: expected one of 'cpu', 'cuda', found 'tpu'"),
        ({"device": 3.5, "memory": 1}, "device: expected one of 'cpu', 'cuda', found"),
        ({"device": "cuda", "memory": "1GiB", "gpus": 0}, "gpus: expected a whole number"),
        ({"gpus": 2}, "gpus: expected 1, except for device='cuda', found 2."),
        ({"device": "cpu", "gpus": 2}, "gpus: expected 1, except for device='cuda', found 2."),
        ({"device": "cuda"}, "memory: expected what the run may take on each GPU"),
    ],
)
def test_plans_that_cannot_be_made(asked, message, make_model, make_pairs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(eap.InputError, match=re.escape(message)):
        eap.plan(make_model("llama"), make_pairs(), **asked)


@pytest.mark.parametrize(
    ("family", "gpus", "message"),
    [
        ("llama", 4, "LlamaDecoderLayer's heads: expected as many on each of 4 ranks, found 2."),
        ("gpt2", 2, "GPT2LMHeadModel: expected a tp_plan in transformers, to be divided among 2 ranks, found none for"),
        ("t5", 2, "T5ForConditionalGeneration: expected whole weights of an encoder-decoder, found parts of them on 2"),
    ],
)
def test_what_a_run_on_parts_would_refuse_is_not_planned(family, gpus, message, make_model):
    """The first sentence is a run's (`tests/circuits/ranks/parts.py`); the others transformers does not divide."""
    with pytest.raises(eap.InputError, match=re.escape(message)):
        eap.plan(make_model(family), pairs_for(family), device="cuda", memory="1GiB", gpus=gpus)


def test_a_run_that_does_not_fit_is_said(make_model, make_pairs):
    with pytest.warns(UserWarning, match="plan: expected a run within 1,000 bytes, found that one example"):
        plan = eap.plan(make_model("llama"), make_pairs(), memory=1000)
    assert plan.bytes > plan.budget


def test_command(tmp_path, make_model, make_pairs, monkeypatch):
    model, data = make_model("llama", torch.float32), make_pairs()
    monkeypatch.setattr("eap_circuits.adapters.pretrained.load_model", lambda name, **_: (model, None))
    data.save(tmp_path / "pairs.safetensors")
    command = ["attribute", "tiny", "--data", str(tmp_path / "pairs.safetensors"), "--gpus", "2", "--device", "cuda"]
    from eap_circuits.cli import app

    result = CliRunner().invoke(app, [*command, "--dry-run", "--memory", "1GiB", "--json"])
    assert result.exit_code == 0, result.stderr
    found, plan = json.loads(result.stdout), eap.plan(model, data, device="cuda", gpus=2, memory="1GiB")
    assert found["gpus"] == 2 and found["seconds"] == plan.seconds and found["weights"] == plan.weights
    assert "on each of 2 GPUs" in plan_table(plan).title and "26 TFLOP/s" in plan_table(plan).title
    assert "--gpus: expected --dry-run with it" in CliRunner().invoke(app, command).stderr


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.256, "0.26 s"), (39.04, "39 s"), (119, "119 s"), (720, "12 min"), (12_240, "3.4 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
