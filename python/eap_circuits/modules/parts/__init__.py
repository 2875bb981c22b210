"""A model of which each rank has a part: its weights, and what ranks send each other in a pass."""

from .exchange import Shares, Split
from .weights import (
    FLOATS,
    add_up,
    by_features,
    computes_in_parts,
    in_turn,
    is_divided,
    is_fully_sharded,
    is_in_parts,
    is_shard,
    own_features,
    own_part,
    parts_of,
    run_whole,
    team,
    unknown_parts,
)
