"""Norms that run as the library's one kernel: on a pretended GPU, against the model's own passes on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import eap_circuits as eap
from bench.pretended import counting, pretending
from eap_circuits.adapters import bind
from eap_circuits.forward import Runner, batch_of
from eap_circuits.forward.layers import fused_norms
from eap_circuits.selfcheck.model import StayDouble


def passed(model: Any, data: eap.PairedDataset, changed: Callable[[Any], object] = lambda _: None) -> tuple[Any, Any]:
    """(Logits and the gradient of their squares at the embeddings, what was counted) of a pass on the device."""
    model.requires_grad_(False).cuda()
    changed(model)
    arch = bind(model)
    batch = batch_of(data, torch.arange(len(data)), False, arch.device)
    runner = Runner(arch, arch.graph("kv"), batch)
    x = runner.embed(batch.clean).requires_grad_(True)
    with counting() as found:
        logits = runner.logits(x)
        logits.float().square().sum().backward()
    assert x.grad is not None
    return (logits.detach().cpu(), x.grad.cpu()), {name: n for (name, _), n in found.launches.items() if "rms" in name}


def own(model: Any, data: eap.PairedDataset) -> tuple[Tensor, Tensor]:
    """The same of the model by itself, on the CPU."""
    x = model.get_input_embeddings()(data.clean).detach().requires_grad_(True)
    logits = model(inputs_embeds=x).logits[torch.arange(len(data)), data.lengths - 1]
    logits.float().square().sum().backward()
    return logits.detach(), x.grad


@pytest.mark.parametrize("name", ["llama", "olmo2", "gemma2", "gpt2"])
def test_a_pass_gives_what_the_model_gives(name, make_model, make_pairs, relative) -> None:
    data = make_pairs()
    with StayDouble():
        right = own(make_model(name), data)
    with pretending(), StayDouble():
        found, _ = passed(make_model(name), data)
    for x, y in zip(found, right, strict=True):
        assert relative(x, y) < 1e-12


def test_each_norm_is_one_kernel_and_one_back(make_model, make_pairs) -> None:
    with pretending():
        model = make_model("llama")
        norms = len(bind(model).norms)
        _, found = passed(model, make_pairs())
    assert sum(found.values()) == 2 * norms and {*found} == {"rms_norm", "rms_norm_backward"}


def test_norms_with_a_forward_of_their_own_are_left_alone(make_model, make_pairs) -> None:
    """A wrapper's may do more."""

    def wrap(model: Any) -> None:
        for norm in bind(model).norms:
            norm.module.forward = norm.module.forward

    with pretending():
        _, found = passed(make_model("llama"), make_pairs(), wrap)
    assert not found


def test_norms_in_two_dtypes_are_computed_by_the_model(make_model) -> None:
    """Which decides what the result's is."""
    norm = bind(make_model("llama", torch.float32)).norms[0]
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, right = fused_norms._fused(norm, norm.module.forward, x), norm.module(x)
    assert found.dtype == right.dtype == torch.float32 and torch.equal(found, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once(dtype, make_model) -> None:
    norm = bind(make_model("llama", dtype)).norms[0]
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert norm.kind is not None
    right = x.double() * (x.double().square().mean(-1, keepdim=True) + norm.kind.eps).rsqrt() * norm.module.weight
    # Half a unit in the last place, and what computing in float32 adds to it.
    most = torch.finfo(dtype).eps * (0.5 + 2**-8) * right.abs() + torch.finfo(dtype).tiny
    assert ((norm.fused(x).double() - right).abs() <= most).all()


@pytest.mark.parametrize("rules", [None, "relp", "gim"])
def test_scores_are_those_of_the_cpu_and_the_model_is_left_as_it_was(rules, make_model, make_pairs, relative) -> None:
    data, given = make_pairs(), {"method": "eap-ig-inputs", "steps": 2, "rules": rules}
    right = eap.attribute(make_model("llama"), data, **given)
    with pretending():
        model = make_model("llama").cuda()
        found = eap.attribute(model, data, **given)
    assert relative(found.values, right.values) < 1e-5
    assert not any("forward" in vars(module) for module in model.modules())
