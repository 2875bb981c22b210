"""The compiled library's CUDA kernels: csrc/cuda, registered in csrc/register_cuda.cpp."""

import functools
from typing import Any

import torch
from torch import Tensor

from eap_kernels import _native
from eap_kernels.reference import Backend
from eap_kernels.triton import INSTALLED, scores_of_expanded

# The largest share of kept edges at which a masked read adds them up one by one; where more are kept, the library's
# product is faster. Measured on an H100 in bf16, for one layer's receivers of an 8B model.
SPARSE = 0.1


class Cuda(Backend):
    name = device = "cuda"
    edge_scores = staticmethod(torch.ops.eap_kernels.edge_scores.default)

    def head_space_scores(self, *args: Any) -> None:
        scores_of_expanded(self, *args) if INSTALLED else super().head_space_scores(*args)

    def missing(self) -> str | None:
        return not_built() or (trial() if torch.cuda.is_available() else "torch sees no CUDA device")

    def masked_read(self, base: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
        """Waits for the device, which alone knows how many edges are kept."""
        if int(torch.count_nonzero(mask)) > SPARSE * mask.numel():
            return super().masked_read(base, delta, mask)
        read: Tensor = torch.ops.eap_kernels.masked_read.default(base, delta, mask)
        return read


def not_built() -> str | None:
    """Why the library holds no CUDA kernels, in one clause; None where it does."""
    if _native.failure or torch._C._dispatch_has_kernel_for_dispatch_key("eap_kernels::edge_scores", "CUDA"):
        return _native.failure
    build = _native.build_info()
    return build.cuda_failure if build else "the library was built without CUDA"


@functools.cache
def trial() -> str | None:
    """Why the CUDA kernels do not run on this machine's card, found by one small call; None where they do.

    A library may be built for other cards, or by an nvcc that is newer than the driver.
    """
    one = torch.ones(1, 1, 1, device="cuda")
    out = torch.zeros(1, 1, device="cuda")
    try:
        torch.ops.eap_kernels.edge_scores.default(one, one, torch.ones(1, dtype=torch.int64, device="cpu"), out, None)
        found = float(out)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"a trial call failed ({str(error).splitlines()[0]})"
    return None if found == 1 else f"a trial call gave {found:g} where 1 is right"
