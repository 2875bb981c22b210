"""How much memory a run takes, and how many tokens a pass may have within a budget."""

from .fitting import (
    Cost,
    budget,
    bytes_without_gradient,
    measure_cost,
    measured_operations,
    numbers_per_token,
    tokens_in_all,
    tokens_within,
)
from .memory import (
    PeakBytes,
    dealt_in_memory,
    device_name,
    end_of_phase,
    free_bytes,
    free_share,
    in_memory,
    kind_of,
    most_tokens,
    zeros,
)
from .rates import Rates, rates_of
from .replays import Replayable, Replays, Work, layer_weights
