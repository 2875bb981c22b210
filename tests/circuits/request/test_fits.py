"""Models that make something else of their parts than their table says are refused, or right."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5

import eap_circuits as eap
from bench.pretended import pretending
from bench.processes import ROOT
from eap_circuits.adapters import TESTED, bind
from eap_circuits.forward import logit_tolerance
from eap_circuits.request import fits
from tests.circuits.conftest import pairs_for, prompts, random_circuit


class Scaled(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **given):
        return 0.9 * super().forward(hidden_states, **given)


class Parallel(modeling_llama.LlamaDecoderLayer):
    def forward(self, hidden_states, **given):
        heads, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        return hidden_states + heads + self.mlp(self.post_attention_layernorm(hidden_states))


class Gated(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, **given):
        heads, weights = super().forward(hidden_states, **given)
        return heads * hidden_states.mean(-1, keepdim=True).sigmoid(), weights


class GatedHeads(modeling_llama.LlamaAttention):
    """Multiplies heads by what it makes of the residual stream in another way than by its projections."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **given):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        parts = [each(hidden_states).view(shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)]
        parts[:2] = modeling_llama.apply_rotary_pos_emb(*parts[:2], *position_embeddings)
        attend = modeling_llama.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        heads, weights = attend(self, *parts, attention_mask, scaling=self.scaling)
        return self.o_proj(heads.flatten(-2) * hidden_states.mean(-1, keepdim=True).sigmoid()), weights


class Shifted(modeling_llama.LlamaMLP):
    """Reads the token before, too."""

    def forward(self, x):
        return super().forward(x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


def of_layers(kind, part=""):
    def change(model):
        for layer in model.model.layers:
            layer.get_submodule(part).__class__ = kind

    return change


def sees_everything(model):
    model.config.is_causal = False


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (of_layers(Scaled), r"sum at a1\.h0<v>"),
        (of_layers(Parallel), "sum at m0"),
        (of_layers(Gated, "self_attn"), "sum at m0"),
        (of_layers(GatedHeads, "self_attn"), r"another way from it to a0\.h0"),
        (of_layers(Shifted, "mlp"), "found others"),
        (sees_everything, "expected a causal language model"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_a_table_does_not_say_is_refused(change, found, dtype, make_model, make_pairs):
    model, data = make_model("llama", dtype), make_pairs(n=4)
    # From the first token on, so that no prefix is tried.
    corrupted = data.clean.clone()
    corrupted[:, 0] = (data.clean[:, 0] + 1) % 59
    data = replace(data, corrupted=corrupted)
    circuit = eap.attribute(model, data, method="eap").select(n_edges=40)
    change(model)
    for call in (
        lambda: eap.attribute(model, data, method="eap"),
        lambda: eap.evaluate(model, circuit, data),
    ):
        with pytest.raises(eap.InputError, match=f"LlamaForCausalLM: .*{found}"):
            call()


class ScaledBlock(modeling_t5.T5Block):
    def forward(self, *args, **given):
        stream, *others = super().forward(*args, **given)
        return 0.9 * stream, *others


class ShiftedMLP(modeling_t5.T5DenseActDense):
    """Reads the token before, too."""

    def forward(self, x):
        return super().forward(x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


@pytest.mark.parametrize(
    ("part", "kind", "found"),
    [
        ("encoder.block.0", ScaledBlock, r"sum at enc\.a1\.h0<v>"),
        ("encoder.block.1", ScaledBlock, r"sum at dec\.x1\.h0<v>"),
        ("decoder.block.0", ScaledBlock, r"sum at dec\.a1\.h0<v>"),
        ("decoder.block.1.layer.2.DenseReluDense", ShiftedMLP, "found others"),
        ("decoder", None, "expected a causal decoder"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_encoder_decoders_that_their_table_does_not_describe_are_refused(part, kind, found, dtype, make_model):
    model, data = make_model("t5", dtype), pairs_for("t5", n=4)
    circuit = eap.attribute(model, data, method="eap").select(n_edges=40)
    if kind is None:
        model.get_submodule(part).config.is_causal = False
    else:
        model.get_submodule(part).__class__ = kind
    for call in (
        lambda: eap.attribute(model, data, method="eap"),
        lambda: eap.evaluate(model, circuit, data),
    ):
        with pytest.raises(eap.InputError, match=f"T5ForConditionalGeneration: .*{found}"):
            call()


class Biased(modeling_llama.LlamaForCausalLM):
    def forward(self, *args, **given):
        result = super().forward(*args, **given)
        result.logits = result.logits + torch.linspace(0, 9, self.config.vocab_size).to(result.logits)
        return result


class Masked(modeling_llama.LlamaForCausalLM):
    def forward(self, *args, **given):
        result = super().forward(*args, **given)
        result.logits[..., [57, 58]] = -100.0
        return result


class Normalised(modeling_llama.LlamaForCausalLM):
    def forward(self, *args, **given):
        result = super().forward(*args, **given)
        result.logits = result.logits / result.logits.std(-1, keepdim=True)
        return result


@pytest.mark.parametrize("kind", [Biased, Masked, Normalised])
def test_logits_that_depend_on_all_of_the_heads_are_all_computed(kind, make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=4)
    model.__class__ = kind
    scores = eap.attribute(model, data, method="eap")
    found = eap.evaluate(model, random_circuit(scores.graph, 0, 0.6), data)
    for side, values in enumerate((found.clean_values, found.corrupted_values)):
        for e in range(len(data)):
            with torch.no_grad():
                logits = model(input_ids=prompts(data, e)[side][None]).logits[0, -1]
            good, bad = data.answers[e]
            torch.testing.assert_close(float(values[e]), float(logits[good] - logits[bad]))


def test_a_model_is_looked_at_once_and_again_after_a_change(monkeypatch, make_model, make_pairs):
    seen, trial = [], fits._trial
    monkeypatch.setattr(fits, "_trial", lambda *given: (seen.append(1), trial(*given))[1])
    model, data = make_model("llama"), make_pairs(n=4)
    scores = eap.attribute(model, data, method="eap")
    eap.evaluate(model, scores.select(n_edges=40), data)
    assert len(seen) == 1
    model.model.layers[0].register_forward_hook(lambda *_: None)
    eap.attribute(model, data, method="eap")
    assert len(seen) == 2


def test_products_that_are_rounded_to_bfloat16_may_differ_as_such_weights(make_model, make_pairs):
    """Which takes effect on processors that multiply bfloat16."""
    model = make_model("llama", torch.float32)
    torch.set_float32_matmul_precision("medium")
    try:
        assert logit_tolerance(bind(model)) == logit_tolerance(bind(make_model("llama", torch.bfloat16)))
        eap.attribute(model, make_pairs(), method="eap")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_on_a_gpu_code_that_the_tests_run_is_trusted_and_other_code_is_looked_at(monkeypatch, make_model, make_pairs):
    """There a pass of one prompt takes as long as one of a batch."""
    text = (ROOT / "tests/versions/newest.txt").read_text(encoding="utf-8")
    assert max((int(a), int(b)) for a, b in re.findall(r"^transformers==(\d+)\.(\d+)", text, re.M)) == TESTED
    with pretending():
        model, data = make_model("llama", torch.float32).to("cuda"), make_pairs(n=4)
        monkeypatch.setattr(fits, "_trial", lambda *_: pytest.fail("looked at"))
        eap.attribute(model, data, method="eap", reuse_prefix=False)
        monkeypatch.undo()
        of_layers(Parallel)(model)
        with pytest.raises(eap.InputError, match="sum at m0"):
            eap.attribute(model, data, method="eap", reuse_prefix=False)
