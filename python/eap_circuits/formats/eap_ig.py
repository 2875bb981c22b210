"""EAP-IG's formats: `.json` and `.pt`, of all its versions.

EAP-IG knows only query-head graphs. A kv graph is written to its formats as the query-head graph that computes the
same: an edge to a key/value head becomes one to each head of its group, with equal parts of the score. Two more entries
in `cfg` let us read the kv graph back. Versions before 2 have no `d_model`, nodes that are flags, scores that may be
missing, and in `.pt` the scores under the name "edges".
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..edges import Graph, check_one_stream
from ..errors import expected
from ..files import CHECKSUM, check_digest, decoded, digest, parse_json, write_whole
from .content import Content, checked, flag, head_kind, info_text, read_info, shown, whole
from .parts import read_members

_LEAST = len('"m0->m1":{"score":1,"in_graph":true}')
_FLAGS = ("edges_in_graph", "nodes_in_graph")


# Writing.


def check_graph(graph: Graph) -> None:
    """Refuse a graph that EAP-IG has no place for."""
    if len(set(graph.n_heads)) > 1 or len(set(graph.n_kv_heads)) > 1 or not graph.n_heads[0]:
        raise expected("EAP-IG's formats", "the same number of heads in every layer, one or more", graph.n_heads)
    if graph.spans is not None:
        raise expected("EAP-IG's formats", "a graph without spans", f"spans {', '.join(graph.spans.names)}")
    check_one_stream("EAP-IG's formats", graph)
    if graph.reads:
        raise expected("EAP-IG's formats", "queries, keys and values in every layer", f"inputs {graph.reads}")


def write_json(path: str | os.PathLike[str], content: Content, of_nodes: Tensor | None = None) -> None:
    """`of_nodes`: scores of the senders, [S]."""
    graph, values, mask = _as_query(content)
    flags = graph.connected(mask).tolist()
    nodes: dict[str, dict[str, Any]]
    nodes = {name: {"in_graph": flag} for name, flag in zip(graph.senders, flags, strict=True)}
    if of_nodes is not None:
        for name, score in zip(graph.senders[1:], of_nodes[1:].tolist(), strict=True):
            nodes[name]["score"] = score
    nodes["logits"] = {"in_graph": True}
    head = {"cfg": _cfg(content.graph), "nodes": nodes, "info": parse_json(info_text(content.info))}
    read = {"scores": values.float().masked_fill(~graph.edge_mask, 0), "in_graph": mask}

    def write(file: Path) -> None:
        # One receiver's edges at a time: those of a large graph are millions of objects.
        with file.open("w", encoding="utf-8") as text:
            text.write(json.dumps(head)[:-1] + ', "edges": {')
            for v, receiver in enumerate(graph.receivers):
                column = zip(graph.senders, values[: graph.reach[v], v].tolist(), mask[:, v].tolist(), strict=False)
                edges = {f"{sender}->{receiver}": {"score": x, "in_graph": kept} for sender, x, kept in column}
                text.write(", " * (v > 0) + json.dumps(edges)[1:-1])
            text.write("}, " + json.dumps({CHECKSUM: digest(head, read)})[1:] + "\n")

    write_whole(path, write)


def write_pt(path: str | os.PathLike[str], content: Content, more: dict[str, Tensor] | None = None) -> None:
    graph, values, mask = _as_query(content)
    head = {
        "cfg": _cfg(content.graph),
        "src_nodes": graph.senders,
        "dst_nodes": graph.receivers,
        "info": info_text(content.info),
    }
    tensors = {"edges_scores": values, "edges_in_graph": mask, "nodes_in_graph": graph.connected(mask)}
    tensors |= more or {}
    sealed = {**head, **tensors, CHECKSUM: digest(head, tensors)}
    write_whole(path, lambda file: torch.save(sealed, file))


# EAP-IG keeps what has no score in every circuit. So `input` has none: a circuit without it is none.


def write_nodes_json(path: str | os.PathLike[str], content: Content) -> None:
    """Scores of nodes; edges have none."""
    write_json(path, _without_scores(content), content.tensors["values"])


def write_neurons_pt(path: str | os.PathLike[str], content: Content) -> None:
    """Scores of nodes' dimensions, which EAP-IG calls neurons; edges and nodes have none."""
    if "neurons" not in content.tensors:
        raise expected(str(path), 'scores of attribute(keep="neurons")', "scores of nodes, which go into .json")
    neurons = content.tensors["neurons"].float().clone()
    neurons[0] = torch.nan
    none = torch.zeros(neurons.shape, dtype=torch.bool)
    write_pt(path, _without_scores(content), {"neurons_in_graph": none, "neurons_scores": neurons})


def _without_scores(content: Content) -> Content:
    return Content(content.graph.with_heads("query"), {}, content.info)  # which has the same senders


def _cfg(graph: Graph) -> dict[str, Any]:
    width = {"d_model": graph.d_model} if graph.d_model else {}
    return {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads[0],
        "parallel_attn_mlp": graph.parallel,
        **width,
        "n_key_value_heads": graph.n_kv_heads[0],
        "heads": graph.heads,
    }


def _as_query(content: Content) -> tuple[Graph, Tensor, Tensor]:
    """(graph, values, mask) over query heads; as in EAP-IG, scores without a circuit keep no edge."""
    graph, tensors, _ = content
    values = tensors.get("values", torch.zeros(graph.edge_mask.shape, dtype=torch.float32))
    mask = tensors.get("mask", torch.zeros_like(graph.edge_mask))
    if graph.heads == "query":
        return graph, values, mask
    return graph.with_heads("query"), graph.to_query(values), mask[:, graph.kv_receiver]


# Reading.


def read_json(data: bytes) -> Content:
    made: list[_Edges] = []
    waiting: list[dict[str, Any]] = []  # until the graph is known, in whatever order a file has its members

    def take(before: dict[str, Any], part: dict[str, Any]) -> None:
        waiting.append(part)
        if not made and {"cfg", "nodes"} <= before.keys():
            made.append(_Edges(before["cfg"], before["nodes"], len(text)))
        while made and waiting:
            made[0].add(waiting.pop(0))

    text = decoded(data)
    content = read_members(text, "edges", take)
    if content["edges"] is not None:
        raise expected("nodes and edges", "a JSON object of each", shown(content["edges"]))
    take(content, {})
    edges = made[0]
    edges.check()
    if CHECKSUM in content:
        head = {name: value for name, value in content.items() if name not in ("edges", CHECKSUM)}
        tensors = {"in_graph": edges.mask} if edges.values is None else {"scores": edges.values, "in_graph": edges.mask}
        check_digest(content[CHECKSUM], head, tensors)
    return checked(_from_query(edges.graph, edges.values, edges.mask, read_info(content.get("info", {}))))


class _Edges:
    """What a file says of a graph's edges, part after part.

    Args:
        cfg, nodes: as in the file.
        room: the file's characters.

    Attributes:
        mask, values: of the query-head graph, [S, R]; values are None if no edge has a score.
    """

    def __init__(self, cfg: Any, nodes: Any, room: int) -> None:
        if not isinstance(nodes, dict):
            raise expected("nodes and edges", "a JSON object of each", shown(nodes))
        self.graph = _graph(cfg, len(nodes.keys() - {"logits"}))
        self._query = query = self.graph.with_heads("query")
        if odd := (nodes.keys() - {"logits"}) ^ set(query.senders):
            raise expected("nodes", "those of the graph that cfg describes", f"others, such as {shown(min(odd))}")
        for name, node in nodes.items():
            if isinstance(node, dict) and "neurons" in node:
                raise expected("nodes", "edges only", "neuron-level entries, which are not supported")
            flag(f"node {name}", node.get("in_graph", False) if isinstance(node, dict) else node)
        self._nodes_scored = any(isinstance(node, dict) and node.get("score") is not None for node in nodes.values())
        self._row = {name: u for u, name in enumerate(query.senders)}
        self._column = {name: v for v, name in enumerate(query.receivers)}
        if room < _LEAST * query.n_edges:  # before there is a tensor of them
            wanted = f"all {query.n_edges:,} edges of the graph that cfg describes"
            raise expected("edges", wanted, f"a file of {room:,} characters")
        self._found = torch.zeros(query.n_senders, query.n_receivers, dtype=torch.bool)
        self.mask, self._n, self._unscored = torch.zeros_like(self._found), 0, 0
        self._scores = torch.zeros(self._found.shape, dtype=torch.float32)

    def add(self, part: dict[str, Any]) -> None:
        """Some edges' entries, by name. All are looked at together: there are millions."""
        if not part:
            return
        ends = [name.partition("->")[::2] for name in part]
        scores = [entry["score"] for entry in part.values()]
        kept = [entry["in_graph"] for entry in part.values()]
        # No edge leads to place -1 from place 0, nor from place -1.
        rows = torch.tensor([self._row.get(sender, -1) for sender, _ in ends])
        columns = torch.tensor([self._column.get(receiver, -1) for _, receiver in ends])
        real = (rows >= 0) & (columns >= 0) & (rows < self._query.reach[columns])
        kinds = set(map(type, scores))
        if not real.all() or not kinds <= {float, int, type(None)} or set(map(type, kept)) != {bool}:
            for (name, entry), there in zip(part.items(), real.tolist(), strict=True):
                if not there:
                    raise expected("edges", "edges of the graph that cfg describes", shown(name))
                if type(entry["score"]) not in (float, int, type(None)):
                    raise expected(f"score of {name}", "a number", shown(entry["score"]))
                flag(f"in_graph of {name}", entry["in_graph"])
        if (again := self._found[rows, columns]).any():
            raise ValueError(f"{list(part)[int(again.nonzero()[0])]!r} comes twice")
        if type(None) in kinds:
            self._unscored += scores.count(None)
            scores = [0.0 if score is None else score for score in scores]
        self._n += len(part)
        self._found[rows, columns] = True
        self.mask[rows, columns] = torch.tensor(kept)
        self._scores[rows, columns] = torch.tensor(scores, dtype=torch.float32)

    def check(self) -> None:
        """Refuse a file without some edge, with scores of only some, or with scores of nodes in their place."""
        if self._n < self._query.n_edges:
            wanted = f"all {self._query.n_edges:,} edges of the graph that cfg describes"
            raise expected("edges", wanted, f"{self._n:,}")
        if 0 < self._unscored < self._n:
            raise expected("edges", "a score of each edge, or of none", f"{self._unscored:,} without")
        if self._nodes_scored and not self._scores.any() and not self.mask.any():
            raise expected("file", "scores of edges, or a circuit", "scores of nodes only")

    @property
    def values(self) -> Tensor | None:
        return None if self._unscored else self._scores


def read_pt(data: bytes) -> Content:
    _check_zip(data)
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise expected("file", "a dictionary", shown(content))
    if "neurons_in_graph" in content:
        raise expected("circuit", "edges only", "neuron-level entries, which are not supported")
    names = content["src_nodes"], content["dst_nodes"]
    cfg, info = content["cfg"], content.get("info", "{}")
    # Whatever a pickle shares would be written out here again and again.
    if not all(isinstance(x, (list, dict)) for x in names) or not all(map(_scalar, (*cfg.values(), info))):
        raise expected("file", "lists of nodes, and numbers and texts", "something else")
    for each in names:
        for name, value in each.items() if isinstance(each, dict) else ():
            flag(f"node {name}", value)
    senders, receivers = map(list, names)
    graph = _graph(cfg, len(senders))
    query = graph.with_heads("query")
    for name, found, right in (("src_nodes", senders, query.senders), ("dst_nodes", receivers, query.receivers)):
        if found != right:
            raise expected(name, "the nodes that cfg describes, in its order", f"{len(found)} others")
    scores = "edges_scores" if "edges_scores" in content else "edges"
    shape = list(query.edge_mask.shape)
    for name in (scores, "edges_in_graph"):
        _check_tensor(name, content[name], shape, name in _FLAGS)
    if "nodes_in_graph" in content:
        _check_tensor("nodes_in_graph", content["nodes_in_graph"], shape[:1], True)
    if CHECKSUM in content:
        head = {"cfg": cfg, "src_nodes": senders, "dst_nodes": receivers, "info": info}
        tensors = {name: content[name] for name in (scores, *_FLAGS)}
        check_digest(content[CHECKSUM], head, tensors)
    # EAP-IG also fills entries that are no edges; they mean nothing.
    values = content[scores].float().masked_fill(~query.edge_mask, 0)
    return checked(_from_query(graph, values, content["edges_in_graph"] & query.edge_mask, read_info(info)))


def _scalar(x: object) -> bool:
    return x is None or isinstance(x, (str, int, float))


def _check_zip(data: bytes) -> None:
    """Refuse an archive whose entries, unpacked, are larger than the file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(str(error)) from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise expected("file", "entries as torch.save writes them", "compressed ones")
    if (size := sum(entry.file_size for entry in entries)) > len(data):
        raise expected("file", f"entries of at most its {len(data):,} bytes", f"{size:,}")


def _check_tensor(name: str, x: object, shape: list[int], flags: bool) -> None:
    """Refuse anything but a plain tensor that has a number in the file for each of its entries."""
    if type(x) is not Tensor or x.layout != torch.strided or x.device.type != "cpu":
        raise expected(name, "a tensor", shown(x))
    if list(x.shape) != shape or x.untyped_storage().nbytes() < x.numel() * x.itemsize:
        raise expected(name, f"shape {shape}", list(x.shape))
    if not (x.dtype == torch.bool if flags else x.is_floating_point()):
        raise expected(name, "dtype torch.bool" if flags else "floating-point numbers", x.dtype)


def _graph(cfg: Any, senders: int) -> Graph:
    """The graph of a file with this many senders. No other is made: what cfg says may be larger than any file."""
    layers, heads = whole("n_layers", cfg["n_layers"]), whole("n_heads", cfg["n_heads"])
    kv_heads = heads if cfg.get("n_key_value_heads") is None else whole("n_key_value_heads", cfg["n_key_value_heads"])
    if 1 + layers * (heads + 1) != senders:
        found = f"{layers:,} layers of {heads:,} heads, which are {1 + layers * (heads + 1):,}"
        raise expected("cfg", f"a graph of the file's {senders:,} senders", found)
    width = whole("d_model", cfg.get("d_model", 0), 0)
    parallel = flag("parallel_attn_mlp", cfg["parallel_attn_mlp"])
    return Graph((heads,) * layers, (kv_heads,) * layers, width, parallel, head_kind(cfg.get("heads", "query")))


def _from_query(graph: Graph, values: Tensor | None, mask: Tensor, info: dict[str, Any]) -> Content:
    """Undo `to_query` if the file was written from a kv graph."""
    if graph.heads == "kv":
        columns, shape = graph.kv_receiver, (graph.n_senders, graph.n_receivers)
        kv_mask = torch.zeros(shape, dtype=torch.bool)
        kv_mask[:, columns] = mask
        if not torch.equal(kv_mask[:, columns], mask):
            raise expected("a kv circuit", "the same edges to every head of a group", "different ones")
        values, mask = None if values is None else graph.to_kv(values), kv_mask
    return Content(graph, {"mask": mask} if values is None else {"values": values, "mask": mask}, info)
