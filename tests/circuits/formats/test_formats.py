"""Files of scores and circuits: round trips, EAP-IG's own layout, and everything that is not one of them."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eap_circuits import Circuit, EdgeScores, Graph, InputError
from eap_circuits.errors import InputWarning

SUFFIXES = [".safetensors", ".json", ".pt"]
GRAPHS = {
    "query": Graph((4, 4), (2, 2), 16, heads="query"),
    "kv": Graph((4, 4), (2, 2), 16),
    "parallel": Graph((4, 4), (4, 4), 16, parallel=True, heads="query"),
    "parallel-kv": Graph((4, 4), (1, 1), 16, parallel=True),
}


def values_of(graph: Graph) -> Tensor:
    noise = torch.randn(graph.edge_mask.shape, generator=torch.Generator().manual_seed(0))
    return noise.masked_fill(~graph.edge_mask, 0)


def circuit_of(graph: Graph) -> Circuit:
    circuit = EdgeScores(graph, values_of(graph), {"method": "eap", "steps": 5}).select(40)
    assert circuit.n_edges > 3
    return circuit


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_scores_come_back(kind: str, suffix: str, tmp_path: Path) -> None:
    scores = EdgeScores(GRAPHS[kind], values_of(GRAPHS[kind]), {"method": "eap", "steps": 5})
    scores.save(tmp_path / f"scores{suffix}")
    loaded = EdgeScores.load(tmp_path / f"scores{suffix}")
    assert loaded.graph == scores.graph
    assert torch.allclose(loaded.values, scores.values, rtol=1e-6)
    assert loaded.values.dtype == torch.float32
    assert loaded.info == scores.info


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", sorted(GRAPHS))
def test_circuits_come_back(kind: str, suffix: str, tmp_path: Path) -> None:
    circuit = circuit_of(GRAPHS[kind])
    circuit.save(tmp_path / f"circuit{suffix}")
    loaded = Circuit.load(tmp_path / f"circuit{suffix}")
    assert loaded == circuit
    assert loaded.values is not None
    assert circuit.values is not None
    there = circuit.mask if suffix == ".safetensors" else circuit.graph.edge_mask
    assert torch.allclose(loaded.values, circuit.values * there, rtol=1e-6)


def test_a_circuit_takes_room_only_for_the_edges_it_keeps(tmp_path: Path) -> None:
    graph = Graph((16,) * 16, (4,) * 16, 64)
    circuit = EdgeScores(graph, values_of(graph)).select(graph.n_edges // 1000, prune=False)
    circuit.save(tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").stat().st_size < 2000 + 12 * circuit.n_edges < graph.n_edges
    assert Circuit.load(tmp_path / "c.safetensors") == circuit
    with pytest.raises(InputError, match="expected a file with edge scores, found a circuit with only its own"):
        EdgeScores.load(tmp_path / "c.safetensors")


def test_a_circuit_of_the_first_format_is_read(tmp_path: Path) -> None:
    circuit = circuit_of(GRAPHS["kv"])
    assert circuit.values is not None
    plain = {"format": "eap-circuits/1", "kind": "circuit", "info": "{}", "graph": json.dumps(circuit.graph.to_dict())}
    save_file({"mask": circuit.mask, "values": circuit.values}, tmp_path / "old.safetensors", metadata=plain)
    loaded = Circuit.load(tmp_path / "old.safetensors")
    assert loaded == circuit and loaded.values is not None and torch.equal(loaded.values, circuit.values)
    assert torch.equal(EdgeScores.load(tmp_path / "old.safetensors").values, circuit.values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, g: t.update(edges=t["edges"].flip(0)), "edges: expected each once, in order"),
        (lambda t, g: t.update(edges=torch.cat([t["edges"][:1], t["edges"][:-1]])), "each once, in order"),
        (lambda t, g: t["edges"].__setitem__((-1, 0), 10**6), "edges: expected edges of the graph, found [1000000,"),
        (lambda t, g: t["edges"].__setitem__((0, 1), -1), "edges: expected edges of the graph"),
        (lambda t, g: t["edges"].__setitem__((-1, 1), 10**6), "edges: expected edges of the graph"),
        (lambda t, g: t["edges"].__setitem__(-1, torch.tensor([10, 0])), "edges of the graph, found [10, 0]"),
        (lambda t, g: t["scores"].__setitem__(1, math.nan), "values: expected finite numbers, found 1 that are not"),
        (lambda t, g: t.update(scores=t["scores"][1:].clone()), "scores: expected floating-point numbers"),
        (lambda t, g: t.update(edges=t["edges"].long()), "edges: expected int32 [n, 2]"),
        (lambda t, g: t.update(mask=t["scores"] > 0), "tensors: expected edges, and maybe scores"),
        (lambda t, g: g.update(n_heads=[2**28] * 2, n_kv_heads=[1] * 2), "one whose mask fits into memory"),
    ],
)
def test_lists_of_edges_that_are_almost_right(change: Any, message: str, tmp_path: Path) -> None:
    path, circuit = tmp_path / "c.safetensors", circuit_of(GRAPHS["kv"])
    circuit.save(path)
    tensors, graph = load_file(path), circuit.graph.to_dict()
    change(tensors, graph)
    metadata = {"format": "eap-circuits/circuit-2", "info": "{}", "graph": json.dumps(graph)}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(InputError, match=re.escape(message)):
        Circuit.load(path)


def test_statistics_come_back_in_our_own_format_alone(tmp_path: Path) -> None:
    graph = GRAPHS["kv"]
    edges = graph.edge_mask.shape
    kept = {
        "variance": torch.rand(edges),
        "per_example": torch.randn(5, *edges),
        "per_position": torch.randn(3, *edges),
        "neurons": torch.randn(graph.n_senders, graph.d_model),
    }
    for names in ((), ("variance",), ("per_example", "neurons"), tuple(kept)):
        some = {name: kept[name] for name in names}
        scores = EdgeScores(graph, values_of(graph), {"n_examples": 5}, **some)
        scores.save(tmp_path / "scores.safetensors")
        found = EdgeScores.load(tmp_path / "scores.safetensors").statistics()
        assert found.keys() == some.keys()
        assert all(torch.equal(found[name], some[name]) for name in some)
        scores.save(tmp_path / "scores.json")
        assert EdgeScores.load(tmp_path / "scores.json").statistics() == {}
    # As scores were written before there were any.
    plain = {"format": "eap-circuits/1", "kind": "scores", "info": "{}"}
    plain["graph"] = json.dumps({"n_heads": [4, 4], "n_kv_heads": [2, 2], "d_model": 16})
    save_file({"values": values_of(graph)}, tmp_path / "old.safetensors", metadata=plain)
    assert torch.equal(EdgeScores.load(tmp_path / "old.safetensors").values, values_of(graph))


@pytest.mark.parametrize("name", ["variance", "per_example", "per_position", "neurons"])
def test_statistics_of_another_shape_are_refused(name: str) -> None:
    graph = GRAPHS["kv"]
    for wrong in (torch.zeros(3), torch.zeros(graph.n_senders, 3), torch.zeros(1, 2, *graph.edge_mask.shape)):
        given: Any = {name: wrong}
        with pytest.raises(InputError, match=f"{name}: expected shape"):
            EdgeScores(graph, values_of(graph), **given)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_circuit_without_scores_comes_back(suffix: str, tmp_path: Path) -> None:
    circuit = Circuit.from_mask(GRAPHS["kv"], circuit_of(GRAPHS["kv"]).mask)
    circuit.save(tmp_path / f"circuit{suffix}")
    assert Circuit.load(tmp_path / f"circuit{suffix}") == circuit


@pytest.mark.parametrize("heads", [((4, 2), (2, 2)), ((0, 0), (0, 0))])
def test_layers_that_differ_in_heads_or_have_none_have_no_place_in_eap_ig_formats(
    heads: tuple[tuple[int, ...], tuple[int, ...]], tmp_path: Path
) -> None:
    graph = Graph(*heads, 16)
    scores = EdgeScores(graph, values_of(graph))
    scores.save(tmp_path / "scores.safetensors")
    assert EdgeScores.load(tmp_path / "scores.safetensors").graph == graph
    for suffix in (".json", ".pt"):
        with pytest.raises(InputError, match=r"^EAP-IG's formats: expected the same number of heads"):
            scores.save(tmp_path / f"scores{suffix}")
        assert not (tmp_path / f"scores{suffix}").exists()


def test_scores_and_circuits_are_not_confused(tmp_path: Path) -> None:
    scores = EdgeScores(GRAPHS["kv"], values_of(GRAPHS["kv"]))
    scores.save(tmp_path / "scores.safetensors")
    Circuit.from_mask(GRAPHS["kv"], GRAPHS["kv"].edge_mask).save(tmp_path / "circuit.safetensors")
    with pytest.raises(InputError, match=r"expected a circuit, found edge scores only"):
        Circuit.load(tmp_path / "scores.safetensors")
    for suffix in (".json", ".pt"):
        scores.save(tmp_path / f"scores{suffix}")
        with pytest.warns(InputWarning, match=r"a circuit without edges, but with scores; EdgeScores\.load"):
            assert Circuit.load(tmp_path / f"scores{suffix}").n_edges == 0
    with pytest.raises(InputError, match=r"expected a file with edge scores, found a circuit without scores\.$"):
        EdgeScores.load(tmp_path / "circuit.safetensors")


# EAP-IG's own files: one layer of two heads, written out as its to_json and to_pt do.

CFG = {"n_layers": 1, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
SENDERS = ["input", "a0.h0", "a0.h1", "m0"]
RECEIVERS = [*["a0.h0<q>", "a0.h1<q>", "a0.h0<k>", "a0.h1<k>", "a0.h0<v>", "a0.h1<v>"], "m0", "logits"]
KEPT = [("input", "a0.h1<v>"), ("a0.h1", "logits")]


def eap_ig_edges() -> dict[str, dict[str, Any]]:
    edges = {}
    for u, sender in enumerate(SENDERS):
        for v, receiver in enumerate(RECEIVERS):
            if u < (1 if "<" in receiver else 3 if receiver == "m0" else 4):
                edges[f"{sender}->{receiver}"] = {"score": u + v / 10, "in_graph": (sender, receiver) in KEPT}
    return edges


def eap_ig_json() -> dict[str, Any]:
    nodes = {name: {"in_graph": name in ("input", "a0.h1", "logits")} for name in [*SENDERS, "logits"]}
    return {"cfg": CFG, "nodes": nodes, "edges": eap_ig_edges()}


def eap_ig_pt() -> dict[str, Any]:
    scores = torch.arange(4.0)[:, None] + torch.arange(8.0) / 10  # filled beyond the real edges
    in_graph = torch.zeros(4, 8, dtype=torch.bool)
    in_graph[0, 5] = in_graph[2, 7] = True
    in_graph[3, 0] = True  # no edge of the graph
    return {
        "cfg": CFG,
        "src_nodes": SENDERS,
        "dst_nodes": RECEIVERS,
        "edges_scores": scores,
        "edges_in_graph": in_graph,
        "nodes_in_graph": torch.tensor([True, False, True, False]),
    }


def write_json(content: Any, folder: Path) -> Path:
    path = folder / "graph.json"
    path.write_text(json.dumps(content))
    return path


def write_pt(content: Any, folder: Path) -> Path:
    path = folder / "graph.pt"
    torch.save(content, path)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "json": lambda folder: write_json(eap_ig_json(), folder),
    "pt": lambda folder: write_pt(eap_ig_pt(), folder),
}


@pytest.mark.parametrize("kind", ["json", "pt"])
def test_eap_ig_files_are_read(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path)
    circuit, scores = Circuit.load(path), EdgeScores.load(path)
    assert circuit.graph == Graph((2,), (2,), 8, heads="query")
    assert circuit.edges == KEPT
    wanted = torch.zeros(4, 8)
    for name, edge in eap_ig_edges().items():
        sender, receiver = name.split("->")
        wanted[SENDERS.index(sender), RECEIVERS.index(receiver)] = edge["score"]
    assert torch.allclose(scores.values, wanted)


def test_what_is_written_has_eap_ig_s_keys(tmp_path: Path) -> None:
    circuit = Circuit.load(WRITERS["json"](tmp_path))
    circuit.save(tmp_path / "again.json")
    circuit.save(tmp_path / "again.pt")
    content = json.loads((tmp_path / "again.json").read_text())
    assert CFG.items() <= content["cfg"].items()
    assert content["nodes"] == eap_ig_json()["nodes"]
    assert content["edges"].keys() == eap_ig_edges().keys()
    assert {name for name, edge in content["edges"].items() if edge["in_graph"]} == {
        f"{sender}->{receiver}" for sender, receiver in KEPT
    }
    tensors = torch.load(tmp_path / "again.pt", weights_only=True)
    assert tensors.keys() == {*eap_ig_pt(), "info", "sha256"}  # the package looks at no others
    assert tensors["src_nodes"] == SENDERS
    assert tensors["dst_nodes"] == RECEIVERS
    assert tensors["nodes_in_graph"].tolist() == [True, False, True, False]


# Files that are something else.


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        Circuit.load(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.98])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_files(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"circuit{suffix}"
    circuit_of(GRAPHS["query"]).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "written by eap_circuits or EAP-IG" in refused(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_foreign_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"notes{suffix}"
    path.write_bytes(b"\x80\x02 shopping list: \xff bread, butter\n" * 20)
    refused(path)


def test_safetensors_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    assert "expected format 'eap-circuits/1', found None" in refused(path)
    save_file({"mask": torch.zeros(2)}, path, metadata={"format": "eap-circuits/1"})
    refused(path)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {**eap_ig_json(), "cfg": {"n_layers": 1}},
        {**eap_ig_json(), "cfg": {**CFG, "n_heads": "many"}},
        {**eap_ig_json(), "cfg": {**CFG, "n_heads": 3, "n_key_value_heads": 2}},
        {**eap_ig_json(), "edges": {"input->a9.h0<q>": {"score": 1.0, "in_graph": True}}},
        {**eap_ig_json(), "edges": {"m0->m0": {"score": 1.0, "in_graph": False}}},
        {**eap_ig_json(), "edges": {"input->m0": {"in_graph": False}}},
        {**eap_ig_json(), "edges": {"input->m0": 3}},
        {**eap_ig_json(), "nodes": {"input": {"in_graph": True, "neurons": [1, 0]}}},
    ],
)
def test_json_of_something_else(content: Any, tmp_path: Path) -> None:
    refused(write_json(content, tmp_path))


def test_a_kv_file_whose_heads_of_a_group_disagree(tmp_path: Path) -> None:
    content = eap_ig_json()
    content["cfg"] = {**CFG, "n_key_value_heads": 1, "heads": "kv"}
    assert "the same edges to every head of a group" in refused(write_json(content, tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(3)],
        {"cfg": CFG},
        {**eap_ig_pt(), "cfg": {"n_layers": 1}},
        {**eap_ig_pt(), "dst_nodes": RECEIVERS[::-1]},
        {**eap_ig_pt(), "edges_scores": torch.zeros(4, 1)},
        {**eap_ig_pt(), "edges_scores": [0.5]},
        {**eap_ig_pt(), "edges_in_graph": torch.zeros(8, dtype=torch.bool)},
        {**eap_ig_pt(), "neurons_in_graph": torch.zeros(4, 8)},
    ],
)
def test_pt_of_something_else(content: Any, tmp_path: Path) -> None:
    refused(write_pt(content, tmp_path))


class Mischief:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nothing_is_unpickled(suffix: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / f"graph{suffix}"
    path.write_bytes(pickle.dumps({**eap_ig_pt(), "cfg": Mischief(mark)}, protocol=2))
    refused(path)
    torch.save({**eap_ig_pt(), "cfg": Mischief(mark)}, path)
    refused(path)
    assert not mark.exists()


def test_paths_that_cannot_be_read(tmp_path: Path) -> None:
    assert "expected a file, found nothing there" in refused(tmp_path / "none.json")
    (tmp_path / "folder.pt").mkdir()
    assert "expected a file, found a folder" in refused(tmp_path / "folder.pt")
    assert "a name ending in .safetensors, .json, .pt, found '.csv'" in refused(tmp_path / "graph.csv")
