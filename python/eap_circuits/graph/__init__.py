"""Graphs, scores, circuits, selection and files: pure data, without transformers."""

from .agreement import Agreement, Overlap, diff, edge_auroc, edge_overlap, node_overlap, score_agreement
from .circuit import Circuit, prune
from .confidence import bootstrap_confidence, normal_confidence
from .ensembles import ensemble
from .layout import Graph, Heads
from .nodes import NodeScores
from .scores import EdgeScores
from .selection import SELECTIONS, Selection, random_circuit

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
