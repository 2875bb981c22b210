"""Models whose layers compute on different devices: the same results as on one.

The devices are pretended (`pretend.py`): an operator raises where something was not moved to the device of the rest.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import Norm, bind, device_of
from eap_circuits.forward import Batch, Constants, hooks
from eap_circuits.intervention.groups import circuit_group
from eap_circuits.recording import contraction
from eap_circuits.selfcheck import check_model
from eap_kernels.testing import relative_error
from tests.circuits.adapters.pretend import DEVICES, pretending

accelerate = pytest.importorskip("accelerate")

FIRST, SECOND = DEVICES
GRADIENTS = ["eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "eap-conductance", "eap-gp"]


def spread(model, norm=FIRST):
    """As `device_map="auto"` has it: embeddings and first layers on one device, other layers on another."""
    arch = bind(model)
    stack = arch.family.layers
    where = {f"{stack}.{i}": FIRST if i < len(arch.layers) // 2 else SECOND for i in range(len(arch.layers))}
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        outside = not any(path == each or path.startswith(each + ".") for each in where)
        if outside and not stack.startswith(path) and (not parent or stack.startswith(parent + ".")):
            where[path] = norm if module is arch.final_norm.module else FIRST
    given = {"main_device": FIRST, "skip_keys": model._skip_keys_device_placement}
    return accelerate.dispatch_model(copy.deepcopy(model), where, **given)


@pytest.fixture
def two(make_model):
    """(the model on two devices, the same on one)"""

    @contextmanager
    def make(name="gemma2", norm=FIRST):
        right = make_model(name)
        with pretending():
            yield spread(right, norm), right

    return make


def agree(found, right):
    """To float64's rounding; scores are given back in float32."""
    for x, y in zip(found, right, strict=True):
        assert relative_error(x, y) <= 1e-6


def test_scores_and_circuits(kind, two, make_pairs):
    data = make_pairs(n=4)
    with two(kind, SECOND) as models:
        found, right = (eap.attribute(model, data, heads="query", steps=2) for model in models)
        agree([found.values], [right.values])
        circuits = [right.select(n) for n in (5, 40, 70)]
        agree(*([result.values for result in eap.evaluate(model, circuits, data)] for model in models))
        first, last = bind(models[0]).layers[0], bind(models[0]).layers[-1]
        assert first.out_weight(torch.float64).device == FIRST != last.out_weight(torch.float64).device


@pytest.mark.parametrize("method", [*GRADIENTS, "information-flow-routes", "exact"])
def test_methods(method, two, make_pairs):
    data = make_pairs(n=4)
    with two() as models:
        given = {"edges": eap.attribute(models[1], data, method="eap").select(30)} if method == "exact" else {}
        agree(*([eap.attribute(model, data, method=method, steps=2, **given).values] for model in models))


@pytest.mark.parametrize(
    "settings",
    [
        {"reuse_prefix": False},
        {"compat": "eap-ig", "method": "eap-ig-activations", "steps": 2},
        {"ablation": "zero"},
        {"ablation": "mean-positional"},
        {"rules": "relp"},
        {"rules": "gim"},
    ],
)
def test_settings(settings, two, make_pairs):
    with two() as models:
        agree(*([eap.attribute(model, make_pairs(n=4), **{"method": "eap", **settings}).values] for model in models))


def test_what_is_kept_of_scores(two, make_pairs):
    keep = ("examples", "positions", "neurons")
    with two("llama") as models:
        scores = [eap.attribute(model, make_pairs(n=4), method="eap", keep=keep) for model in models]
        agree(*([s.variance, s.per_example, s.per_position, s.neurons] for s in scores))


def test_pairs_of_unequal_lengths(two):
    clean, corrupted = torch.arange(12).view(2, 6), torch.arange(14).view(2, 7) + 2
    corrupted[:, :2] = clean[:, :2]
    lengths = {"corrupted_lengths": [7, 6]}
    data = eap.PairedDataset.from_tokens(clean, corrupted, [6, 5], torch.tensor([[1, 2], [3, 4]]), **lengths)
    for name in ("gpt2", "llama"):  # learned positions are part of what the input writes
        with two(name) as models:
            scores = [eap.attribute(model, data, method="eap") for model in models]
            agree(*([s.values] for s in scores))
            agree(*([eap.evaluate(model, scores[1].select(30), data).values] for model in models))


def test_learned_constants_and_curves(two, make_pairs):
    data = make_pairs(n=4)
    with two() as models:
        scores = eap.attribute(models[1], data, method="eap")
        constants = [eap.optimal_constants(model, scores.select(30), data, steps=2) for model in models]
        agree(*(each.tensors for each in constants))
        rankings = [eap.learn_mask(model, data, start=scores, steps=2) for model in models]
        assert torch.corrcoef(torch.stack([each.values.flatten() for each in rankings]))[0, 1] > 1 - 1e-5
        # Constants know no devices: what one model gave serves the other.
        for given in ("patching", constants[0]):
            curves = [eap.faithfulness_curve(model, scores, data, (0.1, 0.5), ablation=given) for model in models]
            agree(*([torch.tensor(curve.faithfulness)] for curve in curves))


def test_self_check(two):
    with two("llama") as (model, _):
        checks = check_model(model)
        assert all(check.passed for check in checks), checks


@pytest.mark.slow
def test_discovery(two):
    with two("llama") as (model, right):
        assert eap.discover(model)[0] == eap.discover(right)[0]


def test_a_layer_on_two_devices_is_refused(make_model):
    with pretending():
        model = spread(make_model("llama"))
        model.model.layers[0].mlp.to(SECOND)
        with pytest.raises(eap.InputError, match="all of a layer on one device, found meta:0, meta:1"):
            bind(model)


def scored(model, data):
    return eap.attribute(model, data, method="eap").values


def evaluated(model, data, ablation="patching"):
    graph = bind(model).graph("kv")
    mask = graph.edge_mask & (torch.rand(graph.edge_mask.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    return eap.evaluate(model, eap.Circuit.from_mask(graph, mask), data, ablation=ablation).values


def ablated(model, data):
    return evaluated(model, data, "mean")


FAULTS = [
    (hooks, "as_given", lambda module, x: x, scored),
    (Batch, "_on", lambda batch, device, index: index, scored),
    (contraction, "_to", lambda group, where: group, scored),
    (Norm, "device", FIRST, scored),
    (circuit_group.CircuitGroup, "follow", lambda circuit, stream, device: None, evaluated),
    (Constants, "on", lambda constants, arch: constants.map(lambda x: x.to(FIRST, arch.accumulate)), ablated),
]


@pytest.mark.parametrize(("where", "name", "fault", "run"), FAULTS, ids=[f"{w.__name__}.{n}" for w, n, _, _ in FAULTS])
def test_a_tensor_that_is_not_moved_is_found(where, name, fault, run, two, make_pairs, monkeypatch):
    """So that the tests above can fail."""
    with two("llama") as (model, right):
        agree([run(model, make_pairs(n=4))], [run(right, make_pairs(n=4))])
        monkeypatch.setattr(where, name, fault)
        # By the pretended device, or by what checks an operator's arguments.
        with pytest.raises(
            (RuntimeError, ValueError), match=r"one device, found|meta:0, got meta:1|meta:1, got meta:0"
        ):
            run(model, make_pairs(n=4))


def test_a_card_that_offloading_does_not_name_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    module = torch.nn.Linear(2, 2)
    for named, found in (("cuda", 1), ("cuda:0", 0)):
        module._hf_hook = accelerate.hooks.AlignDevicesHook(named, offload=True)
        assert device_of(module) == torch.device("cuda", found)
