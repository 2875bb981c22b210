"""Pairs of prompts with pictures, against plain runs of the model with the pictures themselves."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import eap_circuits as eap
from bench.pretended import pretending
from eap_circuits.adapters import pretrained
from eap_circuits.request import prepare
from eap_circuits.selfcheck import StayDouble
from tests.circuits.cli.conftest import run
from tests.circuits.conftest import random_edges, tiny_model
from tests.circuits.hybrids import PICTURED as PLACE
from tests.circuits.hybrids import PICTURES

PADDING = 0
ANSWERS = [[3, 4], [5, 6], [7, 8]]


@pytest.fixture(scope="module", params=[*PICTURES])
def model(request):
    return build(request.param)


def build(kind):
    torch.manual_seed(0)
    model_type, fields = PICTURES[kind]
    config = AutoConfig.for_model(model_type, **copy.deepcopy(fields))
    found = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return found.double().eval()


def seen(model, seed, text=0, padding="right"):
    """What a processor returns for three prompts: text, four tokens of a picture, and text of two lengths."""
    drawn = torch.Generator().manual_seed(seed)
    words = torch.randint(1, PLACE, (3, 7), generator=torch.Generator().manual_seed(text))
    ids = torch.cat([words[:, :2], torch.full((3, 4), PLACE), words[:, 2:]], 1)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    if padding == "left":
        mask, ids = mask.flip(1), torch.stack([row.roll(2) if n == 1 else row for n, row in enumerate(ids)])
    ids = ids.where(mask == 1, PADDING)
    given = {"input_ids": ids, "attention_mask": mask}
    if "qwen" in model.config.model_type:  # two by two tokens of two by two patches each
        given["pixel_values"] = torch.randn(3 * 16, 24, generator=drawn, dtype=torch.float64)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 3)
        given["mm_token_type_ids"] = (ids == PLACE).long()
        return given
    given["pixel_values"] = torch.randn(3, 3, 28, 28, generator=drawn, dtype=torch.float64)
    if model.config.model_type == "gemma3":
        given["token_type_ids"] = (ids == PLACE).long()
    return given


def alone(given, e):
    """What the model is given of one prompt, without padding."""
    real = given["attention_mask"][e].bool()
    own = {name: x[[e]][:, real] for name, x in given.items() if name.endswith(("ids", "mask"))}
    rows = len(given["pixel_values"]) // 3
    own["pixel_values"] = given["pixel_values"][e * rows : (e + 1) * rows]
    return own | {name: x[[e]] for name, x in given.items() if name.endswith("thw")}


def differences(model, given):
    """The model's own logit differences, prompt by prompt, without padding; and what its first layer reads."""
    first, read, found = eap.adapters.bind(model).layers[0].module, [], []
    hook = first.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    for e, (good, bad) in enumerate(ANSWERS):
        logits = model(**alone(given, e), use_cache=False).logits[0, -1]
        found.append(logits[good] - logits[bad])
    hook.remove()
    return torch.stack(found), read


def test_self_check_passes(model):
    assert all(check.passed for check in eap.check_model(model, n_edges=3))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_clean_and_corrupted_runs_are_the_models_own(model, padding):
    clean, corrupted = (seen(model, seed, padding=padding) for seed in (1, 2))
    pairs = eap.image_pairs(model, clean, corrupted, ANSWERS)
    scores = eap.attribute(model, pairs, method="eap")
    graph = scores.graph
    full, none = (eap.Circuit.from_mask(graph, graph.edge_mask & kept) for kept in (True, False))
    results = eap.evaluate(model, [full, none], pairs)
    for given, result in ((clean, results[0]), (corrupted, results[1])):
        torch.testing.assert_close(result.values.double(), differences(model, given)[0].detach(), rtol=1e-6, atol=1e-7)


def test_what_the_picture_writes_is_part_of_input(model):
    """The scores of `input`'s edges add up to ⟨x' − x, ∂loss/∂x⟩ of what the first layer reads."""
    clean, corrupted = seen(model, 1), seen(model, 2)
    pairs = eap.image_pairs(model, clean, corrupted, ANSWERS)
    found = eap.attribute(model, pairs, method="eap").values[0].sum()
    plain, read = differences(model, clean)
    _, other = differences(model, corrupted)
    gradients = torch.autograd.grad(-plain.sum(), read)
    right = sum(((y - x) * g).sum() for x, y, g in zip(read, other, gradients, strict=True)) / len(read)
    torch.testing.assert_close(found.double(), right.detach(), rtol=1e-5, atol=1e-8)


def test_an_edge_alone_corrupted_is_the_circuit_without_it(model):
    pairs = eap.image_pairs(model, seen(model, 1), seen(model, 2, text=5), ANSWERS)
    scores = eap.attribute(model, pairs, method="exact")
    graph, edges = scores.graph, random_edges(scores.graph, 4)
    circuits = []
    for edge in edges:
        mask = graph.edge_mask.clone()
        mask[edge] = False
        circuits.append(eap.Circuit.from_mask(graph, mask))
    found = torch.tensor([r.clean - r.mean for r in eap.evaluate(model, circuits, pairs)])
    right = torch.stack([scores.values[edge] for edge in edges])
    assert (found - right).abs().max() < 1e-5 * scores.values.abs().max()


@pytest.mark.parametrize("method", ["eap-ig-activations", "eap-conductance", "eap-gp", "information-flow-routes"])
def test_methods_and_ablations_take_them(model, method):
    pairs = eap.image_pairs(model, seen(model, 1), seen(model, 2), ANSWERS)
    scores = eap.attribute(model, pairs, method=method)
    assert scores.values.isfinite().all() and scores.values.any()
    full = eap.Circuit.from_mask(scores.graph, scores.graph.edge_mask)
    for ablation in ("zero", "mean"):
        assert eap.evaluate(model, full, pairs, ablation=ablation).faithfulness == pytest.approx(1, abs=1e-6)


def test_pictures_are_sent_to_a_device_once_a_call(model):
    pairs = eap.image_pairs(model, seen(model, 1), seen(model, 2), ANSWERS)
    with pretending():
        request = prepare(copy.deepcopy(model).cuda(), pairs, None, batch_size=1)
        found = {id(batch.pictures.embeddings) for batch in request.batches(100)}
        assert found == {id(request.data.pictures.embeddings)} and request.data.pictures.embeddings.is_cuda
    assert pairs.pictures.embeddings.is_cpu


def test_pictures_are_tokens_that_differ(model, tmp_path):
    clean, corrupted = seen(model, 1), seen(model, 2)
    pairs = eap.image_pairs(model, clean, corrupted, ANSWERS)
    differ = (pairs.clean != pairs.corrupted).nonzero()
    assert {position for _, position in differ.tolist()} == {2, 3, 4, 5} and pairs.first_difference.tolist() == [2] * 3
    same = eap.image_pairs(model, clean, seen(model, 1, text=5), ANSWERS)
    assert torch.equal(same.clean[:, 2:6], same.corrupted[:, 2:6])
    if same.pictures.types:  # where they see each other, none of them is before a difference in another
        later = replace(pairs, corrupted=pairs.clean.clone().index_fill_(1, torch.tensor([4]), PLACE))
        assert later.first_difference.tolist() == [2] * 3
    pairs.save(tmp_path / "pairs.safetensors")
    again = eap.PairedDataset.from_file(tmp_path / "pairs.safetensors")
    both = [eap.attribute(model, data, method="eap").values for data in (pairs, again)]
    assert torch.equal(*both) and eap.attribute(model, pairs[[0, 2]], method="eap").values.any()


def test_commands_take_saved_pairs(model, tmp_path, monkeypatch):
    pairs = eap.image_pairs(model, seen(model, 1), seen(model, 2), ANSWERS)
    pairs.save(tmp_path / "pairs.safetensors")
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(pretrained, "load_tokenizer", lambda *_, **__: None)
    out = tmp_path / "scores.safetensors"
    run("attribute", tmp_path / "model", "--data", tmp_path / "pairs.safetensors", "-o", out, "--method", "eap")
    torch.testing.assert_close(eap.EdgeScores.load(out).values, eap.attribute(model, pairs, method="eap").values)


def test_what_is_no_picture_in_place_of_tokens_is_refused(model):
    clean, corrupted = seen(model, 1), seen(model, 2)
    text = {"input_ids": clean["input_ids"] % 5 + 1}
    with pytest.raises(eap.InputError, match=r"^corrupted: expected prompts in which pictures stand .*, found none\.$"):
        eap.image_pairs(model, clean, text, ANSWERS)
    with pytest.raises(eap.InputError, match=r"^clean's input_ids: expected"):
        eap.image_pairs(model, {}, clean, ANSWERS)
    pairs = eap.image_pairs(model, clean, corrupted, ANSWERS)
    with pytest.raises(eap.InputError, match=r"^data: expected pictures as .*, found ids from \d+, width 24\.$"):
        eap.attribute(tiny_model("gpt2"), replace(pairs, pictures=replace(pairs.pictures, first=70)), method="eap")


def test_a_model_that_reads_tokens_in_other_ways_is_refused_before_it_runs():
    with pytest.raises(
        eap.InputError, match=r"^model: expected a model in which pictures only .*, which reads tokens in"
    ):
        eap.image_pairs(tiny_model("gemma4"), {}, {}, ANSWERS)  # per-layer embeddings


def test_a_picture_that_changes_the_mask_unsaid_is_refused():
    """Gemma 3 marks the first three of its four tokens, which then see each other, and not the last."""
    model = build("gemma3")
    clean, corrupted = seen(model, 1), seen(model, 2)
    for given in (clean, corrupted):
        given["token_type_ids"] = given["token_type_ids"] * (torch.arange(11) < 5)
    with pytest.raises(eap.InputError, match=r"^model: expected a model in which pictures only stand .*, found \w+, w"):
        eap.image_pairs(model, clean, corrupted, ANSWERS)


def metric_with_stack(model, given, other, index, share):
    """The model's own mean difference of logits, with what another picture adds behind a layer in place of a share."""
    changed, body = [], model.model.language_model

    def keep(_, __, kwargs):
        changed.append(kwargs["deepstack_visual_embeds"])

    def change(_, __, kwargs):
        own = list(kwargs["deepstack_visual_embeds"])
        own[index] = torch.lerp(own[index], changed.pop(0)[index], share)
        return (), {**kwargs, "deepstack_visual_embeds": own}

    with torch.no_grad():
        for hook, each in ((keep, other), (change, given)):
            handle = body.register_forward_pre_hook(hook, with_kwargs=True)
            values, _ = differences(model, each)
            handle.remove()
    return float(values.mean())


@pytest.mark.parametrize("index", [0, 1])
def test_what_pictures_write_behind_layers_is_a_node(index):
    """Its edges together: to patch them is to patch the model's own argument, and their scores are its derivative."""
    model = build("qwen3-vl")
    clean, corrupted = seen(model, 1), seen(model, 2)
    with StayDouble():
        pairs = eap.image_pairs(model, clean, corrupted, ANSWERS)
        scores = eap.attribute(model, pairs, method="eap")
        graph = scores.graph
        sender, receiver = graph.senders.index(f"p{index}"), graph.receivers.index(f"p{index}")
        kept = graph.edge_mask.clone()
        kept[sender] = False
        found = eap.evaluate(model, eap.Circuit.from_mask(graph, kept), pairs).mean
        assert found == pytest.approx(metric_with_stack(model, clean, corrupted, index, 1.0), rel=1e-9)
        step = 1e-5
        up, down = (metric_with_stack(model, clean, corrupted, index, share) for share in (step, -step))
        assert float(scores.values[sender].sum()) == pytest.approx(-(up - down) / (2 * step), rel=1e-5)
    assert not scores.values[:, receiver].any()  # it reads the tokens alone


@pytest.mark.parametrize("kind", ["qwen2-vl", "qwen2-5-vl", "qwen3-vl"])
def test_positions_of_several_pictures_are_the_models_own(kind):
    """Tokens of pictures stand on rows and columns, and the text behind is as much nearer as these overlap."""
    model = build(kind)
    ids = torch.tensor([[1, PLACE, PLACE, PLACE, PLACE, 2, 3, PLACE, PLACE, 4, 5]])
    given = {"input_ids": ids, "mm_token_type_ids": (ids == PLACE).long()}
    given["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 2, 4]])
    drawn = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    clean, other = ({**given, "pixel_values": torch.randn(24, 24, generator=g, dtype=torch.float64)} for g in drawn)
    pairs = eap.image_pairs(model, clean, other, ANSWERS[:1])
    right = [[0, 1, 1, 1, 1, 3, 4, 5, 5, 7, 8], [0, 1, 1, 2, 2, 3, 4, 5, 5, 7, 8], [0, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert pairs.pictures.arguments(pairs.clean)["position_ids"][:, 0].tolist() == right
    assert eap.attribute(model, pairs, method="eap").values[0].any()
