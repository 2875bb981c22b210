"""Hooks of one's own may go by a token's place: each prompt runs as it does alone in the plain model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import eap_circuits as eap
from eap_circuits.adapters import bind
from tests.circuits.conftest import logit_difference, pairs_for, prompts, random_circuit


def at(place, share=0.5):
    """A hook that adds to a share of the output at some tokens."""

    def hook(_, __, output):
        whole = output[0] if isinstance(output, tuple) else output
        new = whole.clone()
        new[:, place] = share * new[:, place] + 1
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


HOOKS = {
    "the last token of a layer": lambda model: model.model.layers[1].register_forward_hook(at(-1, 1)),
    "a token of an MLP": lambda model: model.model.layers[0].mlp.register_forward_hook(at(2)),
    "a token of the last MLP": lambda model: model.model.layers[2].mlp.register_forward_hook(at(0)),
    "inside the last MLP": lambda model: model.model.layers[2].mlp.up_proj.register_forward_hook(at(slice(0, 4))),
    "embeddings": lambda model: model.model.embed_tokens.register_forward_hook(at(slice(1, 3))),
}


def by_hand(model, data):
    """The metric of both prompts of each pair, and the mean of Σ_t ⟨e(x') − e(x), ∂loss/∂e(x)⟩, of embeddings e."""
    values, score = torch.empty(2, len(data), dtype=torch.float64), 0.0
    for e in range(len(data)):
        clean, corrupted = (model.get_input_embeddings()(x[None]).detach() for x in prompts(data, e))
        clean.requires_grad_()
        for side, x in enumerate((clean, corrupted)):
            found = logit_difference(model(inputs_embeds=x).logits[0, -1], data, e)
            values[side, e] = found.detach()
            if x is clean:
                (slope,) = torch.autograd.grad(-found, x)
                score += float(((corrupted - clean.detach()) * slope).sum()) / len(data)
    return values, score


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_sees_each_token_where_it_stands(hook, make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=6)
    HOOKS[hook](model)
    assert len(data.lengths.unique()) > 2
    (clean, corrupted), score = by_hand(model, data)
    scores = eap.attribute(model, data, method="eap")
    assert float(scores.node_scores().values[0]) == pytest.approx(score, rel=1e-5)
    every = eap.Circuit.from_mask(scores.graph, scores.graph.edge_mask)
    for more in ({}, {"batch_size": 3}, {"memory": 1}):
        for circuit, right in ((every, clean), (every.complement(), corrupted)):
            torch.testing.assert_close(eap.evaluate(model, circuit, data, **more).values, right)
    torch.testing.assert_close(eap.evaluate(model, every, data, ablation="mean").values, clean)
    torch.testing.assert_close(eap.attribute_circuit(model, every, data).values, scores.values)


def before(_, args):
    return (args[0] + 1, *args[1:])


def before_in_place(_, args):
    args[0].add_(1)


def behind(_, __, output):
    return (output[0] + 1, *output[1:]) if isinstance(output, tuple) else output + 1


@pytest.mark.parametrize("hook", [before, before_in_place])
@pytest.mark.parametrize("method", ["eap-ig-inputs", "eap-ig-activations", "exact"])
def test_a_hook_between_layers_is_one_wherever_a_run_starts(method, hook, make_model, make_pairs):
    """Before a layer it computes what a hook behind the one before it does, or behind the embeddings."""
    data, found = make_pairs(n=3), []
    for hooked in (True, False):
        model = make_model("llama")
        first, second, _ = model.model.layers
        for one, other in ((model.model.embed_tokens, first), (first, second)):
            other.register_forward_pre_hook(hook) if hooked else one.register_forward_hook(behind)
        found.append(eap.attribute(model, data, method=method).values)
    torch.testing.assert_close(*found)


def test_a_hook_may_change_its_mind_between_calls(make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=6)
    where = [slice(0, 0)]
    model.model.layers[1].register_forward_hook(lambda *given: at(where[0], 1)(*given))
    for where[0] in (slice(0, 0), slice(1, 3), -1):
        result = eap.evaluate(model, eap.attribute(model, data, method="eap").select(30), data)
        torch.testing.assert_close(result.clean_values, by_hand(model, data)[0][0])


def scaled(_, given, output=None):
    given = given if output is None else output
    return (1.5 * given[0], *given[1:]) if isinstance(given, tuple) else 1.5 * given


def hook_up(model, where, before):
    module = model.get_submodule(where)
    (module.register_forward_pre_hook if before else module.register_forward_hook)(scaled)


FIRST, LAST = "model.layers.1", "model.layers.2"


@pytest.mark.parametrize(
    ("where", "before", "weight"),
    [
        (f"{FIRST}.self_attn.o_proj", True, f"{FIRST}.self_attn.o_proj"),  # what heads write
        (f"{FIRST}.mlp", False, f"{FIRST}.mlp.down_proj"),
        (f"{LAST}.mlp.down_proj", True, f"{LAST}.mlp.down_proj"),
        ("model.embed_tokens", False, "model.embed_tokens"),
        ("lm_head", True, "lm_head"),
    ],
)
def test_a_hook_that_scales_is_other_weights(where, before, weight, make_model, make_pairs):
    hooked, right = make_model("llama"), make_model("llama")
    hook_up(hooked, where, before)
    with torch.no_grad():
        right.get_submodule(weight).weight.mul_(1.5)
    data = make_pairs(n=3)
    scores = [eap.attribute(model, data, steps=2) for model in (hooked, right)]
    torch.testing.assert_close(scores[0].values, scores[1].values)
    circuit = random_circuit(scores[0].graph, 0, 0.5)
    for ablation in ("patching", "mean"):
        found = [eap.evaluate(model, circuit, data, ablation=ablation).values for model in (hooked, right)]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("where", "before"),
    [
        *((f"{FIRST}.self_attn.{name}_proj", False) for name in "qkvo"),
        *((f"{FIRST}.{name}", True) for name in ("self_attn.q_proj", "mlp", "input_layernorm")),
        *((name, False) for name in (FIRST, f"{FIRST}.self_attn", f"{FIRST}.post_attention_layernorm", "model.norm")),
    ],
)
def test_a_hook_that_contributions_cannot_be_told_of_is_refused(where, before, make_model, make_pairs):
    model, data = make_model("llama"), make_pairs(n=3)
    circuit = eap.attribute(model, data, method="eap").select(20)
    runs = eap.circuit_model(model, circuit, "zero")
    runs(data.clean[:1, :3])
    hook_up(model, where, before)
    wanted = f"model: expected a hook {'before' if before else 'on'} {where} that adds the same to whatever it is given"
    for call in (
        lambda: eap.attribute(model, data, steps=2),
        lambda: eap.evaluate(model, circuit, data),
        lambda: runs(data.clean[:1, :3]),
    ):
        with pytest.raises(eap.InputError, match=wanted):
            call()


SIDES = ["encoder", "decoder"]


@pytest.mark.parametrize("side", SIDES)
def test_a_hook_sees_each_token_of_either_side_where_it_stands(side, make_model):
    model, data = make_model("t5"), pairs_for("t5", n=4)
    data = replace(data, clean=data.clean[[1] * 4], corrupted=data.corrupted[[1] * 4], lengths=data.lengths[[1] * 4])
    model.get_submodule(f"{side}.block.1").register_forward_hook(at(-1, 1))
    right, start = [], torch.tensor([model.config.decoder_start_token_id])
    for e, own in enumerate(data.decoder):
        read = torch.cat([start, own[own >= 0]])
        with torch.no_grad():
            logits = model(input_ids=prompts(data, e)[0][None], decoder_input_ids=read[None]).logits[0, -1]
        right.append(float(logit_difference(logits, data, e)))
    scores = eap.attribute(model, data, method="eap")
    every = eap.Circuit.from_mask(scores.graph, scores.graph.edge_mask)
    for ablation in ("patching", "mean"):
        assert eap.evaluate(model, every, data, ablation=ablation).values.tolist() == pytest.approx(right, rel=1e-6)
    torch.testing.assert_close(eap.attribute_circuit(model, every, data).values, scores.values)


@pytest.mark.parametrize("where", ["encoder.final_layer_norm", "decoder.block.0.layer.0.SelfAttention.v"])
def test_a_hook_that_scales_what_one_side_reads_of_the_other_or_of_its_own_tokens_is_refused(where, make_model):
    model = make_model("t5")
    hook_up(model, where, False)
    with pytest.raises(eap.InputError, match=f"model: expected a hook on {where} that adds the same"):
        eap.attribute(model, pairs_for("t5"), method="eap", ablation="zero")


@pytest.mark.parametrize("kind", ["gpt2", "gpt-neox", "llama"])
def test_a_hook_may_change_in_place_what_it_is_given(kind, make_model, relative):
    model, tokens = make_model(kind), torch.arange(24).view(3, 8)
    corrupted = tokens.clone()
    corrupted[:, 6] += 1  # most tokens are the same, so that linear layers give no gradient there
    data = eap.PairedDataset.from_tokens(tokens, corrupted, [8, 8, 8], [[1, 2]] * 3)
    mlp = next(module for name, module in model.named_modules() if name.endswith("1.mlp"))

    def add(_, __, y):
        y[:, -2] += 1

    found = []
    for hook in (add, at(-2, 1)):
        handle = mlp.register_forward_hook(hook)
        found.append(eap.attribute(model, data, method="eap").values)
        handle.remove()
    assert relative(*found) < 1e-6


RUNS = {
    "a logit lens": lambda model, x: model.lm_head(model.model.norm(x)),
    "a layer's MLP": lambda model, x: model.model.layers[2].mlp(x),
    "all of it": lambda model, x: model(inputs_embeds=x).logits,
}


@pytest.mark.parametrize("what", RUNS)
def test_what_a_hook_runs_of_the_model_is_no_part_of_the_calls_run(what, make_model, make_pairs, relative):
    model, data, seen = make_model("llama"), make_pairs(n=3), []
    circuits = [random_circuit(bind(model).graph("kv"), seed, 0.5) for seed in (0, 1)]
    calls = [
        lambda: eap.attribute(model, data, method="eap").values,
        lambda: eap.attribute(model, data, method="eap-ig-activations", steps=1).values,
        lambda: eap.attribute(model, data, method="exact", edges=random_circuit(circuits[0].graph, 2, 0.05)).values,
        lambda: torch.stack([result.values for result in eap.evaluate(model, circuits, data)]),
        lambda: torch.stack([result.values for result in eap.evaluate(model, circuits, data, ablation="mean")]),
        lambda: eap.attribute_circuit(model, circuits[0], data).values,
    ]

    def hook(_, __, output):
        if seen and seen[-1] is None:
            return
        seen.append(None)
        x = (output[0] if isinstance(output, tuple) else output).detach()
        with torch.no_grad():
            seen[-1] = x, RUNS[what](model, x)

    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    right = [call() for call in calls]
    handle.remove()
    handle = model.model.layers[0].register_forward_hook(hook)
    for call, values in zip(calls, right, strict=True):
        assert relative(call(), values) < 1e-6
    handle.remove()
    assert len(seen) > 20
    with torch.no_grad():
        for x, found in seen:
            assert torch.equal(found, RUNS[what](model, x))
