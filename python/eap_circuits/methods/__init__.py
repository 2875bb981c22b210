"""Attribution methods: a registry of frozen specs, and `attribute`, which runs them."""

from ..recording import RULES
from .attribution import attribute, check_method, plan
from .gradient import Plan
from .quadrature import QUADRATURES
from .registry import METHODS
from .spec import Method

__all__ = [
    "METHODS",
    "QUADRATURES",
    "RULES",
    "Method",
    "Plan",
    "attribute",
    "check_method",
    "plan",
]
