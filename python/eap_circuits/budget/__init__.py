"""How much memory a run takes, and how many tokens a pass has within it."""

from .fitting import Cost, budget, bytes_without_gradient, measure_cost, numbers_per_token, tokens_within
from .memory import PeakBytes, free_bytes, in_memory, most_tokens, parse_bytes

__all__ = [
    "Cost",
    "PeakBytes",
    "budget",
    "bytes_without_gradient",
    "free_bytes",
    "in_memory",
    "measure_cost",
    "most_tokens",
    "numbers_per_token",
    "parse_bytes",
    "tokens_within",
]
