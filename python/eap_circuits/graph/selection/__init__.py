"""Which edges make a circuit: chosen by score, optimally, or at random."""

from .by_score import SELECTIONS, Selection, select_edges
from .random_circuits import random_circuit

__all__ = ["SELECTIONS", "Selection", "random_circuit", "select_edges"]
