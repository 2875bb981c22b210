"""Circuits as other tools' graphs, in which the receivers of a head are one node with the head that they feed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..display import library

if TYPE_CHECKING:
    from ..edges import Graph
    from .circuit import Circuit


def to_frame(graph: Graph, mask: Tensor, columns: dict[str, Tensor]) -> Any:
    """A pandas DataFrame with a row for each edge of a mask [S, R]; each further column is a tensor [S, R]."""
    senders, receivers = mask.nonzero(as_tuple=True)
    names = {
        "sender": [graph.senders[u] for u in senders.tolist()],
        "receiver": [graph.receivers[v] for v in receivers.tolist()],
    }
    values = {name: x[senders, receivers].tolist() for name, x in columns.items()}
    return library("pandas", "to_pandas()").DataFrame({**names, **values})


def to_networkx(circuit: Circuit) -> Any:
    """A networkx MultiDiGraph of a circuit; an edge's key is what it enters: "q", "k", "v", "mlp" or "logits"."""
    found = library("networkx", "to_networkx()").MultiDiGraph()
    # What graph formats take: GraphML has no lists, GML no None.
    known = {name: value for name, value in circuit.info.items() if value is not None}
    found.graph.update({name: x if isinstance(x, (str, int, float)) else json.dumps(x) for name, x in known.items()})
    for sender, node, kind, attributes in _joined(circuit):
        found.add_edge(sender, node, kind, **attributes)
    return found


def to_dot(circuit: Circuit) -> str:
    """A circuit in Graphviz's language."""
    lines = ["digraph circuit {", "  rankdir=BT;", "  node [shape=box];"]
    for sender, node, kind, attributes in _joined(circuit):
        more = f', weight={abs(attributes["score"]):.6g}, tooltip="{attributes["score"]:.6g}"' if attributes else ""
        lines.append(f'  {_quoted(sender)} -> {_quoted(node)} [label="{kind}"{more}];')
    return "\n".join([*lines, "}", ""])


def _quoted(name: str) -> str:
    """A name as Graphviz reads it: those of spans may hold any character."""
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _joined(circuit: Circuit) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """(sender, node, what it enters, {"score": …} or {}); a key or value that heads share is entered at each head."""
    graph = circuit.graph
    nodes = {v: [graph.receivers[v]] for v in range(graph.n_receivers)[graph.logits_receiver]}
    for receiver, sender in zip(*(x.tolist() for x in graph.inputs_of), strict=True):
        nodes.setdefault(receiver, []).append(graph.senders[sender])
    for u, v in circuit.mask.nonzero().tolist():
        name = graph.receivers[v].partition("@")[0]
        kind = name.partition("<")[2][:-1] if name.endswith(">") else "logits" if name == "logits" else "mlp"
        score = {} if circuit.values is None else {"score": float(circuit.values[u, v])}
        for node in nodes[v]:
            yield graph.senders[u], node, kind, score
