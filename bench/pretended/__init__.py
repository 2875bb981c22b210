"""A pretended H100, for running what surrounds GPU kernels on a machine without a GPU."""

from bench.pretended.device import pretending

__all__ = ["pretending"]
