"""Attribution and evaluation of random models of well-known shapes against their own passes; needs no weights.

Prompts differ from their first token on, so there is no prefix to reuse. The large model runs only on a GPU.
"""

import gc
from functools import partial
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import eap_circuits as eap
from bench.circuits import passes
from bench.measure import DEVICE, PRETENDED, peak_bytes
from eap_circuits.budget import replays
from eap_kernels import _auto

STEPS = 5
GB = 10**9
# The settings of a shape that differ from its architecture's defaults, and its dtype.
SHAPES = {
    "gpt2": ("gpt2", {"n_layer": 2 if PRETENDED else 12}, torch.float32),
    "llama-3.1-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 2 if PRETENDED else 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_theta": 500000.0,
        },
        torch.bfloat16,
    ),
}
# On a GPU nothing else runs, and a call of the large shape takes seconds.
TIMING = {"rounds": 1 if DEVICE == "cuda" else 3}
# As many circuits as a curve has, from one edge in a hundred to nine in ten.
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9)
# shape, prompts, tokens each, the most bytes in all, and the least ratio of the floor's time to ours
CASES = {"gpt2": ("gpt2", 64 if DEVICE == "cuda" else 16, 20, None, 1 / 1.2)}
if DEVICE == "cuda":
    # What was measured fastest, and what runs without a measurement. Cases of a model follow one another, the most
    # wanted first: to make the large one and to read its weights for the first time takes seconds.
    large = "llama-3.1-8b", 16, 128, None, 1 / 1.1
    cases = {
        "llama-3.1-8b": large,
        "llama-3.1-8b-short": ("llama-3.1-8b", 16, 20, None, 1 / 1.2),
        # What little there is beside the model makes batches small.
        "llama-3.1-8b-24gb": ("llama-3.1-8b", 16, 128, 24 * GB, 1 / 1.5),
        "llama-3.1-8b-reference": large,
    }
    CASES = {**cases, **CASES, "gpt2-reference": CASES["gpt2"]}


@pytest.fixture(scope="module")
def random_model():
    """random_model(shape): one model at a time."""
    held = {}

    def make(shape):
        if shape not in held:
            held.clear()
            gc.collect()
            kind, settings, dtype = SHAPES[shape]
            with torch.device(DEVICE):
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=dtype)
            held[shape] = model.eval().requires_grad_(False)
        return held[shape]

    return make


@pytest.mark.skipif(DEVICE != "cuda", reason="bench_attribute.py evaluates a curve on a CPU")
@pytest.mark.parametrize("shape", ["gpt2", "llama-3.1-8b"])
def test_shape_over_floor_of_evaluation(in_turns, random_model, shape):
    """Ten circuits; the floor is a forward over the corrupted prompts, and one over all circuits and the clean run."""
    model = random_model(shape)
    data = passes.random_pairs(model, 16, 20)
    scores = eap.attribute(model, data, method="eap", reuse_prefix=False)
    circuits = [scores.select(int(share * scores.graph.n_edges)) for share in SHARES]
    copies = data[list(range(len(data))) * (1 + len(circuits))]

    def own_passes():
        passes.forward(model, data)
        passes.forward(model, copies)

    runs = {"evaluate": lambda: eap.evaluate(model, circuits, data, reuse_prefix=False), "floor": own_passes}
    in_turns(
        runs,
        lambda seconds: {"speedup": seconds["floor"] / seconds["evaluate"]},
        {"speedup": 1 / 3},
        timing=TIMING,
        model=shape,
        call=f"evaluate, {len(circuits)} circuits",
        examples=16,
        tokens=20,
    )


@pytest.mark.parametrize("case", CASES)
def test_shape_over_floor(in_turns, random_model, monkeypatch, case):
    shape, examples, tokens, most, at_least = CASES[case]
    if case.endswith("reference"):
        monkeypatch.setattr(_auto, "choose", lambda *_: _auto.Choice("reference", "as without a measurement"))
    model = random_model(shape)
    data = passes.random_pairs(model, examples, tokens)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    memory = None if most is None else most - weights
    peaks = []

    def attribute():
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()  # also what the cache is flushed with
        eap.attribute(model, data, steps=STEPS, reuse_prefix=False, memory=memory)
        if DEVICE == "cuda":
            peaks.append(weights + torch.cuda.max_memory_allocated() - before)

    def ratios(seconds):
        found = {"speedup": seconds["floor"] / seconds["attribute"]}
        return found if most is None else {**found, "memory": most / max(peaks)}

    bars = {"speedup": at_least} if most is None else {"speedup": at_least, "memory": 1.0}
    runs = {"attribute": attribute, "floor": lambda: passes.floor(model, data, STEPS)}
    in_turns(
        runs,
        ratios,
        bars,
        timing=TIMING,
        model=case,
        call=f"attribute, M = {STEPS}",
        examples=examples,
        tokens=tokens,
    )


@pytest.mark.skipif(DEVICE != "cuda", reason="passes are captured on a GPU only")
@pytest.mark.parametrize("call", ["attribute", "evaluate"])
def test_shape_replayed(in_turns, random_model, call):
    """Many small batches, whose passes are replayed from a CUDA graph, against the same batches as ever."""
    model = random_model("gpt2")
    data = passes.random_pairs(model, 16 if PRETENDED else 64, 20)
    attribute = partial(eap.attribute, model, data, method="eap", batch_size=2, reuse_prefix=False)
    scores = attribute()
    circuits = [scores.select(int(share * scores.graph.n_edges)) for share in SHARES[:3]]
    run = attribute if call == "attribute" else partial(eap.evaluate, model, circuits, data, batch_size=2)
    found = run()

    def as_ever():
        with mock.patch.object(replays, "FEWEST", len(data)):
            run()

    in_turns(
        {"replayed": run, "as ever": as_ever},
        lambda seconds: {"speedup": seconds["as ever"] / seconds["replayed"]},
        {"speedup": 1.0},
        timing=TIMING,
        call=call,
        said=(found[0] if isinstance(found, list) else found).info["replayed"],
    )


@pytest.mark.skipif(DEVICE != "cuda", reason="a model of 16 GB and 16k tokens")
def test_large_data_fit(benchmark, hold, random_model):
    """128 prompts of 128 tokens of the 8B shape in the 80 GB of a card, weights included, whatever card it is."""
    model = random_model("llama-3.1-8b")
    data = passes.random_pairs(model, 128, 128)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())

    def measured():
        call = partial(eap.attribute, model, data, steps=STEPS, memory=80 * GB - weights, reuse_prefix=False)
        peak = weights + peak_bytes(call)
        return {"memory": 80 * GB / peak}, {"bytes": peak}

    benchmark.pedantic(lambda: None)
    hold(measured, {"memory": 1.0}, tries=1, device=DEVICE)
