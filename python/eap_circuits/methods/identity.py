"""What tells requests apart, for runs that go on where another stopped."""

from __future__ import annotations

from typing import Any

from ..forward import Constants
from ..identity import data_identity, model_identity, tensor_digest
from .spec import AttributionRequest


def request_identity(request: AttributionRequest) -> dict[str, Any]:
    """What two runs must have in common for one to go on where the other stopped; plain JSON values."""
    ablation, other = request.ablation, request.ablation_data
    if isinstance(ablation, Constants):
        ablated = ["constants", *map(tensor_digest, ablation.tensors)]
    else:
        ablated = [ablation, *([] if other is None else data_identity(other))]
    return {
        "model": model_identity(request.arch.model),
        "data": [*data_identity(request.data), tensor_digest(request.edges)],
        "metric": request.metric.name,
        "graph": request.graph.to_dict(),
        "settings": [request.batch_size, request.reuse_prefix, request.compat, *ablated, *sorted(request.keep)],
    }
