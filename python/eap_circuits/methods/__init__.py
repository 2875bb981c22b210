"""Attribution methods: a registry of frozen specs, and `attribute`, which runs them."""

from .attribution import attribute
from .spec import METHODS, QUADRATURES, Method

__all__ = ["METHODS", "QUADRATURES", "Method", "attribute"]
