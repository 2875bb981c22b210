"""Files: our `.safetensors`, and EAP-IG's `.json` and `.pt`, which the published package reads and writes.

EAP-IG knows only query-head graphs. A kv graph is written to its formats as the query-head graph that computes the
same: an edge to a key/value head becomes one to each head of its group, with equal parts of the score. Two more entries
in `cfg` let us read the kv graph back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError, expected, reason
from ..files import DAMAGED, write_whole
from .layout import Graph

SUFFIXES = (".safetensors", ".json", ".pt")
_FORMAT, _NODES = "eap-circuits/1", "eap-circuits/nodes-1"


class Content(NamedTuple):
    """What a file holds: "values" [S, R], maybe "mask" [S, R] and statistics; for nodes "values" [S] and "neurons"."""

    graph: Graph
    tensors: dict[str, Tensor]
    info: dict[str, Any]


def save(path: str | os.PathLike[str], kind: str, content: Content) -> None:
    """Write "scores" or a "circuit" in the format that the path's suffix names, whole or not at all."""
    suffix = Path(path).suffix
    if suffix == ".safetensors":
        _save_safetensors(path, {"format": _FORMAT, "kind": kind}, content)
    elif suffix == ".json":
        text = json.dumps(_eap_ig_json(content))
        write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
    elif suffix == ".pt":
        tensors_and_names = _eap_ig_pt(content)
        write_whole(path, lambda file: torch.save(tensors_and_names, file))
    else:
        raise expected(str(path), "a name ending in " + ", ".join(SUFFIXES), repr(suffix))


def save_nodes(path: str | os.PathLike[str], content: Content) -> None:
    """Write scores of nodes as `.safetensors`, whole or not at all."""
    if Path(path).suffix != ".safetensors":
        raise expected(str(path), "a name ending in .safetensors", repr(Path(path).suffix))
    _save_safetensors(path, {"format": _NODES}, content)


def _save_safetensors(path: str | os.PathLike[str], kind: dict[str, str], content: Content) -> None:
    metadata = {**kind, "graph": json.dumps(content.graph.to_dict()), "info": json.dumps(content.info)}
    plain = {name: tensor.contiguous() for name, tensor in content.tensors.items()}
    write_whole(path, lambda file: save_file(plain, file, metadata=metadata))


def load(path: str | os.PathLike[str], nodes: bool = False) -> Content:
    """Read what `save`, `save_nodes` or EAP-IG wrote; raises `InputError` for anything else."""
    path = Path(path)
    readers: dict[str, Callable[[Path], Content]]
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


def _read_safetensors(form: str, path: Path) -> Content:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != form:
            raise expected("metadata", f"format {form!r}", repr(metadata.get("format")))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    return Content(Graph.from_dict(json.loads(metadata["graph"])), tensors, json.loads(metadata["info"]))


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


def _as_query(content: Content) -> tuple[Graph, Tensor, Tensor]:
    """(graph, values, mask) over query heads; as in EAP-IG, scores without a circuit keep no edge."""
    graph, tensors, _ = content
    values = tensors.get("values", torch.zeros(graph.edge_mask.shape))
    mask = tensors.get("mask", torch.zeros_like(graph.edge_mask))
    if graph.heads == "query":
        return graph, values, mask
    return graph.with_heads("query"), graph.to_query(values), mask[:, graph.kv_receiver]


def _eap_ig_json(content: Content) -> dict[str, Any]:
    graph, values, mask = _as_query(content)
    flags = graph.connected(mask).tolist()
    nodes = {name: {"in_graph": flag} for name, flag in zip(graph.senders, flags, strict=True)}
    nodes["logits"] = {"in_graph": True}
    scores, kept = values.tolist(), mask.tolist()
    edges = {
        graph.edge_name(u, v): {"score": scores[u][v], "in_graph": kept[u][v]}
        for v, reach in enumerate(graph.reach.tolist())
        for u in range(reach)
    }
    return {"cfg": _cfg(content.graph), "nodes": nodes, "edges": edges, "info": content.info}


def _eap_ig_pt(content: Content) -> dict[str, Any]:
    graph, values, mask = _as_query(content)
    return {
        "cfg": _cfg(content.graph),
        "src_nodes": graph.senders,
        "dst_nodes": graph.receivers,
        "edges_scores": values,
        "edges_in_graph": mask,
        "nodes_in_graph": graph.connected(mask),
    }


def _graph_of(cfg: dict[str, Any]) -> Graph:
    layers, heads = int(cfg["n_layers"]), int(cfg["n_heads"])
    kv_heads = int(cfg.get("n_key_value_heads") or heads)
    kind = cfg.get("heads", "query")
    return Graph((heads,) * layers, (kv_heads,) * layers, int(cfg["d_model"]), bool(cfg["parallel_attn_mlp"]), kind)


def _from_query(graph: Graph, values: Tensor, mask: Tensor, info: dict[str, Any]) -> Content:
    """Undo `to_query` if the file was written from a kv graph."""
    if graph.heads == "query":
        return Content(graph, {"values": values, "mask": mask}, info)
    columns = graph.kv_receiver
    kv_mask = torch.zeros(graph.n_senders, graph.n_receivers, dtype=torch.bool)
    kv_mask[:, columns] = mask
    if not torch.equal(kv_mask[:, columns], mask):
        raise expected("a kv circuit", "the same edges to every head of a group", "different ones")
    return Content(graph, {"values": graph.to_kv(values), "mask": kv_mask}, info)


def _read_json(path: Path) -> Content:
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


def _read_pt(path: Path) -> Content:
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
    # EAP-IG also fills entries that are no edges; they mean nothing.
    return _from_query(graph, values.masked_fill(~query.edge_mask, 0), mask & query.edge_mask, {})
