"""The edge graph of a model: names, indices, and which edges lie on paths; pure data, without transformers."""

from .checks import edge_flags, finite, numbers
from .layout import Graph, Heads, Reads
from .pruning import prune
from .spans import REST, Spans
from .staircase import beyond, blocks
from .streams import Stream, check_one_stream, layer_name, readers_of
from .unspoilt import usable

__all__ = [
    "REST",
    "Graph",
    "Heads",
    "Reads",
    "Spans",
    "Stream",
    "beyond",
    "blocks",
    "check_one_stream",
    "edge_flags",
    "finite",
    "layer_name",
    "numbers",
    "prune",
    "readers_of",
    "usable",
]
