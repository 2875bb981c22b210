"""ACDC: edge for edge the circuit of the sequential algorithm, whatever is guessed ahead."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

import eap_circuits as eap
from eap_circuits.budget import PeakBytes
from eap_circuits.forward import batch_of, borrowed
from eap_circuits.learning import lessons, sequential
from eap_circuits.learning.lessons import prepare_lesson
from eap_circuits.request import prepare
from tests.circuits.conftest import VOCABULARY


class Stop(Exception):
    pass


def one_after_another(model, graph, data, threshold, metric="kl_divergence", **settings):
    """Algorithm 1 of the paper, one circuit at a time: (mask, objective of every circuit on the way)."""

    def objective(mask):
        return eap.evaluate(model, eap.Circuit.from_mask(graph, mask), data, metric, **settings).mean

    mask, values = graph.edge_mask.clone(), [objective(graph.edge_mask)]
    for receiver in reversed(range(graph.n_receivers)):
        for sender in reversed(range(graph.n_senders)):
            if graph.edge_mask[sender, receiver]:
                without = mask.clone()
                without[sender, receiver] = False
                value = objective(without)
                if values[-1] - value < threshold:
                    mask = without
                    values.append(value)
    return mask, values


def small(config):
    """Two layers of two heads."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = config(vocab_size=VOCABULARY, initializer_range=0.5, **size, **KINDS[config])
    return AutoModelForCausalLM.from_config(made).double().eval()


# Heads that share keys and values; attention and MLP side by side.
KINDS = {LlamaConfig: {"num_key_value_heads": 1}, GPTNeoXConfig: {"use_parallel_residual": True}}


@pytest.mark.parametrize(
    ("config", "threshold", "metric", "ablation"),
    [
        (LlamaConfig, 0.05, "kl_divergence", "patching"),
        (LlamaConfig, 0.1, "logit_diff", "mean"),
        (GPTNeoXConfig, 0.001, "kl_divergence", "patching"),
    ],
)
def test_it_is_the_circuit_of_the_sequential_algorithm(config, threshold, metric, ablation, make_pairs):
    model, data = small(config), make_pairs(seed=3, n=3)
    found = eap.acdc(model, data, threshold, metric, ablation=ablation)
    right, values = one_after_another(model, found.graph, data, threshold, metric, ablation=ablation)
    assert torch.equal(found.mask, right)
    assert 5 < found.n_edges < found.graph.n_edges - 5, "the threshold decides something"
    assert eap.evaluate(model, found, data, metric, ablation=ablation).mean == pytest.approx(values[-1], abs=1e-9)


@pytest.mark.parametrize("settings", [{"ahead": 1}, {"ahead": 200, "reuse_prefix": False}, {"memory": 0}, {"guess": 0}])
def test_guesses_and_passes_change_nothing(settings, make_model, make_pairs, monkeypatch):
    model, data = make_model("gpt2"), make_pairs(seed=4, n=3)
    right = eap.acdc(model, data, 3e-3, "kl_divergence")
    given = dict(settings)
    monkeypatch.setattr(sequential, "FEWEST_AHEAD", given.pop("ahead", 8))
    if "guess" in given:  # any guesses, wrong as they may be
        torch.manual_seed(given.pop("guess"))
        monkeypatch.setattr(sequential.torch, "ones", lambda n, dtype: torch.rand(n) < 0.5)
    found = eap.acdc(model, data, 3e-3, "kl_divergence", **given)
    assert torch.equal(found.mask, right.mask)
    if settings == {"ahead": 1}:
        assert found.info["acdc"]["circuits"] <= 2 * found.graph.n_edges
    if settings.get("ahead") == 200:
        assert found.info["acdc"]["passes"] < right.info["acdc"]["passes"]


def test_an_edge_into_a_node_that_nothing_reads_costs_nothing(make_model, make_pairs):
    """By so high a threshold all goes: only the edges into `logits` are run."""
    model, data = make_model("gpt2"), make_pairs(seed=4, n=3)
    found = eap.acdc(model, data, 1e6, "kl_divergence")
    assert found.n_edges == 0 and found.info["acdc"]["circuits"] == found.graph.n_senders


def test_it_goes_on_with_smaller_passes(make_model, make_pairs, monkeypatch):
    model, data = make_model("gpt2"), make_pairs(seed=4, n=3)
    right, real, failed = eap.acdc(model, data, 3e-2, "kl_divergence"), lessons.run_circuits, []

    def run(runner, graph, ablated, masks, tokens):
        if tokens > 4 * runner.batch.clean.numel():
            failed.append(tokens)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore lines")
        return real(runner, graph, ablated, masks, tokens)

    monkeypatch.setattr(lessons, "run_circuits", run)
    assert eap.acdc(model, data, 3e-2, "kl_divergence") == right
    # Passes stay small: they do not fail again and again.
    assert failed and len(set(failed)) == len(failed)


def test_passes_keep_to_the_budget(make_model, make_pairs):
    model, data = make_model("gpt2"), make_pairs(seed=4, n=4)
    request = prepare(model, data, "kl_divergence")
    graph = request.arch.graph("kv")
    mask = eap.random_circuit(graph, graph.n_edges // 2).mask
    with borrowed(model), torch.no_grad():
        for allowed in (1_000_000, 4_000_000):
            tokens = sequential._tokens_together(replace(request, memory=allowed), graph)
            batch = batch_of(data, torch.arange(len(data)), True, request.arch.device)
            copies = tokens // batch.clean.numel()
            with PeakBytes() as count:
                prepare_lesson(request, graph, batch).values(request, graph, [mask] * max(1, copies), tokens)
            assert copies == 0 or count.peak <= 1.1 * allowed, (tokens, copies)


def test_interrupted_it_goes_on_to_the_same_circuit(tmp_path, make_model, make_pairs, monkeypatch):
    model, data, file = make_model("gpt2"), make_pairs(seed=4, n=4), tmp_path / "acdc.safetensors"
    right, seen = eap.acdc(model, data, 1e-3, "kl_divergence"), []
    monkeypatch.setattr("eap_circuits.checkpoint.file.SECONDS_BETWEEN_SAVES", 0.0)

    def stop(done, of):
        seen.append(done)
        if len(seen) == 3:
            raise Stop

    with pytest.raises(Stop):
        eap.acdc(model, data, 1e-3, "kl_divergence", checkpoint=file, progress=stop)
    found = eap.acdc(model, data, 1e-3, "kl_divergence", checkpoint=file, progress=stop)
    assert found == right and found.info["acdc"] == right.info["acdc"]
    assert seen == sorted(seen) and seen[-1] == right.graph.n_edges
    with pytest.raises(eap.InputError, match="expected a checkpoint"):
        eap.acdc(model, data, 2e-3, "kl_divergence", checkpoint=file)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"threshold": 0}, "threshold: expected a positive number, found 0"),
        ({"threshold": float("nan")}, "threshold: expected a positive number"),
        ({"threshold": "0.1"}, "threshold: expected a positive number"),
        ({"metric": "logits"}, "metric: expected"),
        ({"heads": "all"}, "heads: expected"),
        ({"ablation": "optimal"}, "ablation: expected constants from eap.optimal_constants"),
        ({"data": "ioi"}, "data: expected"),
    ],
)
def test_what_cannot_be_is_refused(given, words, make_model, make_pairs):
    asked = {"data": make_pairs(n=2), "threshold": 0.1, **given}
    with pytest.raises(eap.InputError, match=words):
        eap.acdc(make_model("gpt2"), **asked)
