"""Make the published EAP-IG package (hannamw/EAP-IG) score edges and run circuits with our operators.

Its hooks contract a buffer of activation differences with the gradients at each receiver, and its circuits read
the buffer through a mask: two einsums, found by their expressions. Our operators read the buffer in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import eap_kernels
from eap_kernels.integrations._patch import Patch, Replacement, expect, load, part

_SCORES = "batch pos forward hidden, batch pos backward hidden -> forward backward"
_READ = "batch pos previous hidden, previous ... -> batch pos ... hidden"


def patch(module: str = "eap") -> Patch:
    """Let `eap` score edges with `edge_scores` and evaluate circuits with `masked_read`.

    Everything else, including node and neuron scores, runs as published. Use the result as a context manager or call
    its `restore()`; otherwise the patch stays.

    Args:
        module: where the package is, such as "circuitkit.backends.eap" for CircuitKIT's copy.

    Raises:
        ImportError: it is not installed.
        RuntimeError: its hooks are not the ones that this patch was written for.
    """
    op = "eap_ig.patch"
    utils, evaluate = load(op, f"{module}.utils", f"{module}.eap_utils"), load(op, f"{module}.evaluate")
    expect(op, part(op, utils, "make_hooks_and_matrices"), "einsum", _SCORES)
    expect(op, part(op, evaluate, "evaluate_graph"), "einsum", _READ)
    einsums = [part(op, each, "einsum") for each in (utils, evaluate)]
    return Patch(
        Replacement(utils, "einsum", _instead_of(einsums[0], _SCORES, _edge_scores)),
        Replacement(evaluate, "einsum", _instead_of(einsums[1], _READ, _masked_read)),
    )


def _instead_of(
    einsum: Callable[..., Any], expression: str, ours: Callable[[Tensor, Tensor], Tensor]
) -> Callable[..., Any]:
    """An einsum that hands one expression to another function."""

    def call(*args: Any) -> Any:
        *operands, given = args
        return ours(*operands) if given == expression else einsum(*args)

    return call


def _rows(x: Tensor) -> Tensor:
    """[batch, pos, rows, hidden] -> [rows, tokens, hidden], a view of a whole buffer or of its first rows."""
    return x.flatten(0, 1).transpose(0, 1)


def _edge_scores(delta: Tensor, grad: Tensor) -> Tensor:
    senders, receivers = delta.shape[2], grad.shape[2]
    reach = torch.full((receivers,), senders, device="cpu")
    return eap_kernels.edge_scores(_rows(delta), _rows(grad), reach).to(delta.dtype)


def _masked_read(delta: Tensor, mask: Tensor) -> Tensor:
    """[batch, pos, S, hidden], [S] or [S, heads] -> [batch, pos, (heads,) hidden]."""
    rows = _rows(delta)
    zero = rows.new_zeros(()).expand(rows.shape[1:])
    read = eap_kernels.masked_read(zero, rows, mask.reshape(len(mask), -1))  # [heads, N, D]
    read = read.reshape(len(read), *delta.shape[:2], -1)
    return read.movedim(0, 2) if mask.dim() == 2 else read[0]
