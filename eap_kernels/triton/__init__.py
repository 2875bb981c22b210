"""Triton kernels. Their modules are imported only when they run: Triton itself is optional."""

import importlib.util
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eap_kernels._schemas import tf32
from eap_kernels.reference import Backend

INSTALLED = importlib.util.find_spec("triton") is not None


class Triton(Backend):
    name = "triton"

    @property
    def device(self) -> str:
        # Triton's interpreter runs kernels on CPU tensors: for tests on machines without a GPU.
        return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

    def missing(self) -> str | None:
        if not INSTALLED:
            return "triton is not installed"
        return None if self.device == "cpu" or torch.cuda.is_available() else "torch sees no CUDA device"

    def edge_scores(self, *args: Any, **options: Any) -> None:
        from eap_kernels.triton.edge_scores import edge_scores

        edge_scores(*args, **options)

    def masked_read(self, base: Tensor, delta: Tensor, mask: Tensor) -> Tensor:
        from eap_kernels.triton.masked_read import masked_read

        return masked_read(base, delta, mask, tf32())

    def head_space_scores(self, *args: Any) -> None:
        scores_of_expanded(self, *args)

    def normalise_rows(self, *args: Any) -> Tensor:
        from eap_kernels.triton.normalise_rows import normalise_rows

        return normalise_rows(*args)

    def collapse(self, *args: Any) -> None:
        from eap_kernels.triton.collapse import collapse

        collapse(*args)


def scores_of_expanded(backend: Backend, *args: Any) -> None:
    """head_space_scores: rows are expanded by Triton, and contracted by the backend's own edge_scores."""
    from eap_kernels.reference.head_space_scores import head_space_scores
    from eap_kernels.triton.head_space_scores import expand

    contract, rows = partial(backend.edge_scores, tf32=tf32()), partial(expand, tf32=tf32())
    partial(head_space_scores, contract=contract, rounded=True, expand=rows)(*args)
