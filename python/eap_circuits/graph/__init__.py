"""Scores and circuits of a model's edges: pure data, without transformers."""

from ..edges import Graph, Heads, prune
from ..selection import SELECTIONS, Selection
from .agreement import Agreement, Overlap, diff, edge_auroc, edge_overlap, node_overlap, score_agreement
from .circuit import Circuit
from .confidence import bootstrap_confidence, normal_confidence
from .ensembles import ensemble
from .nodes import NodeScores
from .random_circuits import random_circuit
from .scores import EdgeScores

__all__ = [
    "SELECTIONS",
    "Agreement",
    "Circuit",
    "EdgeScores",
    "Graph",
    "Heads",
    "NodeScores",
    "Overlap",
    "Selection",
    "bootstrap_confidence",
    "diff",
    "edge_auroc",
    "edge_overlap",
    "ensemble",
    "node_overlap",
    "normal_confidence",
    "prune",
    "random_circuit",
    "score_agreement",
]
