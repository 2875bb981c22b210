"""The edge graph of a model: names, indices, and which edges lie on paths; pure data, without transformers."""

from .checks import edge_flags, numbers
from .layout import Graph, Heads, Reads
from .pruning import prune

__all__ = ["Graph", "Heads", "Reads", "edge_flags", "numbers", "prune"]
