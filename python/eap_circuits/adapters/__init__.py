"""The only place that knows Hugging Face module names."""

from .architecture import Architecture, Layer, Norm, Projection, bind
from .families import FAMILIES
from .family import Family
from .pretrained import DEMO_MODEL, load_model

__all__ = [
    "DEMO_MODEL",
    "FAMILIES",
    "Architecture",
    "Family",
    "Layer",
    "Norm",
    "Projection",
    "bind",
    "load_model",
]
