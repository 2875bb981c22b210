"""Masks learned by gradient descent through the runs of circuits."""

from .masks import learn_mask

__all__ = ["learn_mask"]
