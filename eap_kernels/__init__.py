"""Operators for edge attribution in transformers: tensors in, tensors out.

`edge_scores` scores every edge from a sender to a receiver, `head_space_scores` does the same from head space, and
`masked_read` gives the inputs of receivers in a circuit. The gradient of its mask is `edge_scores`. `MaskedReads`
are all reads of one run, for learning masks.
`normalise_rows` and `collapse` take what a pass has at norms and their readers into head space. Importing this package
loads no accelerator runtime and no model library.
"""

from eap_kernels.ops import Nodes, backends, edge_scores, explain, head_space_scores, masked_read
from eap_kernels.passes.capture import collapse, normalise_rows
from eap_kernels.passes.reads import MaskedReads

__version__ = "0.1.0"
__all__ = [
    "MaskedReads",
    "Nodes",
    "__version__",
    "backends",
    "collapse",
    "edge_scores",
    "explain",
    "head_space_scores",
    "masked_read",
    "normalise_rows",
]
