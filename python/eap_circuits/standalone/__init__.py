"""Circuits on their own: as modules that run, and as checkpoints of the nodes that they use."""

from .export import export_model
from .running import CircuitModel, circuit_model
