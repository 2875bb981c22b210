"""Read a pass: what senders write, the gradients at receivers, a reference run, ablations; and backward rules."""

from .ablations import ABLATIONS, Ablation, ablation_of, deviations
from .contraction import contract, contract_neurons, feature_slices, lowered
from .contributions import BothSides, less_clean, record_both_sides, record_contributions, record_corrupted_side
from .receiver_gradients import ReceiverGradients
from .reference_run import ReceiverInputs, ReferenceRun, record_receiver_inputs, record_run
from .rules import RULES, Rules
from .sums import compare_sums, reads_past_receivers
from .within_heads import WithinHeads
