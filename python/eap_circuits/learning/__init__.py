"""Circuits found by running circuits again and again: by gradient descent, by pruning, by swaps, or edge by edge."""

from .asked import sizes_between
from .at_circuit import attribute_circuit
from .descent import GATES, ibcircuit, learn_mask
from .pruning import prune_gradually
from .refining import refine
from .sequential import acdc

__all__ = [
    "GATES",
    "acdc",
    "attribute_circuit",
    "ibcircuit",
    "learn_mask",
    "prune_gradually",
    "refine",
    "sizes_between",
]
