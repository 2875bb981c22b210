"""What is handed in beside a graph: the graph itself, and tensors over its edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import expected
from .unspoilt import usable

if TYPE_CHECKING:
    from .layout import Graph


def numbers(name: str, value: object, shape: Sequence[int | str], axes: str = "") -> Tensor:
    """A floating-point tensor of this shape, detached and on the CPU; refuses all else.

    Args:
        shape: a letter stands for any length.
        axes: what follows the shape in the error sentence.
    """
    return usable(_tensor(name, value, shape, False, axes))


def edge_flags(name: str, value: object, graph: Graph) -> Tensor:
    """A bool tensor [S, R] on the CPU; refuses all else."""
    return _tensor(name, value, graph.edge_mask.shape, True, " [senders, receivers]")


def finite(values: Tensor) -> bool:
    """Are all values finite? `isfinite().all()` takes ten times as long, and several times their memory."""
    return not values.numel() or all(end.isfinite() for end in values.aminmax())


def _tensor(name: str, value: object, shape: Sequence[int | str], flags: bool, axes: str) -> Tensor:
    wanted, kind = f"shape [{', '.join(map(str, shape))}]{axes}", "bool" if flags else "floating-point"
    if not isinstance(value, Tensor):
        raise expected(name, f"a {kind} tensor of {wanted}", type(value).__name__)
    fits = len(shape) == value.dim() and all(
        isinstance(m, str) or n == m for n, m in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise expected(name, wanted, list(value.shape))
    if not (value.dtype == torch.bool if flags else value.is_floating_point()):
        raise expected(name, f"a {kind} tensor", value.dtype)
    return value.detach().cpu()
