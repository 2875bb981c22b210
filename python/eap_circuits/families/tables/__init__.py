"""The supported families, one table each; nothing else in the project knows these names."""

from ..encoders import ENCODERS
from ..family import Family
from . import decoders, mixers

_TABLES = (
    *(table for room in (decoders, mixers) for table in vars(room).values() if isinstance(table, Family)),
    *ENCODERS,
)
FAMILIES: dict[str, Family] = {model_type: family for family in _TABLES for model_type in family.model_types}
