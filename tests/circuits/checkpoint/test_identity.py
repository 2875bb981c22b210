"""A checkpoint is gone on from only by a call that would compute the same; what differs is said."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
import transformers

import eap_circuits as eap
from eap_circuits.checkpoint import fingerprint, model_identity
from eap_circuits.checkpoint.digest import tensor_digest
from tests.circuits.checkpoint.test_fingerprint import closure, plain
from tests.circuits.conftest import fast_by_kind

TIMES = 1.0


@pytest.fixture
def given(make_model, make_pairs, tmp_path):
    model, data = make_model("llama", torch.float32), make_pairs(n=2)
    return SimpleNamespace(model=model, data=data, method="eap", checkpoint=tmp_path / "x.safetensors")


def refused(given, words, **more):
    before = given.checkpoint.read_bytes()
    with pytest.raises(eap.InputError, match=rf"x\.safetensors: expected a checkpoint of .*found another .*{words}"):
        eap.attribute(**{**vars(given), **more})
    assert given.checkpoint.read_bytes() == before


def scaled(module, args, output):
    return output * TIMES


def nothing(module, args, output):
    return None


class Hook:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, module, args, output):
        return output * self.factor


def edit_last(model):
    model.model.layers[-1].mlp.down_proj.weight.data[-1, -1] += 1e-3


def edit_sign(model):
    model.lm_head.weight.data.neg_()


def edit_buffer(model):
    model.model.rotary_emb.inv_freq[-1] *= 2


def edit_scaling(model):
    model.model.layers[1].self_attn.scaling *= 2


def edit_epsilon(model):
    model.model.norm.variance_epsilon = 1e-3


def edit_rope(model):
    model.config.rope_parameters["rope_theta"] = 7.0


def replace_forward(model):
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x, mlp=mlp: type(mlp).forward(mlp, x) * 0


def replace_activation(model):
    silu = torch.nn.functional.silu
    torch.nn.functional.silu = lambda x, inplace=False: silu(x) * 0


def hook(model):
    model.model.layers[0].mlp.register_forward_hook(scaled)


def hook_before(model):
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: (args[0] * 0,))


CHANGES = {
    edit_last: r"weights\.model\.layers\.\d+\.mlp\.down_proj\.weight",
    edit_sign: r"weights\.lm_head\.weight",
    edit_buffer: r"weights\.model\.rotary_emb\.inv_freq",
    edit_scaling: r"modules\.model\.layers\.1\.self_attn",
    edit_epsilon: r"modules\.model\.norm",
    edit_rope: r"configuration\[0\]\.rope_parameters\.rope_theta \(.*, here 7\.0\)",
    replace_forward: r"modules\.model\.layers\.0\.mlp",
    replace_activation: "code",
    hook: r"hooks\.model\.layers\.0\.mlp",
    hook_before: r"hooks\.model\.layers\.0\.mlp",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_is_another(change, given, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "silu", torch.nn.functional.silu)
    eap.attribute(**vars(given))
    change(given.model)
    refused(given, CHANGES[change])


def test_every_number_of_a_weight_counts_wherever_it_is():
    x = torch.zeros(2**22 + 3)  # more than a chunk
    digests = {tensor_digest(x)}
    for place in (0, 1, 2**21, 2**22 - 1, 2**22, 2**22 + 2):
        x[place] = -0.0
        digests.add(tensor_digest(x))
    assert len(digests) == 7
    y = torch.randn(6, 4)
    assert tensor_digest(y.T.contiguous().T) == tensor_digest(y) != tensor_digest(y.reshape(4, 6))
    assert tensor_digest(y.view(torch.int32)) != tensor_digest(y)
    assert tensor_digest(y.bfloat16()) != tensor_digest(y.half())


@fast_by_kind
def test_an_identity_is_that_of_the_model_not_of_what_ran(family, make_model, make_pairs):
    """The same for a model made anew, after runs, and copied."""
    model, data = make_model(family), make_pairs(n=2)
    first = model_identity(model)
    eap.evaluate(model, eap.attribute(model, data, method="eap").select(5), data)
    model.train()
    assert model_identity(model) == first
    assert model_identity(make_model(family)) == first
    assert model_identity(copy.deepcopy(model).requires_grad_(False)) == first


def test_a_saved_model_is_the_same(make_model, tmp_path):
    model = make_model("gemma2", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model_identity(loaded) == model_identity(model)


@pytest.mark.parametrize("what", ["torch", "transformers"])
def test_other_versions_are_said(what, given, monkeypatch):
    eap.attribute(**vars(given))
    module = importlib.import_module(what)
    monkeypatch.setattr(module, "__version__", module.__version__.partition("+")[0] + "+cu999")
    eap.attribute(**vars(given))  # the same, built for another device
    monkeypatch.setattr(module, "__version__", "9.9.9")
    refused(given, rf"versions\.{what} \('.*', here '.*9\.9\.9'\)")


def test_adapters_count_by_weights_and_settings(given):
    peft = pytest.importorskip("peft")
    bare = copy.deepcopy(given.model)
    eap.attribute(**vars(given))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = given.model = peft.get_peft_model(bare, config)
    refused(given, "modules")
    given.checkpoint = given.checkpoint.with_name("y.safetensors")
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    eap.attribute(**vars(given))
    eap.attribute(**vars(given))
    for name, change in {
        "weights": lambda: layer.lora_B["default"].weight.data.mul_(2),
        "modules": lambda: layer.scaling.update(default=9.0),
    }.items():
        change()
        with pytest.raises(
            eap.InputError, match=rf"y\.safetensors: expected a checkpoint of .*{name}\.model\.layers\.0"
        ):
            eap.attribute(**vars(given))
        given.checkpoint.unlink()
        eap.attribute(**vars(given))


def test_quantised_weights_count_as_they_are_stored_before_and_after_a_run(make_model, make_pairs):
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(kind, scale=1.0):
        torch.manual_seed(0)
        weights = torch.randn(64, 64) * torch.linspace(1, scale, 64)[:, None]
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False) if kind == 8 else bnb.nn.Linear4bit(64, 64)
        layer.load_state_dict({"weight": weights, "bias": torch.zeros(64)})
        return torch.nn.Sequential(layer.to("cpu"))

    for kind in (8, 4):
        layer = quantised(kind)
        first = model_identity(layer)["weights"]
        layer.train()(torch.randn(2, 64))
        assert model_identity(layer)["weights"] == first == model_identity(quantised(kind))["weights"]
        assert model_identity(quantised(kind, 1.01))["weights"] != first


def test_offloaded_weights_are_those_of_the_model(make_model):
    accelerate = pytest.importorskip("accelerate")
    model = make_model("gpt2", torch.float32)
    first = model_identity(model)
    offloaded = accelerate.cpu_offload(model, torch.device("cpu"))
    assert next(offloaded.transformer.h.parameters()).is_meta
    assert model_identity(offloaded)["weights"] == first["weights"]
    assert model_identity(offloaded)["modules"] == first["modules"]


# Requests.


def test_a_metric_is_part_of_a_request(given):
    eap.attribute(**vars(given), metric=lambda logits, batch: logits[:, 5])
    eap.attribute(**vars(given), metric=lambda logits, batch: logits[:, 5])
    for metric in (lambda logits, batch: -logits[:, 5], plain, "prob_diff"):
        refused(given, "metric", metric=metric)
    given.checkpoint = given.checkpoint.with_name("y.safetensors")
    with pytest.raises(
        eap.InputError, match=r"metric: expected only values whose code .* found generator \(cannot pickle"
    ):
        eap.attribute(**vars(given), metric=closure(1.0, (x for x in ())))
    assert not given.checkpoint.exists()
    given.model.model.norm.register_forward_hook(Hook(fingerprint.sys.stdout))
    with pytest.raises(eap.InputError, match=r"hook on model\.norm: expected only values whose code"):
        eap.attribute(**vars(given))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": "clean-corrupted"}, "method"),
        ({"heads": "query"}, "graph"),
        ({"ablation": "zero"}, r"ablation \('patching', here 'zero'\)"),
        ({"rules": "relp"}, "rules"),
        ({"keep": "variance"}, "keep"),
        ({"compat": "eap-ig"}, "compat"),
    ],
)
def test_settings_are_part_of_a_request(more, words, given):
    eap.attribute(**vars(given))
    refused(given, words, **more)


def test_how_the_work_is_cut_is_not(given):
    right = eap.attribute(**vars(given)).values
    for more in ({"batch_size": 1}, {"memory": "3GB"}, {"reuse_prefix": False}):
        assert torch.equal(eap.attribute(**vars(given), **more).values, right)


def test_another_calls_file_is_refused_and_kept(given):
    scores = eap.attribute(**vars(given))
    circuits, kept = [scores.select(5), scores.select(9)], given.checkpoint.read_bytes()
    with pytest.raises(eap.InputError, match="found another"):
        eap.evaluate(given.model, circuits[0], given.data, checkpoint=given.checkpoint)
    file = given.checkpoint.with_name("x.y.safetensors")
    eap.evaluate(given.model, circuits[0], given.data, checkpoint=file)
    with pytest.raises(eap.InputError, match="found another circuits"):
        eap.evaluate(given.model, circuits, given.data, checkpoint=file)
    saved = given.checkpoint.with_name("scores.safetensors")
    scores.save(saved)
    for content in (b"", b"else", saved.read_bytes(), kept[:-9], kept[:40] + b"x" * 60 + kept[100:]):
        file.write_bytes(content)
        with pytest.raises(eap.InputError, match=r"x\.y\.safetensors: expected a checkpoint"):
            eap.attribute(**{**vars(given), "checkpoint": file})
        assert file.read_bytes() == content
