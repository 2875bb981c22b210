"""What a file of scores or of a circuit holds, and what must be true of it."""

from __future__ import annotations

import json
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..edges import Graph
from ..errors import expected, reason, warn
from ..files import parse_json

_TENSORS = ("values", "mask", "variance", "per_example", "per_position", "per_span", "neurons", "within_heads")
_WIDEST = 2**31


class Content(NamedTuple):
    """What a file holds: "values" [S, R], maybe "mask" [S, R] and statistics; for nodes "values" [S] and "neurons"."""

    graph: Graph
    tensors: dict[str, Tensor]
    info: dict[str, Any]


def whole(name: str, value: object, least: int = 1) -> int:
    """A number of heads or layers, or a width."""
    if type(value) is not int or not least <= value < _WIDEST:
        raise expected(name, f"a whole number from {least} to below {_WIDEST}", shown(value))
    return value


def flag(name: str, value: object) -> bool:
    if type(value) is not bool:
        raise expected(name, "true or false", shown(value))
    return value


def head_kind(value: object) -> Any:
    if value not in ("kv", "query"):
        raise expected("heads", "'kv' or 'query'", shown(value))
    return value


def shown(value: object) -> str:
    """A value in an error's sentence; of what may be large, its kind."""
    return repr(value)[:40] if value is None or isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def info_text(info: dict[str, Any]) -> str:
    """Where a result came from, as JSON; a tensor or a number of numpy becomes plain, anything else its text."""
    try:
        return json.dumps(info, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    except (TypeError, ValueError, RecursionError) as error:
        raise expected("info", "plain JSON values", f"something else ({reason(error)})") from error


def read_info(text: object) -> dict[str, Any]:
    info = parse_json(text) if isinstance(text, str) else text
    if not isinstance(info, dict):
        raise expected("info", "a JSON object", shown(info))
    # What is computed with.
    n, selection = info.get("n_examples"), info.get("selection")
    if n is not None:
        whole("info, n_examples", n)
    if not isinstance(selection, (dict, NoneType)):
        raise expected("info, selection", "a JSON object", shown(selection))
    return info


def cleared(content: Content) -> Content:
    """The content as it is written: on the CPU, and zero where there is no edge; warns of other values there."""
    graph, info = content.graph, content.info
    tensors = {name: x.detach().cpu() for name, x in content.tensors.items()}
    if "values" in tensors:
        beyond = int(torch.count_nonzero(tensors["values"].masked_fill(graph.edge_mask, 0)))
        if beyond:
            warn(f"values: {beyond} where there is no edge are not saved.")
            tensors["values"] = tensors["values"].masked_fill(~graph.edge_mask, 0)
    return Content(graph, tensors, info)


def checked(content: Content, nodes: bool = False) -> Content:
    """The content, if its tensors are those of its graph: shapes first, as a graph's own tensors take memory.

    Raises:
        InputError: other tensors, other shapes, numbers that are not finite, or some where there is no edge.
    """
    graph, tensors, _ = content
    if nodes and "values" not in tensors:
        raise expected("file", "node scores", "one without values")
    s, r = graph.n_senders, graph.n_receivers
    shapes = {"values": [s] if nodes else [s, r], "mask": [s, r], "variance": [s, r], "neurons": [s, graph.d_model]}
    for name, x in tensors.items():
        if name not in _TENSORS:
            raise expected("tensors", "one of " + ", ".join(_TENSORS), shown(name))
        first = list(x.shape[:1])
        shape = shapes.get(name, [*first, *(first if name == "within_heads" else [s]), r])
        if list(x.shape) != shape:
            raise expected(name, f"shape {shape}", list(x.shape))
        if not (x.dtype == torch.bool if name == "mask" else x.is_floating_point()):
            raise expected(name, "dtype torch.bool" if name == "mask" else "floating-point numbers", x.dtype)
    for name, x in tensors.items():
        edges = name not in ("neurons", "within_heads") and not nodes
        for part in x if x.dim() == 3 else [x]:  # one at a time: each comparison takes as much memory again
            _none(graph, edges, name, "finite numbers", "that are not", ~part.isfinite())
        if name == "variance":
            _none(graph, edges, name, "numbers of at least 0", "below", x < 0)
        if edges and name in ("values", "mask"):
            beyond = (x != 0) & ~graph.edge_mask
            _none(graph, edges, name, "zeros where there is no edge", "other values there", beyond)
    return content


def _none(graph: Graph, edges: bool, name: str, wanted: str, found: str, where: Tensor) -> None:
    if not where.any():
        return
    u, *rest = where.nonzero()[0].tolist()
    first = graph.edge_name(u, rest[0]) if edges else ", ".join([graph.senders[u], *map(str, rest)])
    raise expected(name, wanted, f"{int(where.sum())} {found}, the first at {first}")
