"""Writing files of scores and circuits: whole or not at all; and MIB's layout of nodes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from eap_circuits import Circuit, EdgeScores, Graph, InputError, NodeScores
from eap_circuits.files import write_whole
from tests.circuits.formats.test_formats import GRAPHS, circuit_of


def test_paths_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    circuit = circuit_of(GRAPHS["kv"])
    with pytest.raises(InputError, match=r"a name ending in .*, found '.txt'\.$"):
        circuit.save(tmp_path / "circuit.txt")
    with pytest.raises(InputError, match=r"expected a folder that exists, found no folder '.*none'\.$"):
        circuit.save(tmp_path / "none" / "circuit.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"expected a file to write, found a folder\.$"):
        circuit.save(tmp_path / "folder.json")
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(InputError, match=r"expected a folder that can be written to, found .* cannot\.$"):
            circuit.save(tmp_path / "circuit.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    path.write_text("old")

    def write(file: Path) -> None:
        file.write_text("half of the n")
        raise error

    with pytest.raises((InputError, KeyboardInterrupt)) as caught:
        write_whole(path, write)
    if isinstance(error, OSError):
        assert str(caught.value) == f"{path}: cannot be written (No space left on device)."
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_torch_says_of_a_full_disk_is_told_without_its_sources(tmp_path: Path) -> None:
    said = "[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data: file write failed"

    def write(_: Path) -> None:
        raise RuntimeError(said)

    with pytest.raises(InputError, match=r"cannot be written \(PytorchStreamWriter failed writing file data: "):
        write_whole(tmp_path / "circuit.pt", write)


def test_a_written_file_replaces_the_old_one_and_is_as_readable(tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    path.write_text("old")
    circuit_of(GRAPHS["kv"]).save(path)
    assert Circuit.load(path) == circuit_of(GRAPHS["kv"])
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["circuit.json", "plain"]


@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_scores_of_nodes_and_neurons_are_laid_out_as_mib_reads_them(kind: str, tmp_path: Path) -> None:
    """As its `Graph.from_json` and `Graph.from_pt` look them up; without a score, `input` is in every circuit."""
    graph = GRAPHS[kind]
    neurons = torch.randn(graph.n_senders, graph.d_model, generator=torch.Generator().manual_seed(0))
    scores = NodeScores(graph, neurons.sum(1), neurons, {"method": "eap"})
    scores.save(tmp_path / "importances.json"), scores.save(tmp_path / "importances.pt")
    found = json.loads((tmp_path / "importances.json").read_text(encoding="utf-8"))
    query = graph.with_heads("query")
    assert {"n_layers", "n_heads", "parallel_attn_mlp", "d_model"} <= found["cfg"].keys()
    assert [*found["nodes"]] == [*graph.senders, "logits"]
    said = [node.get("score") for node in found["nodes"].values()]
    assert said[0] is None and said[-1] is None and said[1:-1] == pytest.approx(scores.values[1:].tolist())
    assert found["edges"].keys() == {query.edge_name(u, v) for u, v in query.edge_mask.nonzero().tolist()}
    assert not any(edge["score"] or edge["in_graph"] for edge in found["edges"].values())
    tensors = torch.load(tmp_path / "importances.pt", weights_only=True)
    assert tensors["neurons_scores"][0].isnan().all() and tensors["neurons_scores"][1:].equal(neurons[1:])
    assert tensors["neurons_in_graph"].dtype == torch.bool and tensors["neurons_in_graph"].shape == neurons.shape
    assert tensors["edges_scores"].shape == query.edge_mask.shape == tensors["edges_in_graph"].shape
    assert tensors["src_nodes"] == graph.senders and tensors["nodes_in_graph"].shape == (graph.n_senders,)


def test_scores_of_nodes_are_not_taken_for_those_of_edges(tmp_path: Path) -> None:
    graph = GRAPHS["query"]
    nodes = NodeScores(graph, torch.ones(graph.n_senders))
    nodes.save(tmp_path / "nodes.json")
    with pytest.raises(InputError, match="expected scores of edges, or a circuit, found scores of nodes only"):
        EdgeScores.load(tmp_path / "nodes.json")
    with pytest.raises(InputError, match=r'nodes.pt: expected scores of attribute\(keep="neurons"\)'):
        nodes.save(tmp_path / "nodes.pt")
    with pytest.raises(InputError, match="the same number of heads in every layer"):
        NodeScores(Graph((2, 4), (1, 2), 8), torch.ones(9)).save(tmp_path / "nodes.json")
