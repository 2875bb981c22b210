"""Files that others wrote, and ours of older versions, are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eap_circuits import Circuit, EdgeScores, Graph, InputError
from tests.circuits.formats.test_strict_formats import GRAPH, values_of


def version_0_2(scored: bool = True) -> dict[str, Any]:
    """As `to_json` of EAP-IG 0.2 writes it: flags for nodes, no width, null where nothing was scored."""
    values = values_of(GRAPH)
    edges = {
        GRAPH.edge_name(u, v): {"score": float(values[u, v]) if scored else None, "in_graph": (u + v) % 3 == 0}
        for u, v in GRAPH.edge_mask.nonzero().tolist()
    }
    cfg = {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False}
    return {"cfg": cfg, "nodes": dict.fromkeys([*GRAPH.senders, "logits"], True), "edges": edges}


def version_0_2_pt() -> dict[str, Any]:
    u, v = (torch.arange(n) for n in GRAPH.edge_mask.shape)
    return {
        "cfg": version_0_2()["cfg"],
        "src_nodes": dict.fromkeys(GRAPH.senders, True),
        "dst_nodes": GRAPH.receivers,
        "edges": values_of(GRAPH),
        "edges_in_graph": ((u[:, None] + v) % 3 == 0) & GRAPH.edge_mask,
    }


def test_files_of_version_0_2_are_read(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(version_0_2()))
    torch.save(version_0_2_pt(), tmp_path / "r.pt")
    for path in (tmp_path / "r.json", tmp_path / "r.pt"):
        circuit = Circuit.load(path)
        assert circuit.graph == GRAPH and circuit.graph != Graph((2, 2), (1, 1), 4, heads="query")
        assert torch.equal(EdgeScores.load(path).values, values_of(GRAPH))
        assert all((u + v) % 3 == 0 for u, v in circuit.mask.nonzero().tolist()) and circuit.n_edges == 15
        circuit.save(path)
        assert Circuit.load(path) == circuit and "d_model" not in json.loads(json.dumps(version_0_2()["cfg"]))
    (tmp_path / "r.json").write_text(json.dumps(version_0_2(scored=False)))
    assert Circuit.load(tmp_path / "r.json").values is None
    with pytest.raises(InputError, match="a circuit without scores"):
        EdgeScores.load(tmp_path / "r.json")


def test_files_of_mib_are_read(tmp_path: Path) -> None:
    content = version_0_2()
    content["cfg"]["d_model"] = 4
    # Scores of nodes, among them those that have none.
    content["nodes"] = {n: {"in_graph": True, "score": float("nan")} for n in content["nodes"]}
    (tmp_path / "importances.json").write_text(json.dumps(content))
    assert torch.equal(EdgeScores.load(tmp_path / "importances.json").values, values_of(GRAPH))
    tensors = {"edges_scores": values_of(GRAPH) + 7 * ~GRAPH.edge_mask, "nodes_scores": torch.full((7,), torch.nan)}
    pt = {**version_0_2_pt(), **tensors, "src_nodes": GRAPH.senders, "nodes_in_graph": torch.ones(7, dtype=torch.bool)}
    del pt["edges"]
    torch.save(pt, tmp_path / "importances.pt")
    assert torch.equal(EdgeScores.load(tmp_path / "importances.pt").values, values_of(GRAPH))


def test_graphs_of_unknown_width_equal_those_of_any() -> None:
    unknown, wide, wider = (Graph((2, 2), (2, 2), n) for n in (0, 4, 8))
    assert unknown == wide and wider == unknown and wide != wider
    assert hash(unknown) == hash(wide) == hash(wider) and wide != "a graph"


# Curves.
