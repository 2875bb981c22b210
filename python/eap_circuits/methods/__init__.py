"""Attribution methods: a registry of frozen specs, and `attribute`, which runs them."""

from .attribution import attribute, data_identity, model_identity, plan
from .planning import Plan
from .spec import METHODS, QUADRATURES, Method

__all__ = ["METHODS", "QUADRATURES", "Method", "Plan", "attribute", "data_identity", "model_identity", "plan"]
