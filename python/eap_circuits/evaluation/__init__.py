"""Circuits run and measured: faithfulness, curves, comparisons, learned constants."""

from .baselines import BASELINES, Baseline
from .comparison import Comparison, compare
from .curve import FRACTIONS, Curve, faithfulness_curve
from .faithfulness import EvaluationResult, evaluate, to_evaluate
from .optimal_ablation import optimal_constants
from .summary import summarise

__all__ = [
    "BASELINES",
    "FRACTIONS",
    "Baseline",
    "Comparison",
    "Curve",
    "EvaluationResult",
    "compare",
    "evaluate",
    "faithfulness_curve",
    "optimal_constants",
    "summarise",
    "to_evaluate",
]
