"""A pretended H100: what surrounds GPU kernels runs, and is counted, on a machine without a GPU."""

from bench.pretended.counting import Counts, counting
from bench.pretended.device import pretending

__all__ = ["Counts", "counting", "pretending"]
