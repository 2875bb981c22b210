"""Pairs from files that name pictures, against what the processor makes of the pictures themselves."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText

import eap_circuits as eap
from tests.circuits.adapters.pictured import MARK, draw, processor, write
from tests.circuits.adapters.test_pictures import build
from tests.circuits.cli.conftest import run

ASKED = f"{MARK} what is this"
PAIR = {"clean": ASKED, "clean_image": "cat.png", "corrupted_image": "dog.png", "answers": ["cat", "dog"]}


@pytest.fixture(scope="module")
def model():
    return build("llava")


@pytest.fixture
def pictures(tmp_path):
    return draw(tmp_path, "cat.png", "dog.png")


def inputs(texts, pictures):
    return processor()(text=texts, images=pictures, return_tensors="pt", padding=True)


def assert_same(found, right):
    """The same tokens, but for the numbers of those of pictures, and the same embeddings."""
    for side in ("clean", "corrupted"):
        one, other = (getattr(each, side) for each in (found, right))
        embedded = [
            each.pictures.embed(ids, lambda x: x[..., None].double()) for each, ids in ((found, one), (right, other))
        ]
        torch.testing.assert_close(*embedded, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.answers, right.answers) and torch.equal(found.lengths, right.lengths)


def test_a_file_is_what_the_processor_makes_of_it(model, pictures, tmp_path):
    cat, dog = pictures
    longer = {**PAIR, "clean": f"what a {MARK} is this a", "corrupted": f"what a {MARK} is that a", "weight": 2}
    path = write(tmp_path / "pairs.jsonl", PAIR, longer)
    found = eap.image_pairs_from_file(model, path, processor())
    right = eap.image_pairs(
        model,
        inputs([ASKED, longer["clean"]], [[cat], [cat]]),
        inputs([ASKED, longer["corrupted"]], [[dog], [dog]]),
        [[8, 9]] * 2,
    )
    assert_same(found, right)
    assert found.name == "pairs" and found.prompts[1] == (longer["clean"], longer["corrupted"])
    assert found.weights.tolist() == [1, 2]


def test_messages_and_several_pictures(model, pictures, tmp_path):
    def asked(*parts):
        return [
            {"role": "user", "content": [{"type": p} if p == "image" else {"type": "text", "text": p} for p in parts]}
        ]

    record = {**PAIR, "clean": asked("image", "is", "image"), "clean_image": ["cat.png", "dog.png"]}
    record["corrupted_image"] = ["dog.png", "dog.png"]
    cat, dog = pictures
    found = eap.image_pairs_from_file(model, write(tmp_path / "pairs.json", [record]), processor())
    text = f"user : {MARK} is {MARK} "  # BOS comes from the tokenizer, and from the template, but once
    right = eap.image_pairs(model, inputs([text], [[cat, dog]]), inputs([text], [[dog, dog]]), [[8, 9]])
    assert_same(found, right)


def test_what_is_missing_is_the_clean_prompts(model, pictures, tmp_path):
    other = {**PAIR, "corrupted": f"{MARK} what is that", "corrupted_image": None}
    found = eap.image_pairs_from_file(model, write(tmp_path / "pairs.jsonl", other), processor())
    differ = (found.clean != found.corrupted).nonzero()[:, 1]
    assert differ.tolist() == [7]  # behind BOS, four tokens of the one picture, and two words


def test_a_table_holds_them_too(model, pictures, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(f"clean,clean_image,corrupted_image,good,bad\n{ASKED},cat.png,\"['dog.png']\",cat,dog\n")
    found = eap.image_pairs_from_file(model, path, processor())
    assert_same(found, eap.image_pairs_from_file(model, write(tmp_path / "pairs.jsonl", PAIR), processor()))


def test_unequal_lengths_are_aligned_if_asked(model, pictures, tmp_path):
    path = write(tmp_path / "pairs.jsonl", {**PAIR, "corrupted": f"{MARK} what is is this"})
    with pytest.raises(eap.InputError, match=r"line 1: expected the same number of tokens .*, found 8 and 9\.$"):
        eap.image_pairs_from_file(model, path, processor())
    pairs = eap.image_pairs_from_file(model, path, processor(), align=True)
    graph = eap.attribute(model, pairs, method="eap").graph
    full, none = (eap.Circuit.from_mask(graph, graph.edge_mask & kept) for kept in (True, False))
    results = eap.evaluate(model, [full, none], pairs)
    cat, dog = pictures
    for text, picture, result in ((ASKED, cat, results[0]), (f"{MARK} what is is this", dog, results[1])):
        given = inputs([text], [[picture]])
        with torch.no_grad():
            logits = model(**{**given, "pixel_values": given["pixel_values"].double()}).logits[0, -1]
        assert result.mean == pytest.approx(float(logits[8] - logits[9]), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"corrupted_image": "bird.png"},
            r"line 2, corrupted_image: expected a file that exists, found no file '.*'\.$",
        ),
        (
            {"clean_image": "pairs.jsonl"},
            r"line 2, clean_image: expected a picture in 'pairs.jsonl', found none that can be read \(Unid",
        ),
        (
            {"clean_image": "cut.png"},
            r"line 2, clean_image: expected a picture in 'cut.png', found none that can be read \(OSError\)\.$",
        ),
        (
            {"clean_image": None},
            r"line 2, clean_image: expected the name of a picture's file, or a list of them, found N",
        ),
        (
            {"clean": "what is"},
            r"line 2, clean: expected a prompt that the processor takes, found another \(The total .*",
        ),
        ({"clean": [{"role": "user"}]}, r"line 2, clean: expected messages, each with role and content, found "),
        ({"corrupted_image": None}, r"line 2: expected corrupted or corrupted_image, found neither\.$"),
        (
            {"answers": ["cow", "dog"]},
            r"line 2, good answer: expected an answer in the tokenizer's vocabulary, found 'cow",
        ),
        ({"clean": None}, r"line 2, clean: expected a prompt, found NoneType\.$"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(model, pictures, tmp_path, change, message):
    (tmp_path / "cut.png").write_bytes((tmp_path / "cat.png").read_bytes()[:400])
    path = write(tmp_path / "pairs.jsonl", PAIR, {**PAIR, **change})
    with pytest.raises(eap.InputError, match=message) as found:
        eap.image_pairs_from_file(model, path, processor())
    assert "\n" not in str(found.value)


def test_scored_positions_and_spans_are_refused(model, pictures, tmp_path):
    for extra in ({"scored": [-1]}, {"span_tokens": {"a": [0]}}, {"decoder": ""}):
        path = write(tmp_path / "pairs.jsonl", {**PAIR, **extra})
        with pytest.raises(
            eap.InputError, match="line 1: expected prompts with pictures that one answer follows, found "
        ):
            eap.image_pairs_from_file(model, path, processor())


def test_texts_alone_and_pictures_are_told_apart(model, pictures, tmp_path, monkeypatch):
    path = write(tmp_path / "pairs.jsonl", PAIR)
    tokenizer = processor().tokenizer
    with pytest.raises(
        eap.InputError, match=r"line 1: expected texts alone \(image_pairs_from_file takes pictures\), f"
    ):
        eap.PairedDataset.from_file(path, tokenizer)
    with pytest.raises(
        eap.InputError, match=r"^processor: expected the model's, which takes texts and pictures, found Tok"
    ):
        eap.image_pairs_from_file(model, path, tokenizer)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(eap.InputError, match=r"pictures: expected PIL.Image \(pip install pillow\), found none\.$"):
        eap.image_pairs_from_file(model, path, processor())


def test_commands_take_files_that_name_pictures(model, pictures, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    data = write(tmp_path / "pairs.jsonl", PAIR, {**PAIR, "clean": f"is this a {MARK} what is"})
    scores, curve, page = (tmp_path / name for name in ("scores.safetensors", "curve.json", "report.html"))
    run("attribute", folder, "--data", data, "-o", scores, "--method", "eap")
    pairs = eap.image_pairs_from_file(AutoModelForImageTextToText.from_pretrained(folder), data, processor())
    torch.testing.assert_close(eap.EdgeScores.load(scores).values, eap.attribute(model, pairs, method="eap").values)
    given = ["--data", data, "--ablation", "mean", "--ablation-data", data, "--fractions", "0.1,1"]
    run("curve", folder, scores, *given, "-o", curve, "--draws", 1)
    assert json.loads(curve.read_text())
    run("report", scores, "--curve", curve, "-o", page, "--edges", 5)
    assert "faithfulness" in page.read_text()
    out = ("--data", data, "--out", tmp_path)
    run("leaderboard", folder, *out, "--methods", "eap", "--scored", 1, "-n", 1, "--seeds", 1)
    run("reproduce", folder, *out, "--scored", 1, "-n", 1, "--draws", 1)
    assert (
        "pairs" in (tmp_path / "leaderboard.md").read_text() and "pairs" in (tmp_path / "reproduction.md").read_text()
    )
    shown = run("data", folder, "--data", data, "--json")
    assert json.loads(shown.stdout)["pairs"] == 2
    processor().tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").unlink()
    assert "processor" in run("data", folder, "--data", data, code=2).stderr
