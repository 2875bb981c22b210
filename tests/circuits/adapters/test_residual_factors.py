"""Sums in which the residual stream and a block's output have factors: scores are those without any."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import FAMILIES, bind
from eap_circuits.selfcheck import StayDouble
from eap_kernels.testing import relative_error
from tests.circuits.conftest import pairs_for, random_circuit, tiny_model


@pytest.mark.parametrize("method", ["eap-ig-inputs", "eap-ig-activations", "information-flow-routes", "exact"])
def test_factors_change_no_score_and_no_circuit(method, monkeypatch):
    """Beam's n-th sum makes x·√((n-1)/n) + y·√(1/n) of a stream x and an output y. So if sums are plain, the stream is
    √n times as large, and a norm of it gives the same with n times the eps."""
    model, data = tiny_model("beam"), pairs_for("beam")
    circuit = random_circuit(bind(model).graph("kv"), 0, 0.6)

    def results():
        with StayDouble():
            return eap.attribute(model, data, method=method), eap.evaluate(model, circuit, data, ablation="mean")

    scores, values = results()
    norms = [norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm)]
    for n, norm in enumerate([*norms, model.model.norm], 1):
        norm.variance_epsilon *= n
    room = importlib.import_module(type(model).__module__)
    monkeypatch.setattr(room, "depth_scaled_residual_add", lambda y, x, n: x + y)
    monkeypatch.setitem(FAMILIES, "beam", replace(FAMILIES["beam"], residual_factors=None))
    right, right_values = results()
    assert relative_error(scores.values, right.values) < 1e-5  # values are float32
    torch.testing.assert_close(values.values, right_values.values)
