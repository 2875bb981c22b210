"""Norms of the residual stream in one kernel each on a GPU, where a model's own code launches half a dozen.

On the way back it is twice as many. So passes of a model with RMSNorms take less time than the model by itself. Results
are rounded once, where most models round the normalised input before they multiply it with the gain.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ...adapters import Architecture, Norm
from ..hooks import Hooks


def fuse_norms(arch: Architecture, hooks: Hooks) -> None:
    """Let norms of the residual stream run so in one pass, before others change what they compute."""
    for norm in arch.norms:
        if norm.device.type == "cuda" and norm.in_steps:
            hooks.replace_forward(norm.module, partial(_fused, norm, norm.module.forward))


def _fused(norm: Norm, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    # Kernels take one dtype, and where there are two, models differ in which of them the result has.
    alike = next(norm.module.parameters(), x).dtype == x.dtype
    return norm.fused(x) if alike else forward(x)
