"""Circuits found by running circuits again and again: by gradient descent, or edge by edge."""

from .bottleneck import ibcircuit
from .masks import learn_mask
from .sequential import acdc

__all__ = ["acdc", "ibcircuit", "learn_mask"]
