"""The only place that touches hooks: contributions, gradients, the masked read and the prefix cache."""

from .batches import Batch, make_batches
from .borrow import borrowed
from .contract import contract
from .inputs import ABLATIONS, Progress, Run, prepare
from .masked import CorruptedRun, run_circuit
from .receivers import ReceiverGradients
from .runner import Runner
from .senders import SenderDifferences

__all__ = [
    "ABLATIONS",
    "Batch",
    "CorruptedRun",
    "Progress",
    "ReceiverGradients",
    "Run",
    "Runner",
    "SenderDifferences",
    "borrowed",
    "contract",
    "make_batches",
    "prepare",
    "run_circuit",
]
