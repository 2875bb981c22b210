"""SmolLM2 on IOI, and the floor: the passes of the model itself that attribution cannot do without."""

import ctypes
import gc
import re
from pathlib import Path

import pytest
import torch

import eap_circuits as eap


def resident(field):
    """Bytes of this process: field VmRSS now, VmHWM at their highest since that was last reset."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.fixture(scope="session")
def without_model():
    """Resident bytes before the model is there: the interpreter and its libraries."""
    import transformers  # noqa: F401 - part of what is there before

    return resident("VmRSS")


@pytest.fixture(scope="session")
def peak_memory(without_model):
    """peak_memory(run): the most bytes resident during a second call, less what was there before the model."""

    def measure(run):
        run()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        run()
        return resident("VmHWM") - without_model

    return measure


@pytest.fixture(scope="session")
def model_and_data(without_model):
    from eap_circuits.adapters import load_model

    model, tokenizer = load_model("smollm2", device="cpu")
    return model, eap.load_task("ioi", tokenizer, n=16, seed=0)


@pytest.fixture(scope="session")
def by_length(model_and_data):
    """The prompts without padding: (clean, corrupted, answers) of each length."""
    _, data = model_and_data
    groups = []
    for length in data.lengths.unique().tolist():
        rows = data.lengths == length
        groups.append((data.clean[rows, :length], data.corrupted[rows, :length], data.answers[rows]))
    return groups


@pytest.fixture(scope="session")
def forward(model_and_data, by_length):
    """One plain forward of the clean prompts, logits only where scored."""
    model, _ = model_and_data

    def run():
        with torch.no_grad():
            for clean, _, _ in by_length:
                model(clean, logits_to_keep=1, use_cache=False)

    return run


@pytest.fixture(scope="session")
def floor(model_and_data, by_length):
    """2 forwards and `steps` forwards and backwards to the input embeddings, weights frozen, logits where scored."""
    model, _ = model_and_data
    model.requires_grad_(False)
    embed = model.get_input_embeddings()

    def run(steps):
        for clean, corrupted, answers in by_length:
            with torch.no_grad():
                model(clean, logits_to_keep=1, use_cache=False)
                model(corrupted, logits_to_keep=1, use_cache=False)
            for _ in range(steps):
                point = embed(clean).requires_grad_(True)
                logits = model(inputs_embeds=point, logits_to_keep=1, use_cache=False).logits[:, -1]
                good, bad = logits.gather(1, answers).unbind(1)
                (bad - good).sum().backward()

    return run
