"""Operators for edge attribution in transformers: tensors in, tensors out.

`edge_scores` scores every sender -> receiver edge, `masked_read` runs a circuit; the scores are the gradient
of the read's mask. Importing this package loads no accelerator runtime and no model library.
"""

from eap_kernels.ops import backends, edge_scores, explain, masked_read

__version__ = "0.1.0"
__all__ = ["__version__", "backends", "edge_scores", "explain", "masked_read"]
