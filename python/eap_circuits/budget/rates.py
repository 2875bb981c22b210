"""How fast a device computes: what times are estimated with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..request import Request

# Of one H100, in floating-point operations a second, for models in low precision and in float32. Passes: half of what a
# large matrix product was measured at (bench/results), as the passes of whole models were not measured yet. The
# contraction: as `head_space_scores` was measured on the shapes of Llama-3.1-8B.
_LOW = 3.9e14, 1.0e14
_FLOAT32 = 2.6e13, 1.5e13


class Rates(NamedTuple):
    """Floating-point operations a second."""

    passes: float
    contraction: float


def rates_of(request: Request) -> Rates | None:
    """Those of one device of the kind that the request runs on."""
    if request.arch.device_kind != "cuda":
        return None
    return Rates(*(_LOW if request.arch.contraction_dtype == torch.bfloat16 else _FLOAT32))
