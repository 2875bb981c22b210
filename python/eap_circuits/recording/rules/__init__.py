"""Backward rules: what takes the place of the gradient in the parts of a model that are not linear."""

from .backward_rules import RULES, BackwardRules, Rules

__all__ = ["RULES", "BackwardRules", "Rules"]
