"""The one place where senders meet receivers: S[u, v] += Σ_t ⟨Δ_u(t), gradient_v(t)⟩."""

from __future__ import annotations

import torch
from torch import Tensor

from eap_kernels import head_space_scores

from .receivers import ReceiverGradients
from .senders import SenderDifferences


def contract(senders: SenderDifferences, receivers: ReceiverGradients) -> Tensor:
    """Edge scores of what has been accumulated, summed over the batch: float32 (or float64) [S, R]."""
    with torch.no_grad():
        return head_space_scores(senders.nodes(), receivers.nodes(), senders.graph.reach)
