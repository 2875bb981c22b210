"""Exact edge scores, one edge at a time."""

from .method import ExactMethod, edges_to_score

__all__ = ["ExactMethod", "edges_to_score"]
