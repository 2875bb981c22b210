"""Circuits that a call is given, checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ..adapters import Architecture
from ..errors import expected
from ..graph import Circuit, EdgeScores, Graph, NodeScores
from ..tasks import PairedDataset, check_spans


def as_circuits(circuit: Circuit | Sequence[Circuit]) -> list[Circuit]:
    """The circuits of `evaluate(circuit=)`."""
    single = isinstance(circuit, (Circuit, str, Mapping)) or hasattr(circuit, "ndim")  # tensors and arrays
    if isinstance(circuit, Iterable) and not single:
        return list(circuit)
    check_kind(circuit)
    assert isinstance(circuit, Circuit)
    return [circuit]


def check_kind(circuit: object) -> None:
    """Refuse anything that is not a circuit, and say how to make one of it."""
    if isinstance(circuit, Circuit):
        return
    found = type(circuit).__name__
    if isinstance(circuit, (EdgeScores, NodeScores)):
        found += f" (scores.select({'n_edges' if isinstance(circuit, EdgeScores) else 'n_nodes'}=200) gives a circuit)"
    elif isinstance(circuit, Tensor):
        found += " (Circuit.from_mask(graph, mask) gives a circuit)"
    elif isinstance(circuit, (str, os.PathLike)):
        found += " (Circuit.load(path) gives a circuit)"
    raise expected("circuit", "a Circuit or a list of them", found)


def check_circuit(circuit: object, arch: Architecture, data: PairedDataset | None = None) -> None:
    """Refuse anything that is not a circuit of the model, or one with spans that are not those of the data."""
    check_kind(circuit)
    assert isinstance(circuit, Circuit)
    graph = circuit.graph
    if graph.base != arch.graph(graph.heads):
        raise expected("circuit", f"one of {arch.graph(graph.heads)!r}", f"one of {graph!r}")
    if data is None:
        check_no_spans("circuit", graph)
    else:
        check_spans(data, graph.spans)


def check_no_spans(name: str, graph: Graph) -> None:
    """Refuse scores or a circuit of a graph with spans, where every edge is one at all tokens."""
    if graph.spans is not None:
        raise expected(name, "one without spans, such as across_spans() gives", f"one of {graph!r}")
