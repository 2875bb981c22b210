"""eap mib: the submission's folder, what is measured, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

import eap_circuits as eap
from eap_circuits.cli import session
from eap_circuits.tasks import MIB_MODELS
from tests.circuits.cli.conftest import run
from tests.circuits.tasks.test_mib import addition, ioi, tokenizer, written


@pytest.fixture
def rows(tmp_path, monkeypatch, make_model):
    """(rows to score on, rows to run circuits on), beside a tiny model in place of GPT-2."""
    model = make_model("gpt2", torch.float32)
    monkeypatch.setattr(session, "load_model", lambda *_, **__: (model, tokenizer()))
    monkeypatch.setitem(MIB_MODELS, "gpt2", (2, 3))
    people = [("Ann", "Bob", "Cy"), ("Bob", "Cy", "Ann"), ("Cy", "Ann", "Bob")]
    train = written(tmp_path / "train.json", [ioi(*names) for names in people])
    return model, train, written(tmp_path / "validation.json", [ioi(*names) for names in people[1:]])


def test_submission_is_what_the_scripts_of_mib_read(rows, tmp_path):
    model, train, validation = rows
    out = tmp_path / "circuits"
    given = ("--data", train, "--validation", validation, "-n", 2, "--steps", 2, "-o", out)
    found = json.loads(run("mib", "tiny", "ioi_gpt2", *given[:-2], "--out", out, "--json").stdout)
    file = out / "eap-ig-inputs_patching_edge" / "ioi_gpt2" / "importances.json"
    assert found["files"] == {"scores": str(file)} and [x.name for x in file.parent.iterdir()] == [file.name]
    # What load_graph_from_json and Graph.from_json of the benchmark's scripts look up.
    written_down = json.loads(file.read_text())
    graph = eap.EdgeScores.load(file).graph
    assert {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"} <= written_down["cfg"].keys()
    assert written_down["nodes"].keys() == {*graph.senders, "logits"}
    assert all(node["in_graph"] in (True, False) for node in written_down["nodes"].values())
    edges = written_down["edges"]
    assert len(edges) == graph.n_edges and all({"score", "in_graph"} <= edge.keys() for edge in edges.values())
    # Scores are of the first rows only.
    data = eap.PairedDataset.from_mib(train, tokenizer())[:2]
    right = eap.attribute(model, data, steps=2, heads="query")
    u, v = graph.senders.index("a0.h1"), graph.receivers.index("m1")
    assert edges["a0.h1->m1"]["score"] == pytest.approx(float(right.values[u, v]))
    check_areas(found, model, validation, right, graph.n_edges)


def check_areas(found, model, validation, scores, n):
    """CPR and CMD are the areas of MIB's own sum over its shares of all n edges or nodes."""
    held_out = eap.PairedDataset.from_mib(validation, tokenizer())
    for area, signed in (("cpr", True), ("cmd", False)):
        sizes = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
        circuits = [scores.select(int(share * n), signed=signed) for share in sizes]
        kept = [result.faithfulness for result in eap.evaluate(model, circuits, held_out)]
        heights = kept if signed else [abs(1 - f) for f in kept]
        points = pairwise(zip(sizes, heights))
        assert found[area] == pytest.approx(sum((y - x) * (f + g) / 2 for (x, f), (y, g) in points))


def test_levels_of_nodes_and_neurons(rows, tmp_path):
    model, train, validation = rows
    out = tmp_path / "circuits"
    given = ("--data", train, "--validation", validation, "--steps", 2, "--out", out, "--json", "--level")
    right = eap.attribute(model, eap.PairedDataset.from_mib(train, tokenizer()), steps=2, keep="neurons").node_scores()
    found = json.loads(run("mib", "tiny", "ioi_gpt2", *given, "node").stdout)
    file = out / "eap-ig-inputs_patching_node" / "ioi_gpt2" / "importances.json"
    nodes = json.loads(file.read_text())["nodes"]
    assert [nodes[name]["score"] for name in right.graph.senders[1:]] == pytest.approx(right.values[1:].tolist())
    check_areas(found, model, validation, right, 8)  # 2 layers of 3 heads and an MLP
    found = json.loads(run("mib", "tiny", "ioi_gpt2", *given, "neuron").stdout)
    file = out / "eap-ig-inputs_patching_neuron" / "ioi_gpt2" / "importances.pt"
    assert found == {"entry": "ioi_gpt2", "files": {"scores": str(file)}}
    neurons = torch.load(file, weights_only=True)["neurons_scores"]
    torch.testing.assert_close(neurons[1:], right.neurons[1:])
    said = run("mib", "tiny", "ioi_gpt2", *given, "node", "--method", "information-flow-routes", code=2).stderr
    assert "expected a gradient method with --level node" in " ".join(said.split())


def test_both_areas_are_printed(rows, tmp_path):
    _, train, validation = rows
    shown = run("mib", "x", "ioi_gpt2", "--data", train, "--validation", validation, "--out", tmp_path / "c").stdout
    assert "CPR" in shown and "CMD" in shown and "importances.json" in shown


def test_what_is_refused(rows, tmp_path):
    _, train, validation = rows
    sums = written(tmp_path / "sums.json", [addition(1, 2, (2, 3))])
    csv = tmp_path / "pairs.csv"
    csv.write_text("clean,corrupted\n")
    for entry, data, said in (
        ("ioi_gtp2", train, "did you mean 'ioi_gpt2'"),
        ("mcqa_gpt2", train, "ENTRY: expected one of"),
        ("ioi_gpt2", sums, "expected rows of ioi, found rows of arithmetic-addition or"),
        ("ioi_gpt2", csv, "a name ending in .json, .jsonl, .parquet, found '.csv'"),
        ("ioi_gpt2", tmp_path / "none.json", "expected a file"),
        ("ioi_llama3", train, "llama3 of the benchmark, 32 layers of 32 heads"),
    ):
        given = ("--data", data, "--validation", validation, "--out", tmp_path / "c")
        assert said in " ".join(run("mib", "tiny", entry, *given, code=2).stderr.split())
