"""Read a pass: what senders write, the gradients at receivers, a reference run, means; and backward rules."""

from .backward_rules import RULES, Rules
from .contraction import contract, contract_neurons, lowered
from .contributions import Contributions, SenderDifferences
from .means import ABLATIONS, Ablation, different_throughout, means
from .receiver_gradients import ReceiverGradients
from .reference_run import RecordedRun, Recording

__all__ = [
    "ABLATIONS",
    "RULES",
    "Ablation",
    "Contributions",
    "ReceiverGradients",
    "RecordedRun",
    "Recording",
    "Rules",
    "SenderDifferences",
    "contract",
    "contract_neurons",
    "different_throughout",
    "lowered",
    "means",
]
