"""Our `.safetensors`: tensors under their names; in the metadata the graph, where they came from, and a checksum."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from ..edges import Graph
from ..errors import expected
from ..files import CHECKSUM, check_digest, digest, parse_json, write_whole
from .content import Content, info_text, read_info, shown


def write(path: str | os.PathLike[str], kind: dict[str, str], content: Content) -> None:
    graph, tensors, info = content
    metadata = {**kind, "graph": json.dumps(graph.to_dict()), "info": info_text(info)}
    plain = _apart(tensors)
    metadata[CHECKSUM] = digest(metadata, plain)
    write_whole(path, lambda file: save_file(plain, file, metadata=metadata))


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that share no memory, as the library wants them."""
    found: dict[str, Tensor] = {}
    for name, x in tensors.items():
        x = x.contiguous()
        shared = x.untyped_storage().nbytes() != x.nbytes or any(x.data_ptr() == y.data_ptr() for y in found.values())
        found[name] = x.clone() if shared else x
    return found


def read(data: bytes, *forms: str) -> Content:
    """What `write` wrote in one of these formats; its tensors are still to be checked."""
    metadata = _metadata(data)
    if metadata.get("format") not in forms:
        raise expected("metadata", f"format {forms[0]!r}", shown(metadata.get("format")))
    # The library checks that the header's sizes are the file's.
    tensors = load(data)
    if CHECKSUM in metadata:
        check_digest(metadata.pop(CHECKSUM), metadata, tensors)
    graph = Graph.from_dict(parse_json(metadata["graph"]))
    return Content(graph, tensors, read_info(metadata["info"]))


def _metadata(data: bytes) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise ValueError(f"a header of {size} bytes in a file of {len(data)}")
    return dict(parse_json(data[8 : 8 + size]).get("__metadata__") or {})
