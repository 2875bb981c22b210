"""The last layer's MLP runs where logits are scored: no score or metric can tell."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.forward import Runner
from eap_circuits.request import asked
from tests.circuits.conftest import watch

# With a norm behind, flattened tokens, the residual stream in the module, and more than one output among them.
KINDS = ["bloom", "falcon", "gemma2", "gpt2", "olmo2", "opt", "qwen3-moe"]


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize(
    ("method", "kind"),
    [("eap-ig-activations", "gemma2"), ("eap-conductance", "gemma2"), *(("eap-ig-inputs", kind) for kind in KINDS)],
)
def test_scores_are_those_of_an_mlp_that_runs_everywhere(
    method, reuse_prefix, kind, make_model, make_pairs, monkeypatch
):
    model, data = make_model(kind), make_pairs()
    score = partial(
        eap.attribute, model, data, method=method, steps=2, reuse_prefix=reuse_prefix, keep=("examples", "positions")
    )
    found = score()
    monkeypatch.setattr(asked, "Runner", partial(Runner, every_mlp=True))
    right = score()
    torch.testing.assert_close(found.values, right.values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.statistics(), right.statistics(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_once_for_each_row(kind, make_model, make_pairs):
    """Over the corrupted prompts, the path points and the circuits, however the model shapes its tokens."""
    model, data = make_model(kind), make_pairs()
    last, width = bind(model).layers[-1].mlp_out, model.config.get_text_config().hidden_size
    seen = []

    def count(output, *_, **__):
        seen.append((output[0] if isinstance(output, tuple) else output).numel() // width)

    watch(last, count)
    eap.attribute(model, data, method="eap", reuse_prefix=False)  # a first call looks at one prompt besides
    seen.clear()
    scores = eap.attribute(model, data, steps=3, reuse_prefix=False)
    assert sum(seen) == 4 * len(data)
    seen.clear()
    eap.evaluate(model, scores.select(scores.graph.n_edges // 2), data, reuse_prefix=False)
    assert sum(seen) <= 3 * len(data)
