"""What is asked of a model, checked before any work is done, and the metric of its runs."""

from .asked import Progress, Request, check_ablation, check_tokens, parse_bytes, prepare, watched
from .circuits import as_circuits, check_circuit, check_kind, check_no_spans
from .fits import as_input_errors, try_model
from .measuring import DRAWS, Measurement, fetch, variance_by_rounding
from .picture_files import image_pairs_from_file
from .pictures import image_pairs
