"""The self-check of a model against first principles, and the discovery of its sites, which the self-check confirms."""

from .discovery import discover
from .model import Check, StayDouble, check_model
