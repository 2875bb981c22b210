"""Circuits run and measured: faithfulness, curves, comparisons, and the self-check of a model."""

from .baselines import BASELINES, Baseline
from .check import Check, check_model, discover
from .comparison import Comparison, compare
from .curve import FRACTIONS, Curve, faithfulness_curve
from .faithfulness import EvaluationResult, evaluate
from .optimal_ablation import optimal_constants
from .summary import summarise

__all__ = [
    "BASELINES",
    "FRACTIONS",
    "Baseline",
    "Check",
    "Comparison",
    "Curve",
    "EvaluationResult",
    "check_model",
    "compare",
    "discover",
    "evaluate",
    "faithfulness_curve",
    "optimal_constants",
    "summarise",
]
