"""Which edges make a circuit: the strongest, those that grow from the logits, the best, or exactly n of them."""

from .by_score import SECONDS, SELECTIONS, Selection, select_edges

__all__ = ["SECONDS", "SELECTIONS", "Selection", "select_edges"]
