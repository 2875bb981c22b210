"""The only place that knows Hugging Face module names."""

from .architecture import Architecture, Layer
from .binding import bind
from .families import FAMILIES, Call, Family, family_of, propose, register_family
from .nonlinear import nonlinear_parts
from .norms import Kinds, Norm
from .offloading import as_given, is_offloaded, read
from .pretrained import DEMO_MODEL, load_model
from .projections import Projection, concatenate, group, linear_shape, linear_weight
from .sites import ReceiverSite, SenderSite, receiver_sites, sender_sites

__all__ = [
    "DEMO_MODEL",
    "FAMILIES",
    "Architecture",
    "Call",
    "Family",
    "Kinds",
    "Layer",
    "Norm",
    "Projection",
    "ReceiverSite",
    "SenderSite",
    "as_given",
    "bind",
    "concatenate",
    "family_of",
    "group",
    "is_offloaded",
    "linear_shape",
    "linear_weight",
    "load_model",
    "nonlinear_parts",
    "propose",
    "read",
    "receiver_sites",
    "register_family",
    "sender_sites",
]
