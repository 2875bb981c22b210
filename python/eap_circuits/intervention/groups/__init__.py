"""What circuits that run together ask for, store and read: circuits alike as a group."""

from .circuit_group import (
    Asked,
    CircuitGroup,
    LearningGroup,
    Places,
    SpanGroup,
    asked_of,
    consecutive,
    numbers,
    places_of,
    together,
)
from .shared_group import SharedGroup
