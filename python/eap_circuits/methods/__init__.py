"""Attribution methods: a registry of frozen specs, and `attribute`, which runs them."""

from ..capture import RULES
from .attribution import attribute, data_identity, model_identity, plan
from .planning import Plan
from .spec import METHODS, QUADRATURES, Method

__all__ = [
    "METHODS",
    "QUADRATURES",
    "RULES",
    "Method",
    "Plan",
    "attribute",
    "data_identity",
    "model_identity",
    "plan",
]
