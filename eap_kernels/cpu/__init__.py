"""The compiled library's CPU kernels: csrc/cpu, registered in csrc/register.cpp."""

import torch

from eap_kernels import _native
from eap_kernels.reference import Backend


class Cpu(Backend):
    name = device = "cpu"
    edge_scores = staticmethod(torch.ops.eap_kernels.edge_scores.default)
    head_space_scores = staticmethod(torch.ops.eap_kernels.head_space_scores.default)
    masked_read = staticmethod(torch.ops.eap_kernels.masked_read.default)
    normalise_rows = staticmethod(torch.ops.eap_kernels.normalise_rows.default)
    collapse = staticmethod(torch.ops.eap_kernels.collapse.default)

    def missing(self) -> str | None:
        return _native.failure
