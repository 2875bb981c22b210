"""Edges' weights that are learned by gradient descent."""

from .bottleneck import ibcircuit as ibcircuit
from .gates import GATES as GATES
from .masks import learn_mask as learn_mask
