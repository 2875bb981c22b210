"""Backward rules: against models written out by hand, conservation, attention implementations, and what is refused."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import eap_circuits as eap
from eap_circuits.adapters import bind
from eap_circuits.capture import RULES, Hooks, Rules, borrowed
from eap_circuits.capture.ablation import find_constants
from eap_circuits.capture.rules import BackwardRules, _Attention
from eap_circuits.evaluation.check import StayDouble
from eap_circuits.methods.quadrature import QUADRATURES

ALL = sorted(RULES)


class SoftmaxAtTwo(torch.autograd.Function):
    """GIM's softmax: the backward of softmax(x / 2), without the factor of its argument."""

    @staticmethod
    def forward(ctx, x):
        ctx.soft = torch.softmax(x / 2, -1)
        return torch.softmax(x, -1)

    @staticmethod
    def backward(ctx, g):
        return ctx.soft * (g - (g * ctx.soft).sum(-1, keepdim=True))


class ByHand:
    """A decoder-only model on one prompt, head by head, every receiver with an input of its own."""

    def __init__(self, model, rules):
        self.model, self.rules, self.config = model, rules, model.config

    # The pieces, with the rules as detached factors.

    def norm(self, module, x, offset=0.0):
        centred = isinstance(module, torch.nn.LayerNorm)
        if centred:
            x = x - x.mean(-1, keepdim=True)
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        if self.rules:
            scale = scale.detach()
        y = x * scale * (module.weight + offset)
        return y + module.bias if centred else y

    def activation(self, x, function):
        return x * (function(x) / x).detach() if self.rules in ("relp", "relp-ah") else function(x)

    def shared(self, product):
        return product / 2 + (product / 2).detach()

    def gated(self, a, b):
        return self.shared(a * b) if self.rules else a * b

    def attend(self, q, k, v, scale, allowed, cap=None):
        gim = self.rules == "gim"
        scores = q @ k.T
        scores = (self.shared(scores) if gim else scores) * scale
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~allowed, -1e9)
        pattern = SoftmaxAtTwo.apply(scores) if gim else torch.softmax(scores, -1)
        if self.rules == "relp-ah":
            pattern = pattern.detach()
        return self.shared(pattern @ v) if gim else pattern @ v

    # A run: contributions [S, T, D], the inputs' gradients [R, T, D].

    def run(self, embeddings, tokens, answers, moved=None):
        """`moved` replaces a group's contributions; group 0 is the embedding, then each layer's heads and MLP."""
        self.group, self.moved = 0, moved or {}
        self.contributions, self.receivers, self.residual = [embeddings], [], embeddings
        logits = {"gpt2": self.gpt2, "llama": self.llama, "gemma2": self.gemma2}[self.config.model_type](tokens)
        loss = logits[-1, answers[1]] - logits[-1, answers[0]]
        gradients = torch.autograd.grad(loss, self.receivers, materialize_grads=True)
        return torch.stack(self.contributions).detach(), torch.stack(gradients)

    def read(self):
        own = torch.zeros_like(self.residual, requires_grad=True)
        self.receivers.append(own)
        return self.residual + own

    def heads(self, n):
        """Inputs of q of all heads, k of all heads, v of all heads, in the graph's order."""
        inputs = [[self.read() for _ in range(n)] for _ in range(3)]
        return list(zip(*inputs, strict=True))

    def write(self, *contributions):
        self.group += 1
        contributions = self.moved.get(self.group, contributions)
        self.contributions += contributions
        self.residual = self.residual + sum(contributions)

    def gpt2(self, tokens):
        body, n, size = self.model.transformer, self.config.n_head, self.config.n_embd
        dim, t = size // n, len(tokens)
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        self.residual = self.residual + body.wpe.weight[:t]
        for block in body.h:
            weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
            written = []
            for h, inputs in enumerate(self.heads(n)):
                q, k, v = (
                    self.norm(block.ln_1, x) @ weight[:, part] + bias[part]
                    for x, part in zip(inputs, (slice(i * size + h * dim, i * size + (h + 1) * dim) for i in range(3)))
                )
                z = self.attend(q, k, v, dim**-0.5, causal)
                written.append(z @ block.attn.c_proj.weight[h * dim : (h + 1) * dim])
            self.write(*written)
            self.residual = self.residual + block.attn.c_proj.bias
            x = self.norm(block.ln_2, self.read()) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
            x = self.activation(x, lambda x: functional.gelu(x, approximate="tanh"))
            self.write(x @ block.mlp.c_proj.weight + block.mlp.c_proj.bias)
        return self.norm(body.ln_f, self.read()) @ self.model.lm_head.weight.T

    def llama(self, tokens):
        layers = self.model.model.layers
        self.decoder(tokens, 0.0, lambda index: (layers[index].input_layernorm, None), functional.silu)
        return self.norm(self.model.model.norm, self.read()) @ self.model.lm_head.weight.T

    def gemma2(self, tokens):
        layers, cap = self.model.model.layers, self.config.final_logit_softcapping
        self.decoder(
            tokens,
            1.0,
            lambda index: (layers[index].input_layernorm, layers[index].post_attention_layernorm),
            lambda x: functional.gelu(x, approximate="tanh"),
        )
        logits = self.norm(self.model.model.norm, self.read(), 1.0) @ self.model.lm_head.weight.T
        return cap * torch.tanh(logits / cap)

    def decoder(self, tokens, offset, norms, function):
        """Layers of Llama, and of Gemma 2, which has norms after the blocks too."""
        c, t = self.config, len(tokens)
        n, dim = c.num_attention_heads, getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        group = n // c.num_key_value_heads
        rope = self.model.model.rotary_emb(self.residual[None], torch.arange(t)[None])
        distance = torch.arange(t)[:, None] - torch.arange(t)
        for index, layer in enumerate(self.model.model.layers):
            before, after = norms(index)
            attention, mlp = layer.self_attn, layer.mlp
            window = getattr(attention, "sliding_window", None) or math.inf
            allowed = (distance >= 0) & (distance < window)
            raw = []
            for h, inputs in enumerate(self.heads(n)):
                rows = [slice(i * dim, (i + 1) * dim) for i in (h, h // group, h // group)]
                modules = (attention.q_proj, attention.k_proj, attention.v_proj)
                q, k, v = (
                    self.norm(before, x, offset) @ module.weight[part].T
                    for x, module, part in zip(inputs, modules, rows, strict=True)
                )
                q, k = (x[0, 0] for x in apply_rotary_pos_emb(q[None, None], k[None, None], *rope))
                cap = getattr(c, "attn_logit_softcapping", None)
                z = self.attend(q, k, v, attention.scaling, allowed, cap)
                raw.append(z @ attention.o_proj.weight[:, h * dim : (h + 1) * dim].T)
            self.post(raw, after, offset)
            x = self.norm(
                layer.post_attention_layernorm if after is None else layer.pre_feedforward_layernorm,
                self.read(),
                offset,
            )
            a = self.activation(x @ mlp.gate_proj.weight.T, function)
            x = self.gated(a, x @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T
            self.post([x], None if after is None else layer.post_feedforward_layernorm, offset)

    def post(self, raw, norm, offset):
        """Write a block's contributions, through the norm after it."""
        if norm is None:
            return self.write(*raw)
        total = sum(raw)
        y = self.norm(norm, total, offset)
        scale = (total.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt().detach()
        self.group += 1
        given = self.moved.get(self.group)
        self.contributions += given or [(x * scale * (norm.weight + offset)).detach() for x in raw]
        self.residual = self.residual + (y if given is None else sum(given))
        return None


def scores_by_hand(model, data, rules, path, graph, groups=()):
    """Along the embeddings' path; with groups of senders, each along its own, from the clean run."""
    by_hand = ByHand(model, rules)
    total = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.float64)
    factor = model.config.hidden_size**0.5 if model.config.model_type == "gemma2" else 1.0
    weight = model.get_input_embeddings().weight.detach() * factor
    for e in range(len(data)):
        n = int(data.lengths[e])
        tokens = [x[e, :n] for x in (data.clean, data.corrupted)]
        clean, corrupted = (weight[t] for t in tokens)
        answers = data.answers[e].tolist()
        runs = [by_hand.run(x.requires_grad_(), tokens[0], answers)[0] for x in (corrupted, clean)]
        difference = runs[0] - runs[1]
        for (index, group), (alpha, share) in product(enumerate(groups), path):
            given = [*(runs[1][group] + (1 - alpha) * difference[group])]
            start = (given[0] if index == 0 else clean.detach()).requires_grad_()
            gradients = by_hand.run(start, tokens[0], answers, {index: given})[1]
            total[group] += share * torch.einsum("utd,vtd->uv", difference[group], gradients)
        for alpha, share in () if groups else path:
            point = (corrupted + alpha * (clean - corrupted)).detach().requires_grad_()
            gradients = by_hand.run(point, tokens[0], answers)[1]
            total += share * torch.einsum("utd,vtd->uv", difference, gradients)
    return torch.where(graph.edge_mask, total / len(data), 0)


@pytest.mark.parametrize("rules", [None, *ALL])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_scores_are_those_of_a_model_written_out_by_hand(name, rules, make_model, make_pairs, relative):
    model, data = make_model(name), make_pairs(n=4)
    with StayDouble():
        for method, path in (("eap", [(1.0, 1.0)]), ("eap-ig-inputs", QUADRATURES["right"](3))):
            found = eap.attribute(model, data, method=method, steps=3, heads="query", rules=rules)
            right = scores_by_hand(model, data, rules, path, found.graph)
            assert relative(found.values, right) < 1e-6


@pytest.mark.parametrize("rules", ["relp", "gim"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_paths_of_activations_are_those_of_a_model_written_out_by_hand(name, rules, make_model, make_pairs, relative):
    model, data = make_model(name), make_pairs(n=2)
    with StayDouble():
        found = eap.attribute(model, data, method="eap-ig-activations", steps=2, heads="query", rules=rules)
        graph = found.graph
        sites = [(graph.head_senders(i), graph.mlp_sender(i)) for i in range(graph.n_layers)]
        groups = [slice(0, 1), *(x for heads, mlp in sites for x in (heads, slice(mlp, mlp + 1)))]
        right = scores_by_hand(model, data, rules, QUADRATURES["right"](2), graph, groups)
        assert relative(found.values, right) < 1e-6


def test_conductance_of_one_segment_is_the_mean_of_its_ends(make_model, make_pairs, relative):
    """Then every sender's change is its whole difference: clean-corrupted scores, under the same rules."""
    model, data = make_model("llama"), make_pairs(n=4)
    for rules in ALL:
        found = eap.attribute(model, data, method="eap-conductance", steps=1, rules=rules).values
        assert relative(found, eap.attribute(model, data, method="clean-corrupted", rules=rules).values) < 1e-5


@pytest.mark.parametrize("name", ["cohere", "gemma2", "llama", "mistral-window", "olmo2", "qwen3", "smollm3"])
def test_relevance_is_conserved_at_every_cut(name, make_model, make_pairs):
    """Without biases, and with all that is not linear constant, the metric is linear in each cut through the graph.

    The corrupted prompts are of a token whose embedding is zero: every sender writes nothing, Δ = −contribution, and
    the scores of the edges across any cut add up to the clean prompts' metric.
    """
    model, data = make_model(name), make_pairs(n=5)
    if name == "gemma2":
        model.config.final_logit_softcapping = None
    for module in model.modules():
        assert getattr(module, "bias", None) is None or not module.bias.numel()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0
    clean = data.clean.clamp(min=1)
    pairs = eap.PairedDataset.from_tokens(clean, torch.zeros_like(clean), data.lengths, data.answers)
    with StayDouble(), torch.no_grad():
        scores = eap.attribute(model, pairs, method="eap", rules="relp-ah")
        logits = [model(input_ids=clean[None, e, : int(n)]).logits[0, -1] for e, n in enumerate(data.lengths)]
    metric = sum(float(x[a[0]] - x[a[1]]) for x, a in zip(logits, data.answers, strict=True)) / len(data)
    reach = scores.graph.reach
    for senders in reach.unique().tolist():
        crossing = scores.values[:senders, reach >= senders].double().sum()
        assert float(crossing) == pytest.approx(metric, rel=1e-5), senders


@pytest.mark.parametrize("name", ["cohere", "falcon", "gemma3", "gpt2", "mistral-window", "stablelm-parallel"])
def test_attention_implementations_agree(name, make_model, make_pairs, relative):
    models = [make_model(name, attn_implementation=attention) for attention in ("sdpa", "eager")]
    with StayDouble():
        # One by one attention has no mask, together it has one for prefixes of several lengths.
        for rules, heads, size in (
            ("relp", "query", None),
            ("relp-ah", "kv", 1),
            ("gim", "query", None),
            ("gim", "kv", 1),
        ):
            settings = {"method": "eap", "heads": heads, "batch_size": size, "rules": rules}
            first, second = (eap.attribute(model, make_pairs(n=4), **settings).values for model in models)
            assert relative(first, second) < 1e-6, settings


def test_values_stay_as_they_are(family, make_model, make_pairs):
    """Bit for bit."""
    model, data = make_model(family), make_pairs(n=3)
    runs = []

    def metric(logits, batch):
        if logits.requires_grad:
            runs[-1].append(logits.detach())
        return logits[:, 0]

    for rules in (None, *ALL):
        runs.append([])
        eap.attribute(model, data, metric=metric, method="clean-corrupted", rules=rules)
    for ruled in runs[1:]:
        assert len(ruled) == len(runs[0]) > 0
        assert all(torch.equal(a, b) for a, b in zip(ruled, runs[0], strict=True))


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
    found = _Attention.apply(q, k, v, options, lambda pattern, scores, dim: pattern)
    assert torch.equal(found, right)
    g = torch.randn(right.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(z, (q, k, v), g) for z in (found, right)), strict=True):
        assert relative(a, b) < 1e-12


def test_products_in_place_are_products(make_model, monkeypatch, relative):
    model = make_model("llama")
    right = [input_gradient(model, RULES[rules]) for rules in ALL]

    def forward(self, x):
        h = self.act_fn(self.gate_proj(x))
        h *= self.up_proj(x)
        return self.down_proj(h)

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", forward)
    for rules, gradient in zip(ALL, right, strict=True):
        assert relative(input_gradient(model, RULES[rules]), gradient) < 1e-12


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


@pytest.mark.parametrize("rules", ALL)
def test_scores_do_not_depend_on_batching(kind, rules, make_model, make_pairs, relative):
    model, data = make_model(kind), make_pairs(seed=3)
    right = eap.attribute(model, data, steps=3, rules=rules)
    assert right.info["rules"] == rules
    for settings in ({"batch_size": 1}, {"batch_size": 3, "reuse_prefix": False}, {"memory": "2MB"}):
        assert relative(eap.attribute(model, data, steps=3, rules=rules, **settings).values, right.values) < 1e-6
    query = eap.attribute(model, data, steps=3, heads="query", rules=rules)
    assert relative(query.to_kv().values, right.values) < 1e-6


@pytest.mark.parametrize("rules", ALL)
def test_rules_change_scores_and_keep_the_methods_relations(rules, make_model, make_pairs, relative):
    model, data = make_model("llama"), make_pairs(seed=7)
    one = eap.attribute(model, data, method="eap", rules=rules).values
    assert relative(one, eap.attribute(model, data, method="eap").values) > 0.1
    ends = (one + eap.attribute(model, data, steps=1, quadrature="left", rules=rules).values) / 2
    assert relative(eap.attribute(model, data, method="clean-corrupted", rules=rules).values, ends) < 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rules": "lrp"}, ["rules", "'gim'", "'relp'", "'lrp'"]),
        ({"rules": "relp", "method": "exact"}, ["rules", "None", "'exact'", "'relp'"]),
        ({"rules": "gim", "method": "information-flow-routes"}, ["rules", "None", "'information-flow-routes'"]),
    ],
)
def test_bad_settings_are_one_sentence(settings, words, make_model, make_pairs):
    for call in (eap.attribute, eap.plan):
        with pytest.raises(eap.InputError) as error:
            call(make_model("gpt2"), make_pairs(), **settings)
        text = str(error.value)
        assert all(word in text for word in words) and "\n" not in text and text.endswith(".")


def test_a_plan_counts_what_the_rules_take(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs()
    assert eap.plan(model, data, rules="gim").bytes != eap.plan(model, data).bytes


def hidden(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """Attention without any softmax that could be seen."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * scaling
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    weights = torch.where(allowed if attention_mask is None else attention_mask, scores, -torch.inf).exp()
    return (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2), None


def test_attention_that_cannot_be_seen_is_refused_where_rules_change_it(make_model, make_pairs, relative):
    AttentionInterface.register("hidden", hidden)
    AttentionMaskInterface.register("hidden", sdpa_mask)
    model, data = make_model("llama", attn_implementation="hidden"), make_pairs(n=3)
    right = eap.attribute(make_model("llama"), data, rules="relp").values
    assert relative(eap.attribute(model, data, rules="relp").values, right) < 1e-5
    for rules in ("gim", "relp-ah"):
        with pytest.raises(eap.InputError, match=r"rules: expected attn_implementation .*layer 0 \(LlamaAttention\)"):
            eap.attribute(model, data, rules=rules)


@pytest.mark.parametrize("rules", ALL)
def test_an_activation_that_cannot_be_seen_is_refused(rules, make_model, make_pairs):
    model = make_model("gpt2")
    del model.transformer.h[1].mlp.act
    model.transformer.h[1].mlp.act = functional.gelu
    with pytest.raises(eap.InputError, match=r"rules: expected activation .*layer 1 \(GPT2MLP\)"):
        eap.attribute(model, make_pairs(n=3), rules=rules)
    assert "forward" not in vars(model.transformer.h[0])


def test_the_page_has_every_rule():
    page = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
    table = [f"| `{rules.name}` | {rules.description} |" for rules in RULES.values()]
    assert "\n".join(["| rules | what it is |", "|---|---|", *table, ""]) in page


@pytest.mark.parametrize("method", ["eap", "eap-ig-inputs"])
@pytest.mark.parametrize("rules", [None, "relp", "gim"])
def test_scores_are_linear_in_what_takes_a_contributions_place(rules, method, kind, make_model, make_pairs, relative):
    """Gradients do not know the ablation, whatever takes their place: half the mean gives the mean of two scores."""
    model, data = make_model(kind), make_pairs(n=3)
    arch = bind(model)
    with borrowed(model):
        half = find_constants(arch, "mean", data).map(lambda x: x / 2)
    zero, mean, between = (
        eap.attribute(model, data, method=method, steps=2, rules=rules, ablation=ablation).values
        for ablation in ("zero", "mean", half)
    )
    assert relative(between, (zero + mean) / 2) < 1e-5
