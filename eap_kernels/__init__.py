"""Operators for edge attribution in transformers: tensors in, tensors out.

`edge_scores` scores every sender -> receiver edge, `head_space_scores` does so from head space, `masked_read` runs
a circuit; the scores are the gradient of the read's mask. Importing this package loads no
accelerator runtime and no model library.
"""

from eap_kernels.ops import Nodes, backends, edge_scores, explain, head_space_scores, masked_read

__version__ = "0.1.0"
__all__ = ["Nodes", "__version__", "backends", "edge_scores", "explain", "head_space_scores", "masked_read"]
