"""Circuits on their own: as modules that run."""

from .running import CircuitModel, circuit_model
