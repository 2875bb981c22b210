"""The edge graph of a model: names, indices, and which edges lie on paths; pure data, without transformers."""

from .checks import edge_flags, numbers
from .layout import Graph, Heads, Reads
from .pruning import prune
from .spans import REST, Spans
from .staircase import beyond, blocks

__all__ = ["REST", "Graph", "Heads", "Reads", "Spans", "beyond", "blocks", "edge_flags", "numbers", "prune"]
