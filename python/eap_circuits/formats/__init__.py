"""Files: our `.safetensors`, and EAP-IG's `.json` and `.pt`, which the published package reads and writes.

What is written gets a checksum. Files of EAP-IG, and our older ones, have none; like ours they are refused if anything
is not as it must be in scores and circuits.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from ..edges import Graph
from ..errors import InputError, expected, reason
from ..files import DAMAGED, read_whole, suffix_of
from . import eap_ig, kept, own
from .content import Content, checked, cleared

__all__ = ["SUFFIXES", "Content", "check_savable", "load", "load_nodes", "save", "save_nodes"]

SUFFIXES = (".safetensors", ".json", ".pt")
_FORMAT, _NODES = "eap-circuits/1", "eap-circuits/nodes-1"
_CIRCUIT = "eap-circuits/circuit-2"  # older ones have masks and the scores of all edges
_READERS: dict[str, Callable[[bytes], Content]] = {
    ".safetensors": lambda data: _edges(own.read(data, _FORMAT, _CIRCUIT)),
    ".json": eap_ig.read_json,
    ".pt": eap_ig.read_pt,
}


def check_savable(path: str | os.PathLike[str], graph: Graph) -> str:
    """The format that the path's suffix names; raises `InputError` if it has no place for results of the graph."""
    suffix = suffix_of(path, SUFFIXES)
    if suffix != ".safetensors":
        eap_ig.check_graph(graph)
    return suffix


def save(path: str | os.PathLike[str], kind: str, content: Content) -> None:
    """Write "scores" or a "circuit" in the format that the path's suffix names, whole or not at all."""
    suffix = check_savable(path, content.graph)
    if suffix == ".safetensors" and kind == "circuit":
        own.write(path, {"format": _CIRCUIT, "kind": kind}, kept.listed(content))
        return
    content = checked(cleared(content))
    if suffix == ".safetensors":
        own.write(path, {"format": _FORMAT, "kind": kind}, content)
    elif suffix == ".json":
        eap_ig.write_json(path, content)
    else:
        eap_ig.write_pt(path, content)


def save_nodes(path: str | os.PathLike[str], content: Content) -> None:
    """Write scores of nodes as `.safetensors`, or as EAP-IG's `.json` or `.pt`, whole or not at all."""
    suffix, content = check_savable(path, content.graph), checked(content, nodes=True)
    if suffix == ".safetensors":
        own.write(path, {"format": _NODES}, content)
    elif suffix == ".json":
        eap_ig.write_nodes_json(path, content)
    else:
        eap_ig.write_neurons_pt(path, content)


def load(path: str | os.PathLike[str]) -> Content:
    """Read what `save` or EAP-IG wrote; raises `InputError` for anything else.

    A circuit that we wrote has "kept", its own edges' scores, in place of all "values".
    """
    read = _READERS[suffix_of(path, SUFFIXES)]
    return _read(path, "scores or a circuit written by eap_circuits or EAP-IG", read)


def load_nodes(path: str | os.PathLike[str]) -> Content:
    """Read what `save_nodes` wrote; raises `InputError` for anything else."""
    suffix_of(path, SUFFIXES[:1])
    return _read(path, "node scores written by eap_circuits", lambda data: checked(own.read(data, _NODES), nodes=True))


def _edges(content: Content) -> Content:
    return kept.unlisted(content) if "edges" in content.tensors else checked(content)


def _read(path: str | os.PathLike[str], what: str, read: Callable[[bytes], Content]) -> Content:
    data = read_whole(path)
    try:
        return read(data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except DAMAGED as error:
        raise expected(str(path), what, f"something else ({reason(error)})") from error
