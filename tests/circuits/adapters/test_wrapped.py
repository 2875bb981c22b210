"""What users put in, on and around a model's modules: right, or refused before any work, and left as it was."""

from __future__ import annotations

import copy
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import AutoConfig, AutoModelForCausalLM

import eap_circuits as eap
from eap_circuits.adapters import bind, linear_weight
from eap_circuits.selfcheck import check_model
from tests.circuits.adapters.test_wrappers import LowRank, agree
from tests.circuits.conftest import tiny_model
from tests.circuits.untouched import differences, snapshot

QUERIES_TO_VALUES = ("q_proj", "k_proj", "v_proj")


def refused(model, data, match):
    """By whatever comes to it first, with a circuit chosen before."""
    graph = bind(model).graph("kv")
    circuit = eap.Circuit.from_mask(graph, graph.edge_mask)
    with pytest.raises(eap.InputError, match=match):
        eap.attribute(model, data)
    with pytest.raises(eap.InputError, match=match):
        eap.evaluate(model, circuit, data)
    with pytest.raises(eap.InputError, match=match):
        eap.circuit_model(model, circuit, "zero")(data.clean)


def each_projection(model, change, names=(*QUERIES_TO_VALUES, "o_proj")):
    for layer in model.model.layers:
        for name in names:
            change(layer.self_attn, name)


def scaled(self, x):
    return nn.functional.linear(x, 1.5 * self.weight, self.bias)


@pytest.mark.parametrize("names", [QUERIES_TO_VALUES, ("o_proj",)])
def test_a_forward_in_the_place_of_a_projections_own_is_what_counts(names, make_model, make_pairs, relative):
    model, right = make_model("llama"), make_model("llama")

    def put(attention, name):
        module = getattr(attention, name)
        module.forward = MethodType(scaled, module)

    each_projection(model, put, names)
    each_projection(right, lambda attention, name: getattr(attention, name).weight.data.mul_(1.5), names)
    agree(model, right, make_pairs(), relative)
    assert all(check.passed for check in check_model(model))


@pytest.mark.parametrize("factor", [1, 2])
def test_a_forward_in_the_place_of_a_norms_own_has_to_do_what_that_does(factor, make_model, make_pairs, relative):
    def forward(self, x):
        return factor * self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    model = make_model("llama")
    norm = model.model.layers[1].input_layernorm
    norm.forward = MethodType(forward, norm)
    if factor == 1:
        agree(model, make_model("llama"), make_pairs(), relative)
    else:
        with pytest.raises(eap.InputError, match="LlamaRMSNorm: expected a forward that computes what its class's"):
            eap.attribute(model, make_pairs())


class Around(nn.Module):
    """A module in the place of a linear layer, which does something to what that gives."""

    def __init__(self, base, change):
        super().__init__()
        self.base, self.change = base, change
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x):
        return self.change(self.base(x))


class OtherGradient(torch.autograd.Function):
    """As of a kernel whose backward is wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class NoGradient(torch.autograd.Function):
    """As of a kernel for inference."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("the derivative for 'packed_mm' is not implemented")


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj"])
def test_projections_that_are_not_linear_are_refused(name, make_model, make_pairs):
    model = make_model("llama")
    each_projection(
        model, lambda attention, x: setattr(attention, x, Around(getattr(attention, x), torch.tanh)), [name]
    )
    refused(model, make_pairs(n=3), rf"LlamaForCausalLM.model.layers.0.self_attn.{name}: expected a linear layer, as")


@pytest.mark.parametrize("path", ["self_attn.k_proj", "mlp.up_proj"])
def test_linear_layers_with_gradients_of_something_else_are_refused(path, make_model, make_pairs):
    model = make_model("llama")
    where, _, name = path.rpartition(".")
    owner = model.model.layers[1].get_submodule(where)
    setattr(owner, name, Around(getattr(owner, name), OtherGradient.apply))
    refused(
        model, make_pairs(n=3), rf"model.layers.1.{path}: expected the gradients of what it computes, found others, 0"
    )


def test_what_is_not_linear_in_mlps_is_part_of_them(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=3)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Around(mlp.up_proj, torch.tanh)
    assert all(check.passed for check in check_model(model))
    assert eap.attribute(model, data).values.isfinite().all()


def test_layers_without_gradients_run_in_circuits_alone(make_model, make_pairs):
    model, right, data = make_model("llama"), make_model("llama"), make_pairs(n=3)
    each_projection(model, lambda owner, name: setattr(owner, name, Around(getattr(owner, name), NoGradient.apply)))
    with pytest.raises(
        eap.InputError, match=r"model: expected layers that give gradients .*, found the derivative for"
    ):
        eap.attribute(model, data)
    circuit = eap.attribute(right, data, method="eap").select(30)
    found, wanted = (eap.evaluate(each, circuit, data).values for each in (model, right))
    torch.testing.assert_close(found, wanted)


class Packed(nn.Module):
    """A linear layer whose `weight` and `bias` are methods, as those of torch's quantised ones."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.held = [base.weight.detach(), None if base.bias is None else base.bias.detach()]

    def weight(self):
        return self.held[0]

    def bias(self):
        return self.held[1]

    def forward(self, x):
        return nn.functional.linear(x, *self.held)


def sparse(base):
    base.weight = nn.Parameter(base.weight.detach().to_sparse_csr(), requires_grad=False)
    return base


@pytest.mark.parametrize("kind", [Packed, sparse, torch.compile])
def test_weights_that_are_no_plain_tensors(kind, make_model, make_pairs, relative):
    model, right = make_model("llama"), make_model("llama")
    each_projection(model, lambda attention, name: setattr(attention, name, kind(getattr(attention, name))))
    if kind is Packed:
        model.lm_head = Packed(model.lm_head)
    agree(model, right, make_pairs(), relative)
    if kind is not torch.compile:  # which is refused, as its forward is no method
        drawn = torch.get_rng_state()
        assert all(check.passed for check in check_model(model))
        assert torch.get_rng_state().equal(drawn)


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width).double() + 0.5)

    def forward(self, x):
        return x * self.weight


def test_an_adapters_weight_for_each_feature_is_no_norm(make_model, make_pairs, relative):
    """Under backward rules, which look for norms: that of DoRA."""
    torch.manual_seed(0)
    model, right = make_model("llama"), make_model("llama")
    for layer, twin in zip(model.model.layers, right.model.layers):
        adapter = layer.self_attn.q_proj = Around(LowRank(layer.self_attn.q_proj), nn.Sequential(Scale(24)))
        twin.self_attn.q_proj.weight.data = linear_weight(adapter)
    agree(model, right, make_pairs(), relative)


class Adapted(nn.Module):
    """As PEFT wraps a model."""

    active_peft_config = None

    def __init__(self, model, run):
        super().__init__()
        self.base_model, self.run = model, run

    def get_base_model(self):
        return self.base_model

    def forward(self, **given):
        return self.run(self.base_model, **given)


def test_a_forward_around_the_model_that_does_more_is_refused(make_model, make_pairs):
    """As adapters do that begin at a token, or want to be told the task."""

    def moved(model, **given):
        found = model(**given)
        found.logits = found.logits + torch.arange(59)
        return found

    def asks(model, **given):
        raise ValueError("task_ids should not be None.")

    model, data = make_model("llama"), make_pairs(n=3)
    eap.attribute(Adapted(model, lambda model, **given: model(**given)), data)
    refused(Adapted(model, moved), data, "LlamaForCausalLM: expected the model's own logits where its parts run")
    with pytest.raises(eap.InputError, match=r"LlamaForCausalLM: expected a model that runs .*, found task_ids should"):
        eap.attribute(Adapted(model, asks), data)
    begins = Adapted(model, asks)
    begins.active_peft_config = SimpleNamespace(alora_invocation_tokens=[3])
    with pytest.raises(eap.InputError, match="model: expected adapters that act at every token, found one that begins"):
        eap.attribute(begins, data)


def test_an_adapted_model_may_be_compiled_inside(make_model, make_pairs, relative):
    model = make_model("llama")
    agree(Adapted(torch.compile(model), lambda model, **given: model(**given)), model, make_pairs(), relative)


def test_a_model_that_does_not_run_is_refused(make_model, make_pairs):
    model = make_model("llama")
    model.config.return_dict = False  # with which it fails itself
    refused(
        model, make_pairs(n=3), "LlamaForCausalLM: expected a model that runs on a prompt's tokens, found 'tuple' obj"
    )
    assert "runs on a prompt's tokens" in check_model(model)[-1].detail


def test_circuits_try_a_model_again_that_has_other_modules(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=3)
    runs = eap.circuit_model(model, eap.attribute(model, data, method="eap").select(20), "zero")
    runs(data.clean)
    owner = model.model.layers[0].self_attn
    owner.q_proj = Around(owner.q_proj, torch.tanh)
    with pytest.raises(eap.InputError, match="expected a linear layer"):
        runs(data.clean)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gpt2", parametrizations.spectral_norm),
        ("llama", nn.utils.weight_norm),
        ("llama", lambda module: prune.l1_unstructured(module, "weight", 0.4)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_what_makes_weights_anew_is_left_as_it_was(name, change, make_model, make_pairs):
    """In training, where to look at a weight with a spectral norm changes it; also if it was changed since a run."""
    model = make_model(name).train()
    for layer in bind(model).layers:
        for module in layer.projection_modules:
            change(module)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    before, buffers = snapshot(model), copy.deepcopy(dict(model.named_buffers()))
    scores = eap.attribute(model, make_pairs(n=3))
    assert not differences(before, snapshot(model))
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    right = make_model(name)
    model.eval()(make_pairs(n=1).clean)
    with torch.no_grad():
        for path, weight in right.named_parameters():
            owner, _, kind = path.rpartition(".")
            weight.copy_(getattr(model.get_submodule(owner), kind))
    torch.testing.assert_close(scores.values, eap.attribute(right, make_pairs(n=3)).values)


def test_hooks_on_all_modules_of_the_process_are_refused(make_model, make_pairs):
    """Which may do anything anywhere, but those of torch, which only look."""
    model = make_model("llama")
    handle = register_module_forward_hook(lambda module, given, y: 2 * y if isinstance(module, nn.Linear) else None)
    try:
        with pytest.raises(eap.InputError, match="hooks of all modules: expected none"):
            eap.attribute(model, make_pairs(n=3))
    finally:
        handle.remove()
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        eap.attribute(model, make_pairs(n=3))


def test_the_self_check_of_an_offloaded_model(make_model):
    accelerate = pytest.importorskip("accelerate")
    model = make_model("llama")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    checks = check_model(model)
    assert all(check.passed for check in checks), checks


def test_the_self_check_of_a_model_whose_weights_are_cast_for_each_run():
    """Stored in another dtype than they compute in, and so elsewhere after each run."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("llama", torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.add_hook_to_module(module, hooks.LayerwiseCastingHook(torch.bfloat16, torch.float32, False))
    checks = check_model(model)
    assert all(check.passed for check in checks), checks
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_buffers_of_inference_mode_that_gradients_need(make_model, make_pairs):
    model = make_model("gemma4")
    with torch.inference_mode():
        for layer in model.model.layers:
            layer.layer_scalar = layer.layer_scalar.clone()
    with pytest.raises(eap.InputError, match=r"expected .*, found Inference tensors"):
        eap.attribute(model, make_pairs(n=3))


def test_weights_that_a_run_has_packed_are_unpacked(make_pairs):
    """bitsandbytes', which give no gradients then, and beside adapters only those of the adapters."""
    bnb = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=59, num_hidden_layers=2, initializer_range=0.3, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            new = bnb.nn.Linear4bit(64, 64, False, torch.float32)
            new.weight = bnb.nn.Params4bit(getattr(layer.mlp, name).weight.data, requires_grad=False)
            setattr(layer.mlp, name, new.to("cpu"))
    data = make_pairs(n=3)
    with torch.no_grad():
        model.eval()(data.clean)
    unpacked = copy.deepcopy(model)
    unpacked.state_dict()  # packing has rounded what belongs to them
    torch.testing.assert_close(eap.attribute(model, data).values, eap.attribute(unpacked, data).values)


def test_a_norm_whose_weight_is_made_of_another_is_refused(make_model, make_pairs):
    model = make_model("llama")
    parametrize.register_parametrization(model.model.layers[1].input_layernorm, "weight", nn.Tanh())
    with pytest.raises(eap.InputError, match="with plain weights, found one with parametrizations"):
        eap.attribute(model, make_pairs())
