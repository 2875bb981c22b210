"""Every long call, on a tiny model, as a function of (progress, checkpoint) that gives all its numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import eap_circuits as eap
from eap_circuits.evaluation import optimal_constants

SIZE = {"batch_size": 2}


def numbers(result: Any) -> list[torch.Tensor]:
    """All numbers of a result."""
    if isinstance(result, eap.EdgeScores):
        kept = (result.values, result.variance, result.per_example, result.per_position, result.neurons)
        return [x for x in kept if x is not None]
    if isinstance(result, eap.Circuit):
        return [result.mask]
    if isinstance(result, list):
        return [x for each in result for x in numbers(each)]
    if isinstance(result, eap.Curve):
        return numbers([*result.results, *(each for row in result.baselines["random"].results for each in row)])
    if isinstance(result, eap.FaithfulnessCard):
        beside = [each for baseline in result.beside.values() for row in baseline.results for each in row]
        return [torch.tensor(list(result.cost.values())), *numbers([result.result, *result.others.values(), *beside])]
    if hasattr(result, "tensors"):
        return result.tensors
    return [result.values, result.clean_values, result.corrupted_values]


def long_calls(model: Any, data: Any) -> dict[str, Callable[..., Any]]:
    """By name; each takes `progress` and `checkpoint` by name."""
    scores = eap.attribute(model, data[:2], method="eap")
    circuit, few = scores.select(12), scores.select(4, prune=False)
    attribute = partial(eap.attribute, model, data, **SIZE)
    kept = {"keep": ["examples", "positions", "neurons"]}
    return {
        "eap": partial(attribute, method="eap", **kept),
        "eap-ig-inputs": partial(attribute, steps=2, keep="positions"),
        "eap-ig-activations": partial(attribute, method="eap-ig-activations", steps=1, ablation="zero"),
        "clean-corrupted": partial(attribute, method="clean-corrupted", ablation="mean"),
        "eap-conductance": partial(attribute, method="eap-conductance", steps=1, keep="variance"),
        "eap-gp": partial(attribute, method="eap-gp", steps=2),
        "information-flow-routes": partial(attribute, method="information-flow-routes"),
        "exact": partial(attribute, method="exact", edges=few, keep="examples"),
        "evaluate": partial(eap.evaluate, model, [circuit, few], data, **SIZE),
        "evaluate-mean": partial(eap.evaluate, model, circuit, data, ablation="mean-positional", **SIZE),
        "curve": partial(
            eap.faithfulness_curve, model, scores, data, (0.1, 0.5), baselines=["random"], seeds=[0], **SIZE
        ),
        "card": partial(
            eap.faithfulness_card, model, circuit, data[:3], others={"a": data[1:], "b": data}, most_edges=2, **SIZE
        ),
        "learn_mask": partial(eap.learn_mask, model, data, start=scores, steps=3, examples=2),
        "ibcircuit": partial(eap.ibcircuit, model, data, steps=3, examples=2),
        "prune_gradually": partial(eap.prune_gradually, model, data, start=scores, keep=0.5, n_edges=(3, 60)),
        "refine": partial(eap.refine, model, eap.random_circuit(scores.graph, 30), data, rounds=4),
        "optimal_constants": partial(optimal_constants, model, circuit, data, steps=3, **SIZE),
    }
