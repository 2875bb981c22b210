"""Models that are not quite what `from_pretrained` gave: adapters, quantised and offloaded weights, other libraries."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import eap_circuits as eap
from eap_circuits.adapters import bind, linear_weight, sender_sites
from eap_circuits.budget import PeakBytes
from eap_circuits.modules.projections import linear_part
from eap_circuits.selfcheck import check_model
from tests.circuits.conftest import random_circuit


def results(model, data):
    """Scores, and a circuit's metric."""
    scores = eap.attribute(model, data, heads="query", steps=2)
    return scores, eap.evaluate(model, scores.select(40), data).values


def agree(model, right, data, relative, tolerance=1e-6):
    (found, values), (scores, wanted) = results(model, data), results(right, data)
    assert relative(found.values, scores.values) < tolerance
    assert relative(values, wanted) < tolerance
    found, scores = (eap.attribute(m, data, method="eap", rules="gim") for m in (model, right))
    assert relative(found.values, scores.values) < tolerance


class LowRank(nn.Module):
    """A linear layer with an update of low rank beside it, as adapters are."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        self.a, self.b = (nn.Parameter(0.3 * torch.randn(n, 2).double()) for n in (base.in_features, base.out_features))

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b.T


class EightBit(nn.Module):
    """A linear layer whose weights are integers and a factor per feature."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        self.scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((base.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def replaced(model, kind):
    """The model with every projection of attention of that kind, and a plain one with the same weights."""
    torch.manual_seed(0)
    model, plain = copy.deepcopy(model), copy.deepcopy(model)
    for layer, twin in zip(model.model.layers, plain.model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = kind(getattr(layer.self_attn, name))
            setattr(layer.self_attn, name, module)
            target = getattr(twin.self_attn, name)
            if kind is LowRank:
                target.weight.data += module.b.detach() @ module.a.detach().T
            else:
                target.weight.data = module.weight.double() * module.scale
    return model, plain


@pytest.mark.parametrize("kind", [LowRank, EightBit])
@pytest.mark.parametrize("name", ["llama-mqa-bias", "gemma2", "olmo2"])
def test_linear_layers_of_other_kinds(name, kind, make_model, make_pairs, relative):
    model, plain = replaced(make_model(name), kind)
    agree(model, plain, make_pairs(), relative)


@pytest.mark.parametrize("kind", [LowRank, EightBit])
def test_self_check_of_a_model_with_other_linear_layers(kind, make_model):
    assert all(check.passed for check in check_model(replaced(make_model("llama"), kind)[0]))


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, make_model, make_pairs, relative):
    """Also of a model in eval mode, in which its layers round or give no gradients on a CPU."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(base):
        if bits == 8:
            new = bnb.nn.Linear8bitLt(base.in_features, base.out_features, False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(base.weight.data, requires_grad=False)
        else:
            new = bnb.nn.Linear4bit(base.in_features, base.out_features, False, torch.float32, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(base.weight.data, requires_grad=False, quant_type="nf4")
        return new.to("cpu")

    model, plain = make_model("llama", torch.float32), make_model("llama", torch.float32)
    for layer, twin in zip(model.model.layers, plain.model.layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = quantised(getattr(layer.self_attn, name))
            setattr(layer.self_attn, name, module)
            getattr(twin.self_attn, name).weight.data = linear_weight(module).contiguous()
    model.eval()
    agree(model, plain, make_pairs(), relative, 1e-5)
    assert not any(module.training for module in model.modules())
    checks = check_model(model)
    assert all(check.passed for check in checks), checks


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_peft(name, make_model, make_pairs, relative):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model = peft.get_peft_model(make_model(name), config).double().train()
    merged = copy.deepcopy(model).merge_and_unload()
    agree(model, merged, make_pairs(), relative)
    assert model.training and any(p.requires_grad for p in model.parameters())
    assert all(check.passed for check in check_model(model))


def test_learned_prompts_are_refused(make_model):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(eap.InputError, match="learned prompts"):
        bind(peft.get_peft_model(make_model("llama"), config))


def test_adapters_of_several_kinds(make_model, make_pairs, relative):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    names = ["q_proj", "v_proj", "o_proj", "down_proj"]
    low = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(make_model("llama"), low, mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=2, target_modules=names, init_weights=False))
    model.set_adapter(["default", "other"])
    model = model.double().eval()
    agree(model, copy.deepcopy(model).merge_and_unload(), make_pairs(), relative)


def test_the_self_check_of_a_model_inside_others(make_model):
    inside = nn.DataParallel(torch.compile(make_model("llama"), backend="eager"))
    assert all(check.passed for check in check_model(inside))


def test_the_self_check_refuses_a_forward_that_a_copy_would_share(make_model, make_pairs, relative):
    model, plain = make_model("gpt2"), make_model("gpt2")
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    agree(model, plain, make_pairs(), relative)
    with pytest.raises(eap.InputError, match=r"GPT2LMHeadModel: expected forward methods of the modules' own"):
        check_model(model)


def test_a_model_that_turns_autocast_on_itself_is_refused(make_model, make_pairs):
    """As accelerate prepares models for mixed precision."""
    model = make_model("llama", torch.float32)
    forward = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    with pytest.raises(eap.InputError, match=r"torch.autocast: expected off .*, found on for the device type 'cpu'"):
        eap.attribute(model, make_pairs())


@pytest.mark.parametrize("part", ["layer", "self_attn", "mlp"])
def test_modules_that_are_in_several_layers_are_refused(part, make_model):
    """Their hooks would run for each, and where layers are listed, they would be one."""
    model = make_model("llama")
    layers = model.model.layers
    if part == "layer":
        layers[1] = layers[0]
    else:
        setattr(layers[1], part, getattr(layers[0], part))
    with pytest.raises(eap.InputError, match=r"layers: expected layers that share no module .* of layer 1 in one bef"):
        bind(model)
    if part == "layer":  # shared weights are no harm
        layers[1] = copy.deepcopy(layers[0], {id(x): x for x in layers[0].parameters()})
        assert bind(model).graph("kv").n_layers == len(layers)


def test_calls_inside_of_transforms_are_refused(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs()
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(eap.InputError, match=r"the call: expected one outside of torch\.func's transforms"):
            transform(lambda x: (eap.attribute(model, data), x.sum())[1])(torch.ones(2))


def test_compiled(make_model, make_pairs, relative):
    model = make_model("llama")
    agree(torch.compile(model), model, make_pairs(), relative)


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "llama", "olmo2"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_are_fetched_and_left_where_they_were(
    name, where, tmp_path, make_model, make_pairs, relative
):
    accelerate = pytest.importorskip("accelerate")
    right = make_model(name)
    model = copy.deepcopy(right)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    agree(model, right, make_pairs(), relative)
    assert all(parameter.device.type == "meta" and parameter.requires_grad for parameter in model.parameters())


def offloaded(base):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(nn.Sequential(base), execution_device=torch.device("cpu"))
    return base


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", [LowRank, EightBit, offloaded, "Conv1D"])
def test_parts_of_weights_that_are_elsewhere(kind, dim):
    torch.manual_seed(0)
    module = offloaded(Conv1D(6, 8)) if kind == "Conv1D" else kind(nn.Linear(8, 6).double())
    found = linear_part(module, dim, slice(2, 5))
    torch.testing.assert_close(found, linear_weight(module).narrow(dim, 2, 3))
    assert found.untyped_storage().nbytes() <= 3 * 8 * found.element_size()


# What an offloaded weight is on the host counts once, where it is read first.
ELSEWHERE = pytest.mark.parametrize(("kind", "counted"), [(EightBit, 0), (offloaded, 1)])


@ELSEWHERE
def test_weights_that_are_elsewhere_are_not_kept(kind, counted):
    """Neither whole nor in parts, which together would be as much."""
    config = AutoConfig.for_model("llama", vocab_size=59, hidden_size=64, num_hidden_layers=6, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, kind(getattr(layer.self_attn, name)))
    arch, one = bind(model), 64 * 64 * 4
    with PeakBytes() as count:
        for features in (slice(None), slice(0, 32), slice(32, 64)):
            for site in sender_sites(arch):
                site.weight(torch.float32, features)
            for layer in arch.layers:
                for projection in layer.projections.values():
                    projection.weight(torch.float32, features)
    # 6 layers have 24 such weights; of one its units and the like are held.
    assert 0 < count.peak < (24 * counted + 5) * one


@ELSEWHERE
def test_circuits_hold_weights_that_are_elsewhere_for_a_layer_at_a_time(kind, counted, make_pairs):
    width, layers, peaks = 128, 6, []
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 32, "max_position_embeddings": 32}
    config = AutoConfig.for_model("opt", vocab_size=59, num_hidden_layers=layers, num_attention_heads=4, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    for changed in (False, True):
        for layer in model.model.decoder.layers if changed else ():
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                setattr(layer.self_attn, name, kind(getattr(layer.self_attn, name)))
        circuit = random_circuit(bind(model).graph("kv"), 0, 0.5)
        with PeakBytes() as count:
            eap.evaluate(model, circuit, make_pairs(), memory="1GB")
        peaks.append(count.peak)
    layer = 4 * width * width * 4
    # Two of six, with what they are made of.
    assert peaks[1] - peaks[0] < (layers * counted + 2) * layer


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map_on_the_cpu(device_map, tmp_path, make_model, make_pairs, relative):
    pytest.importorskip("accelerate")
    right = make_model("qwen3", torch.float32)
    right.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map, max_memory={"cpu": "8GiB"})
    agree(model, right, make_pairs(), relative)


def test_weights_on_meta_alone_are_refused(make_model):
    with pytest.raises(eap.InputError, match="meta"):
        bind(make_model("llama").to("meta"))


@pytest.mark.parametrize("settings", [{}, {"attn_implementation": "eager"}])
def test_half_precision(kind, settings, make_model, make_pairs):
    """Scores are float32 and finite; the circuit of all edges is the model, to bfloat16."""
    data = make_pairs(seed=9)
    model = make_model(kind, dtype=torch.bfloat16, **settings)
    found = eap.attribute(model, data, heads="query")
    assert found.values.dtype == torch.float32 and found.values.isfinite().all()
    full = eap.Circuit.from_mask(found.graph, found.graph.edge_mask)
    result = eap.evaluate(model, full, data)
    with torch.no_grad():
        largest = max(float(model(data.clean).logits.abs().max()), 1.0)
    assert float((result.values - result.clean_values).abs().max()) <= 2 * 2**-8 * largest


@pytest.mark.parametrize("name", ["gpt-oss", "mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_run_in_any_way(name, make_model, make_pairs, relative):
    """Grouped products too, also where no token reaches the experts."""
    eager, grouped = (make_model(name, torch.float32, experts_implementation=way) for way in ("eager", "grouped_mm"))
    agree(grouped, eager, make_pairs(), relative, 1e-5)


def pretend(name, **fields):
    """An object of a class that TransformerLens might have."""
    made = type(name, (nn.Module,), {"__module__": f"transformer_lens.{name}"})()
    for field, value in fields.items():
        object.__setattr__(made, field, value)
    return made


class Config:
    model_name, tokenizer_name = "gpt2-small", "gpt2"


def test_hooked_transformer_is_refused_with_the_line_that_loads_the_model():
    with pytest.raises(eap.InputError, match=r"AutoModelForCausalLM.from_pretrained\('gpt2'\)"):
        bind(pretend("HookedTransformer", cfg=Config))


class Bridge(nn.Module):
    """As TransformerLens wraps a module: what it computes itself does not matter."""

    def __init__(self, inner):
        super().__init__()
        self.add_module("_original_component", inner)

    def forward(self, *args, **kwargs):
        raise AssertionError("a bridge ran")


def test_bridge_is_looked_through_and_left_alone(make_model, make_pairs, relative):
    right = make_model("llama")
    model = copy.deepcopy(right)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Bridge(layer.self_attn.q_proj)
        layer.self_attn = Bridge(layer.self_attn)
    model.model.embed_tokens = Bridge(model.model.embed_tokens)
    before = [(name, id(module), len(module._forward_hooks)) for name, module in model.named_modules()]
    bridge = pretend("TransformerBridge", cfg=Config, original_model=model)
    agree(bridge, right, make_pairs(), relative)
    assert before == [(name, id(module), len(module._forward_hooks)) for name, module in model.named_modules()]
    object.__setattr__(bridge, "compatibility_mode", True)
    with pytest.raises(eap.InputError, match="from_pretrained"):
        eap.attribute(bridge, make_pairs())


@pytest.fixture
def make_bridge(tmp_path):
    """A real bridge around what a model's weights are saved as."""
    lens = pytest.importorskip("transformer_lens.model_bridge")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    def make(model):
        model.save_pretrained(tmp_path)
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        names = {"unk_token": "a", "bos_token": "a", "eos_token": "b", "pad_token": "a"}
        PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path)
        return lens.TransformerBridge.boot_transformers(str(tmp_path), device="cpu")

    return make


def test_real_bridge(make_bridge, make_model, make_pairs, relative):
    model = make_model("llama", torch.float32)
    agree(make_bridge(model), model, make_pairs(), relative, 1e-5)


def test_edge_attribution_of_transformer_lens(make_bridge, make_model, make_pairs, relative):
    """It takes gradients at the corrupted prompt: its scores are EAP's of the exchanged pair, with the other sign."""
    bridge, data = make_bridge(make_model("gpt2", torch.float32)), make_pairs()
    from transformer_lens.tools.analysis import EdgeAttributionConfig, attribution_patch

    n, (good, bad) = int(data.lengths[0]), data.answers[0].tolist()
    clean, corrupted = data.clean[:1, :n], data.corrupted[:1, :n]
    config = EdgeAttributionConfig(granularity="edge")
    theirs = attribution_patch(bridge, clean, corrupted, lambda x: x[0, -1, good] - x[0, -1, bad], config)

    exchanged = eap.PairedDataset.from_tokens(corrupted, clean, data.lengths[:1], data.answers[:1])
    ours = eap.attribute(bridge, exchanged, method="eap", heads="query", keep="positions")
    into = {"q_input": "<q>", "k_input": "<k>", "v_input": "<v>"}

    def name(node):
        if node.head is not None:
            return f"a{node.layer}.h{node.head}{into.get(node.kind, '')}"
        return {"embed": "input", "logits": "logits"}.get(node.kind, f"m{node.layer}")

    found = torch.zeros_like(ours.per_position)
    for (writer, reader), score in theirs.edge_scores.items():
        u, v = ours.graph.senders.index(name(writer)), ours.graph.receivers.index(name(reader))
        found[writer.position, u, v] = -score
    assert relative(found, ours.per_position) < 1e-5
