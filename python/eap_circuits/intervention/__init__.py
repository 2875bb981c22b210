"""Change a pass: circuits, single edges, paths of activations."""

from .activation_paths import record_paths
from .circuit_runs import TOKENS_TOGETHER, CircuitRuns, learning_run, run_circuits
from .edge_patching import PatchedEdges, prepare_patching
