"""The only place that touches hooks: contributions, gradients, the masked read and the prefix cache."""

from .ablation import ABLATIONS, Constants, means
from .batches import TOKENS_PER_BATCH, Batch, make_batches, some_of
from .borrow import Hooks, borrowed
from .cache import CacheError, without_cache_where_it_fails
from .contraction import contract, contract_neurons, lowered
from .contributions import Contributions
from .fitting import Cost, budget, bytes_without_gradient, numbers_per_token, tokens_within
from .inputs import Progress, Run, prepare
from .masked import TOKENS_TOGETHER, learning_run, rows_computed, run_circuits
from .memory import PeakBytes, free_bytes, in_memory, most_tokens, parse_bytes
from .patched import PatchedEdges
from .paths import GroupPaths
from .receivers import ReceiverGradients
from .recorded import RecordedRun
from .rules import RULES, Rules
from .runner import Runner
from .senders import SenderDifferences
from .trace import trace

__all__ = [
    "ABLATIONS",
    "RULES",
    "TOKENS_PER_BATCH",
    "TOKENS_TOGETHER",
    "Batch",
    "CacheError",
    "Constants",
    "Contributions",
    "Cost",
    "GroupPaths",
    "Hooks",
    "PatchedEdges",
    "PeakBytes",
    "Progress",
    "ReceiverGradients",
    "RecordedRun",
    "Rules",
    "Run",
    "Runner",
    "SenderDifferences",
    "borrowed",
    "budget",
    "bytes_without_gradient",
    "contract",
    "contract_neurons",
    "free_bytes",
    "in_memory",
    "learning_run",
    "lowered",
    "make_batches",
    "means",
    "most_tokens",
    "numbers_per_token",
    "parse_bytes",
    "prepare",
    "rows_computed",
    "run_circuits",
    "some_of",
    "tokens_within",
    "trace",
    "without_cache_where_it_fails",
]
