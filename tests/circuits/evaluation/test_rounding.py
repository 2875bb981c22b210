"""Where the model's and the ablated run's means differ by rounding alone, there is no faithfulness."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import eap_circuits as eap
from eap_circuits.errors import InputWarning

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def curve_and_warnings(model, data, **options):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scores = eap.attribute(model, data, method="eap", **options)
        curve = eap.faithfulness_curve(model, scores, data, (0.1, 0.5, 1.0), **options)
    return curve, [str(each.message) for each in said if issubclass(each.category, InputWarning)]


def blind(model):
    """The model with attention that writes nothing: earlier tokens are never seen at the last one."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    return model


def early(data):
    """Pairs that differ in their first token only."""
    corrupted = data.clean.clone()
    corrupted[:, 0] = (data.clean[:, 0] + 1) % 50
    return eap.PairedDataset.from_tokens(data.clean, corrupted, data.lengths, data.answers)


def doubled(data):
    """Each pair also the other way round: the means are equal except for the order of their sums."""
    both = [torch.cat(pair) for pair in ((data.clean, data.corrupted), (data.corrupted, data.clean))]
    return eap.PairedDataset.from_tokens(*both, data.lengths.repeat(2), data.answers.repeat(2, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["logit_diff", "prob_diff", lambda logits, batch: logits.float().amax(1)])
@pytest.mark.parametrize("made", ["unseen", "swapped"])
def test_rounding_has_no_faithfulness(made, metric, dtype, make_model, make_pairs):
    model = make_model("llama", dtype)
    model, data = (blind(model), early(make_pairs())) if made == "unseen" else (model, doubled(make_pairs()))
    for batch_size in (None, 3):
        curve, said = curve_and_warnings(model, data, metric=metric, batch_size=batch_size)
        assert all(map(math.isnan, (*curve.faithfulness, curve.cpr, curve.cmd)))
        assert len(said) == 1 and said[0].startswith("Faithfulness is undefined (nan): the mean metrics")
    comparison = eap.compare(model, curve.circuits[0], curve.circuits[1], data, data, metric=metric)
    assert all(math.isnan(value) for row in comparison.faithfulness for value in row)


@pytest.mark.parametrize(
    ("metric", "dtype"),
    [(metric, dtype) for metric in ("logit_diff", "prob_diff", "kl_divergence") for dtype in DTYPES[::2]]
    + [("logit_diff", torch.bfloat16)],
)
def test_what_the_model_tells_apart_has_one(metric, dtype, make_model, make_pairs):
    model, data = make_model("llama", dtype), make_pairs()
    circuit = eap.attribute(model, data, method="eap").select(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        result = eap.evaluate(model, circuit, data, metric)
    assert math.isfinite(result.faithfulness)
    assert abs(result.clean - result.corrupted) > 5 * result.rounding


def test_rounding_is_about_as_large_as_it_is(make_model, make_pairs):
    """The means of a model in half precision lie about as far from those in float64 as is said."""
    data, ratios = make_pairs(n=40), []
    for name in ("llama", "gpt2", "gpt-neox", "qwen3-moe"):
        model = make_model(name, torch.bfloat16)
        circuit = eap.Circuit.from_mask(graph := eap.attribute(model, data, method="eap").graph, graph.edge_mask)
        low, right = eap.evaluate(model, circuit, data), eap.evaluate(model.double(), circuit, data)
        errors = torch.stack([low.clean_values - right.clean_values, low.corrupted_values - right.corrupted_values])
        ratios.append(float(errors.square().sum(0).mean().sqrt()) / 2 / low.rounding)
        # A processor that emulates products in bf16 rounds their sums, too, and so the examples' metrics more.
        said = low.rounding * max(1.0, ratios[-1])
        assert abs((low.clean - low.corrupted) - (right.clean - right.corrupted)) < said
    assert min(ratios) > 0.2 and max(ratios) < 4
