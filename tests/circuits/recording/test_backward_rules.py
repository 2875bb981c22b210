"""Backward rules: gradients of one pass, against the models' own code with the rules written out in it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from eap_circuits.adapters import bind
from eap_circuits.forward import Hooks, borrowed
from eap_circuits.recording import RULES, Rules
from eap_circuits.recording.rules import BackwardRules
from eap_circuits.recording.rules.gradients import Attention
from eap_circuits.selfcheck import StayDouble
from tests.circuits.recording.rules_by_hand import SoftmaxAtTwo


def input_gradient(model, rules):
    """Of a random sum of the logits, with respect to the embeddings."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (2, 5), generator=generator)
    x = model.get_input_embeddings()(tokens).detach().requires_grad_()
    with borrowed(model), Hooks(5) as hooks:
        if rules is not None:
            BackwardRules(rules, bind(model)).register(hooks)
        logits = model(inputs_embeds=x, use_cache=False).logits
        (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    return x.grad


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("name", ["gpt-oss", "mixtral", "phi3", "qwen2-moe"])
def test_gates_of_experts_and_of_fused_projections(name, identity, make_model, monkeypatch, relative):
    """The same gradient as of the model's own code with norms and gates written out under the rules."""

    def gated(gate, up, function):
        a = function(gate)
        a = gate * (a / gate).detach() if identity else a
        return a * up / 2 + (a * up / 2).detach()

    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt().detach()

    def apply_gate(self, both):
        if name != "gpt-oss":
            return gated(*both.chunk(2, -1), self.act_fn)
        gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2].clamp(-self.limit, self.limit)
        return gated(gate, up + 1, lambda x: x * torch.sigmoid(self.alpha * x))

    def mlp(self, x):
        if name == "phi3":
            return self.down_proj(gated(*self.gate_up_proj(x).chunk(2, -1), self.activation_fn))
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.act_fn))

    model = make_model(name, **({} if name == "phi3" else {"experts_implementation": "batched_mm"}))
    with StayDouble():
        found = input_gradient(model, Rules("", "", identity=identity))
        plain = input_gradient(model, None)
        for module in model.modules():
            kind = type(module)
            if hasattr(module, "variance_epsilon"):
                monkeypatch.setattr(kind, "forward", norm)
            elif hasattr(module, "_apply_gate"):
                monkeypatch.setattr(kind, "_apply_gate", apply_gate)
            elif hasattr(module, "down_proj"):
                monkeypatch.setattr(kind, "forward", mlp)
        assert relative(found, input_gradient(model, None)) < 1e-12
    assert relative(found, plain) > 0.05


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize(
    "name",
    [
        "bloom",
        "cohere",
        "falcon",
        "gemma3",
        "gpt-neo",
        "gptj",
        "olmo",
        "olmo2",
        "opt",
        "phi",
        "qwen3",
        "stablelm-parallel",
    ],
)
def test_norms_and_attention_of_many_families(name, temperature, make_model, monkeypatch, relative):
    """The same gradient as of the model's own code with norms, gates and softmax written out under the rules."""

    def norm(self, x):
        if "LayerNorm" in type(self).__name__:
            x = x - x.mean(-1, keepdim=True)
        eps = getattr(self, "variance_epsilon", getattr(self, "eps", 1e-5))
        x = x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach()
        x = x if getattr(self, "weight", None) is None else x * (self.weight + (name == "gemma3"))
        return x if getattr(self, "bias", None) is None else x + self.bias

    def mlp(self, x):
        return self.down_proj(half(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))

    def half(x):
        return x / 2 + (x / 2).detach()

    model = make_model(name, attn_implementation="eager")
    with StayDouble():
        found = input_gradient(model, Rules("", "", temperature=temperature))
        plain = input_gradient(model, None)
        embedding_norm = bind(model).embedding_norm
        if embedding_norm is not None:  # before the graph, whatever the rules
            embedding_norm.forward = embedding_norm.forward
        for module in model.modules():
            if hasattr(module, "gate_proj"):
                monkeypatch.setattr(type(module), "forward", mlp)
            elif type(module).__name__.endswith("Norm"):
                monkeypatch.setattr(type(module), "forward", norm)
        if temperature:
            soft = lambda x, dim=-1, dtype=None: SoftmaxAtTwo.apply(half(x))  # noqa: E731
            monkeypatch.setattr(functional, "softmax", soft)
            for layer in bind(model).layers:
                layer.out.register_forward_pre_hook(lambda _, args: (half(args[0]), *args[1:]))
        assert relative(found, input_gradient(model, None)) < 1e-12
    assert relative(found, plain) > 0.01


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_attention_written_out_is_attention(mask, groups, relative):
    """With a pattern left as it is, gradients are those of scaled_dot_product_attention."""
    generator = torch.Generator().manual_seed(1)

    def tensor(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = tensor(2, 6, 4, 5), tensor(2, 6 // groups, 7, 5), tensor(2, 6 // groups, 7, 5)
    options = {"enable_gqa": groups > 1, "scale": 0.3 if groups > 1 else None, "is_causal": mask == "causal"}
    if mask in ("bool", "float"):
        allowed = torch.rand(2, 1, 4, 7, generator=generator) < 0.7
        allowed[..., 0] = True
        options["attn_mask"] = allowed if mask == "bool" else torch.where(allowed, tensor(2, 1, 4, 7).detach(), -1e9)
    right = functional.scaled_dot_product_attention(q, k, v, **options)
    found = Attention.apply(q, k, v, options, lambda pattern, scores, dim: pattern)
    assert torch.equal(found, right)
    g = torch.randn(right.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(z, (q, k, v), g) for z in (found, right)), strict=True):
        assert relative(a, b) < 1e-12


def test_products_in_place_are_products(make_model, monkeypatch, relative):
    model = make_model("llama")
    right = [input_gradient(model, rules) for rules in RULES.values()]

    def forward(self, x):
        h = self.act_fn(self.gate_proj(x))
        h *= self.up_proj(x)
        return self.down_proj(h)

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", forward)
    for rules, gradient in zip(RULES.values(), right, strict=True):
        assert relative(input_gradient(model, rules), gradient) < 1e-12


def test_a_feature_that_is_zero_has_no_slope(make_model, relative):
    """a(x)/x where x = 0: the neuron passes no gradient, and its neighbours keep theirs."""
    model, without = make_model("llama"), make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[3] = 0
        for layer in without.model.layers:
            layer.mlp.down_proj.weight[:, 3] = 0
    found, right = (input_gradient(m, RULES["relp"]) for m in (model, without))
    assert found.isfinite().all() and relative(found, right) < 1e-12


def test_half_precision(make_model, relative):
    gradients = [
        input_gradient(make_model("llama", dtype=dtype), RULES["gim"]) for dtype in (torch.bfloat16, torch.float64)
    ]
    # bfloat16 keeps 8 bits and the gradient passes three layers of them: the order of 2⁻⁸ times ten.
    assert gradients[0].dtype == torch.bfloat16 and relative(*gradients) < 0.1
