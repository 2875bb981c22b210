"""Files: our `.safetensors`, and EAP-IG's `.json` and `.pt`, which the published package reads and writes.

EAP-IG knows query-head graphs only. A kv graph is written to its formats as the query-head graph that computes the
same (an edge to a key/value head as one to each head of its group, the score in equal parts), with two more entries
in `cfg` by which it is read back as it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, expected, reason
from ..files import DAMAGED, write_whole
from .circuit import Circuit
from .layout import Graph
from .nodes import NodeScores
from .scores import STATISTICS, EdgeScores

SUFFIXES = (".safetensors", ".json", ".pt")
_FORMAT, _NODES = "eap-circuits/1", "eap-circuits/nodes-1"


def save(what: Circuit | EdgeScores, path: str | os.PathLike[str]) -> None:
    """Write scores or a circuit in the format that the path's suffix names, whole or not at all."""
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        tensors = {"values": what.values} if what.values is not None else {}
        if isinstance(what, Circuit):
            _save_safetensors(path, {"kind": "circuit"}, what, {**tensors, "mask": what.mask})
        else:
            _save_safetensors(path, {"kind": "scores"}, what, {**tensors, **what.statistics()})
    elif suffix == ".json":
        content = _eap_ig_json(what)
        write_whole(path, lambda file: file.write_text(json.dumps(content), encoding="utf-8"))
    elif suffix == ".pt":
        tensors_and_names = _eap_ig_pt(what)
        write_whole(path, lambda file: torch.save(tensors_and_names, file))
    else:
        raise expected(str(path), "a name ending in " + ", ".join(SUFFIXES), repr(suffix))


def save_nodes(what: NodeScores, path: str | os.PathLike[str]) -> None:
    if Path(path).suffix != ".safetensors":
        raise expected(str(path), "a name ending in .safetensors", repr(Path(path).suffix))
    tensors = {"values": what.values, "neurons": what.neurons}
    _save_safetensors(path, {"format": _NODES}, what, {name: x for name, x in tensors.items() if x is not None})


def _save_safetensors(
    path: str | os.PathLike[str],
    kind: dict[str, str],
    what: Circuit | EdgeScores | NodeScores,
    tensors: dict[str, Tensor],
) -> None:
    contents = {"graph": json.dumps(what.graph.to_dict()), "info": json.dumps(what.info)}
    metadata = {"format": _FORMAT, **kind, **contents}
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda file: save_file(plain, file, metadata=metadata))


def load_scores(path: str | os.PathLike[str]) -> EdgeScores:
    graph, tensors, info = _read(path)
    if "values" not in tensors:
        raise expected(str(path), "a file with edge scores", "a circuit without scores")
    return EdgeScores(graph, tensors["values"], info, **{name: tensors.get(name) for name in STATISTICS})


def load_circuit(path: str | os.PathLike[str]) -> Circuit:
    graph, tensors, info = _read(path)
    if "mask" not in tensors:
        raise expected(str(path), "a circuit", "edge scores only; choose a circuit with EdgeScores.select")
    return Circuit(graph, tensors["mask"], tensors.get("values"), info)


def load_nodes(path: str | os.PathLike[str]) -> NodeScores:
    graph, tensors, info = _read(path, nodes=True)
    if "values" not in tensors:
        raise expected(str(path), "node scores", "a file without values")
    return NodeScores(graph, tensors["values"], tensors.get("neurons"), info)


_Content = tuple[Graph, dict[str, Tensor], dict[str, Any]]


def _read(path: str | os.PathLike[str], nodes: bool = False) -> _Content:
    path = Path(path)
    readers: dict[str, Callable[[Path], _Content]]
    if nodes:
        what, readers = "node scores written by eap_circuits", {".safetensors": partial(_read_safetensors, _NODES)}
    else:
        what = "scores or a circuit written by eap_circuits or EAP-IG"
        readers = {".safetensors": partial(_read_safetensors, _FORMAT), ".json": _read_json, ".pt": _read_pt}
    if path.suffix not in readers:
        raise expected(str(path), "a name ending in " + ", ".join(readers), repr(path.suffix))
    if not path.is_file():
        raise expected(str(path), "a file", "a folder" if path.is_dir() else "nothing there")
    try:
        return readers[path.suffix](path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except DAMAGED as error:
        raise expected(str(path), what, f"something else ({reason(error)})") from error


def _read_safetensors(form: str, path: Path) -> _Content:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != form:
            raise expected("metadata", f"format {form!r}", repr(metadata.get("format")))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return Graph.from_dict(json.loads(metadata["graph"])), tensors, json.loads(metadata["info"])


# EAP-IG's formats.


def _cfg(graph: Graph) -> dict[str, Any]:
    if len(set(graph.n_heads)) > 1 or len(set(graph.n_kv_heads)) > 1:
        raise expected("EAP-IG's formats", "the same number of heads in every layer", graph.n_heads)
    return {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads[0],
        "parallel_attn_mlp": graph.parallel,
        "d_model": graph.d_model,
        "n_key_value_heads": graph.n_kv_heads[0],
        "heads": graph.heads,
    }


def _as_query(what: Circuit | EdgeScores) -> Circuit:
    """Scores or a circuit over query heads; scores alone are a circuit with no edge kept, as in EAP-IG."""
    circuit = what
    if isinstance(circuit, EdgeScores):
        circuit = Circuit(what.graph, torch.zeros_like(what.graph.edge_mask), what.values)
    if circuit.values is None:
        circuit = Circuit(circuit.graph, circuit.mask, torch.zeros(circuit.mask.shape))
    return circuit.to_query()


def _node_flags(circuit: Circuit) -> Tensor:
    kept = set(circuit.nodes)
    return torch.tensor([name in kept for name in circuit.graph.senders])


def _eap_ig_json(what: Circuit | EdgeScores) -> dict[str, Any]:
    circuit = _as_query(what)
    graph = circuit.graph
    nodes = {name: {"in_graph": flag} for name, flag in zip(graph.senders, _node_flags(circuit).tolist(), strict=True)}
    nodes["logits"] = {"in_graph": True}
    assert circuit.values is not None
    scores, kept = circuit.values.tolist(), circuit.mask.tolist()
    edges = {
        graph.edge_name(u, v): {"score": scores[u][v], "in_graph": kept[u][v]}
        for v, reach in enumerate(graph.reach.tolist())
        for u in range(reach)
    }
    return {"cfg": _cfg(what.graph), "nodes": nodes, "edges": edges, "info": what.info}


def _eap_ig_pt(what: Circuit | EdgeScores) -> dict[str, Any]:
    circuit = _as_query(what)
    return {
        "cfg": _cfg(what.graph),
        "src_nodes": circuit.graph.senders,
        "dst_nodes": circuit.graph.receivers,
        "edges_scores": circuit.values,
        "edges_in_graph": circuit.mask,
        "nodes_in_graph": _node_flags(circuit),
    }


def _graph_of(cfg: dict[str, Any]) -> Graph:
    layers, heads = int(cfg["n_layers"]), int(cfg["n_heads"])
    kv_heads = int(cfg.get("n_key_value_heads") or heads)
    kind = cfg.get("heads", "query")
    return Graph((heads,) * layers, (kv_heads,) * layers, int(cfg["d_model"]), bool(cfg["parallel_attn_mlp"]), kind)


def _from_query(graph: Graph, values: Tensor, mask: Tensor, info: dict[str, Any]) -> _Content:
    """Undo `to_query` where the file was written from a kv graph."""
    if graph.heads == "query":
        return graph, {"values": values, "mask": mask}, info
    columns = graph.kv_receiver
    kv_mask = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.bool)
    kv_mask[:, columns] = mask
    if not torch.equal(kv_mask[:, columns], mask):
        raise expected("a kv circuit", "the same edges to every head of a group", "different ones")
    scores = EdgeScores(graph.with_heads("query"), values).to_kv()
    return graph, {"values": scores.values, "mask": kv_mask}, info


def _read_json(path: Path) -> _Content:
    content = json.loads(path.read_text(encoding="utf-8"))
    graph = _graph_of(content["cfg"])
    query = graph.with_heads("query")
    if any("neurons" in node for node in content["nodes"].values()):
        raise expected("nodes", "edges only", "neuron-level entries, which are not supported")
    row = {name: u for u, name in enumerate(query.senders)}
    column = {name: v for v, name in enumerate(query.receivers)}
    reach = query.reach.tolist()
    values = torch.zeros(query.n_senders, query.n_receivers)
    mask = torch.zeros_like(values, dtype=torch.bool)
    rows, columns, scores, kept = [], [], [], []
    for name, entry in content["edges"].items():
        sender, _, receiver = name.partition("->")
        if sender not in row or receiver not in column or row[sender] >= reach[column[receiver]]:
            raise expected("edges", "edges of the graph that cfg describes", repr(name))
        rows.append(row[sender])
        columns.append(column[receiver])
        scores.append(float(entry["score"]))
        kept.append(bool(entry["in_graph"]))
    values[rows, columns] = torch.tensor(scores)
    mask[rows, columns] = torch.tensor(kept, dtype=torch.bool)
    return _from_query(graph, values, mask, content.get("info", {}))


def _read_pt(path: Path) -> _Content:
    content = torch.load(path, map_location="cpu", weights_only=True)
    graph = _graph_of(content["cfg"])
    if "neurons_in_graph" in content:
        raise expected("circuit", "edges only", "neuron-level entries, which are not supported")
    query = graph.with_heads("query")
    if list(content["dst_nodes"]) != query.receivers:
        raise expected("dst_nodes", "the receivers that cfg describes", f"{len(content['dst_nodes'])} others")
    values, mask = content["edges_scores"].float(), content["edges_in_graph"].bool()
    if not values.shape == mask.shape == query.edge_mask.shape:
        found = f"{list(values.shape)} scores and {list(mask.shape)} edges"
        raise expected("edges", f"shape {list(query.edge_mask.shape)}", found)
    # EAP-IG fills its tensors beyond the real edges too; only real ones mean anything.
    return _from_query(graph, values.masked_fill(~query.edge_mask, 0), mask & query.edge_mask, {})
