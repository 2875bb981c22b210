"""Prefixes behind which a model's cache holds states: scores and what circuits give are as if all tokens ran."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import cache_utils

import eap_circuits as eap
from eap_circuits.methods import METHODS
from eap_circuits.selfcheck import StayDouble
from tests.circuits.conftest import tiny_model, watch
from tests.circuits.forward.test_prefix import pairs

# A state space, a gated delta rule, a short convolution, and a state space beside attention.
EACH_STATE = ["mamba2", "qwen3-next", "lfm2", "falcon-h1"]
pytestmark = pytest.mark.skipif(
    not hasattr(cache_utils, "LinearAttentionLayer"), reason="only since transformers has caches that hold states"
)
NOT_REUSED = "prefixes are not reused, as its cache cannot serve"


def from_any_token():
    """Prefixes of 0 to 8 tokens."""
    data = pairs(5, 3)
    corrupted = data.clean.clone()
    for row, token in enumerate([0, 1, 5, 8, 3, 1]):
        corrupted[row, token] = (data.clean[row, token] + 1) % 53
    return eap.PairedDataset.from_tokens(data.clean, corrupted, data.lengths, data.answers)


def from_the_last_token():
    """A single token would do behind each prefix, but for that some models change states in place."""
    data = pairs(5, 3)
    corrupted, last = data.clean.clone(), (torch.arange(len(data)), data.lengths - 1)
    corrupted[last] = (data.clean[last] + 1) % 53
    return eap.PairedDataset.from_tokens(data.clean, corrupted, data.lengths, data.answers)


def is_as_without(model, data, relative, method="eap-ig-inputs", heads="kv"):
    """Prefixes are reused, and nothing changes by it."""
    settings = {"method": method, "heads": heads, "steps": 2}
    with StayDouble(), warnings.catch_warnings():
        warnings.simplefilter("error")
        alone, plain = (eap.attribute(model, data, reuse_prefix=reuse, **settings) for reuse in (True, False))
        circuits = [plain.select(n_edges=plain.graph.n_edges // n) for n in (2, 3)]
        pairs_of = (eap.evaluate(model, circuits, data, reuse_prefix=reuse) for reuse in (True, False))
        for found, right in zip(*pairs_of, strict=True):
            for name in ("values", "clean_values", "corrupted_values"):
                assert relative(getattr(found, name), getattr(right, name)) < 1e-10
    assert relative(alone.values, plain.values) < 1e-6  # which are kept in float32


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.reuses])
@pytest.mark.parametrize("kind", EACH_STATE)
def test_every_method_goes_on_from_states(kind, method, relative):
    is_as_without(tiny_model(kind), from_any_token(), relative, method)


@pytest.mark.parametrize("kind", ["bamba", "nemotron-h", "qwen3-5", *EACH_STATE])
def test_no_pass_runs_a_single_token(kind, relative):
    is_as_without(tiny_model(kind), from_the_last_token(), relative, heads="query")


def test_only_tokens_behind_prefixes_run_in_passes_with_gradients():
    model, data, seen = tiny_model("qwen3-next"), pairs(9, 3), []
    watch(model.model.layers[0], lambda _, x, **__: seen.append((x.shape[1], torch.is_grad_enabled())))
    eap.attribute(model, data, steps=2)
    seen.clear()  # of the first call, which looks whether the table fits
    eap.attribute(model, data, steps=2)
    assert max(tokens for tokens, gradients in seen if gradients) == int((data.lengths - data.first_difference).max())


@pytest.mark.parametrize("kind", ["jamba", "mamba"])
def test_a_scan_that_begins_anew_is_not_gone_on_with(kind, relative):
    """The scan of Mamba-1 takes no state with several tokens, which shows in the trial, and a warning says so."""
    model, data = tiny_model(kind), from_any_token()
    right = eap.attribute(model, data, reuse_prefix=False).values
    with pytest.warns(UserWarning, match=f"{NOT_REUSED} .*keeps states, from which the model does not go on"):
        assert relative(eap.attribute(model, data).values, right) < 1e-6
