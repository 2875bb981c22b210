"""The only place that touches hooks: contributions, gradients, the masked read and the prefix cache."""

from .batches import Batch, make_batches
from .borrow import Hooks, borrowed
from .contraction import contract
from .inputs import ABLATIONS, Progress, Run, prepare
from .masked import TOKENS_TOGETHER, run_circuits
from .memory import SHARE_OF_FREE, PeakBytes, free_bytes, in_memory, most_tokens, parse_bytes
from .patched import PatchedEdges
from .receivers import ReceiverGradients
from .recorded import RecordedRun
from .rules import RULES, Rules
from .runner import Runner
from .senders import SenderDifferences
from .trace import trace

__all__ = [
    "ABLATIONS",
    "RULES",
    "SHARE_OF_FREE",
    "TOKENS_TOGETHER",
    "Batch",
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
    "contract",
    "free_bytes",
    "in_memory",
    "make_batches",
    "most_tokens",
    "parse_bytes",
    "prepare",
    "run_circuits",
    "trace",
]
