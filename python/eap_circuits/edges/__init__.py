"""The edge graph of a model: names, indices, and which edges lie on paths; pure data, without transformers."""

from .checks import edge_flags, numbers
from .layout import Graph, Heads, Reads
from .pruning import prune
from .staircase import beyond, blocks

__all__ = ["Graph", "Heads", "Reads", "beyond", "blocks", "edge_flags", "numbers", "prune"]
