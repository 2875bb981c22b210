"""Make auto-circuit (UFO-101/auto-circuit) patch edges and take mask gradients with our operators.

Its wrappers keep the output of every source in one buffer that is part of the autograd graph; each read subtracts
the buffer from the ablations, and its gradient passes through the whole buffer. Here the difference is kept once,
outside the graph, and a read hands its gradient to the sources' outputs themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

import eap_kernels
from eap_kernels._schemas import refuse_second_order
from eap_kernels.integrations._patch import Patch, Replacement, expect, load, part

_OP = "auto_circuit.patch"
_INTERFACE = (
    *("patch_mode", "is_dest", "is_src", "module", "src_idxs", "in_srcs", "patch_src_outs", "curr_src_outs"),
    *("patch_mask", "mask_fn", "hard_concrete", "sigmoid", "batch_size", "dropout_layer"),
    *("head_dim", "seq_dim", "dims", "einsum", "sample_hard_concrete"),
)


def patch() -> Patch:
    """Let `auto_circuit` patch edges with `masked_read` and take its mask gradients with `edge_scores`.

    If each example or position has its own mask, the package's einsum stays in use for both. Use the result as a
    context manager or call its `restore()`; otherwise the patch stays.

    Raises:
        ImportError: `auto_circuit` is not installed.
        RuntimeError: its patch wrapper is not the one that this patch was written for.
    """
    wrapper = load(_OP, "auto_circuit.utils.patch_wrapper")
    original = part(_OP, wrapper, "PatchWrapperImpl", "forward")
    if original.__module__ != __name__:
        expect(_OP, original, *_INTERFACE)
    return Patch(Replacement(wrapper.PatchWrapperImpl, "forward", _forward(original, wrapper)))


def _forward(original: Callable[..., Any], package: Any) -> Callable[..., Any]:
    running: MutableMapping[Tensor, _Sources] = WeakIdKeyDictionary()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.patch_mode:
            return original(self, *args, **kwargs)
        # One buffer for all wrappers, a new one for each `patch_mode`.
        current = self.curr_src_outs
        sources = running.setdefault(current, _Sources())
        if self.is_dest:
            sources.start(self.patch_src_outs, current)
            x = _read(self, args[0], sources, package)
        else:
            x = args[0].clone()
        out = self.module(x, *args[1:], **kwargs)
        if self.is_src:
            rows = out.unsqueeze(0) if self.head_dim is None else out.movedim(self.head_dim, 0)
            current[self.src_idxs] = rows.detach()
            sources.write(self.src_idxs, rows)
        return out

    return forward


class _Sources:
    """The outputs of the sources during one `patch_mode`, and their differences from the ablations.

    A change to the buffer of outputs by anything other than the wrappers' own passes is not noticed.
    """

    def __init__(self) -> None:
        # Outputs of the latest pass that can receive a gradient, by the rows that they fill.
        self.outputs: dict[tuple[int, int], Tensor] = {}
        self.ablations: Tensor | None = None
        self._version = -1
        # ablations - outputs, [S, batch, ...]; rows before `kept` are kept for a backward.
        self._rows, self._kept = torch.empty(0), 0

    def start(self, ablations: Tensor, current: Tensor) -> None:
        """Before a read: take the difference, unless it was already taken from these ablations as they are."""
        version = -1 if ablations.is_inference() else ablations._version  # a step of an optimiser changes them in place
        if ablations is not self.ablations or version != self._version:
            self.ablations, self._version, self._kept = ablations, version, 0
            with _no_autograd():
                self._rows = ablations - current

    def write(self, span: slice, rows: Tensor) -> None:
        key = (span.start, span.stop)
        self.outputs.pop(key, None)
        if rows.requires_grad:
            self.outputs[key] = rows
        if self.ablations is None:
            return
        with _no_autograd():
            # A second pass must not change what the first one's backward will read.
            if span.start < self._kept:
                self._rows, self._kept = self._rows.clone(), 0
            self._rows[span] = self.ablations[span] - rows

    def read(self, span: slice) -> Tensor:
        if torch.is_grad_enabled():
            self._kept = max(self._kept, span.stop)
        # .data: writing later rows must not count as a change of these.
        return self._rows.data[span]


@contextmanager
def _no_autograd() -> Iterator[None]:
    """No gradients, and no inference tensors either, because those could not be written to later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _read(wrapper: Any, x: Tensor, sources: _Sources, package: Any) -> Tensor:
    per_example = wrapper.batch_size is not None and wrapper.mask_fn is None
    if wrapper.mask_fn == "hard_concrete":
        mask = package.sample_hard_concrete(wrapper.patch_mask, len(x), wrapper.batch_size is not None)
        per_example = True
    else:
        mask = wrapper.patch_mask.sigmoid() if wrapper.mask_fn == "sigmoid" else wrapper.patch_mask
    mask = wrapper.dropout_layer(mask)
    span = wrapper.in_srcs
    how: _Shared | _Separate = _Shared(wrapper.head_dim)
    if per_example or wrapper.seq_dim is not None:
        dest = "" if wrapper.head_dim is None else "dest"
        axes = f"{'batch' if per_example else ''} {'' if wrapper.seq_dim is None else 'seq'} {dest} src"
        how = _Separate(package.einsum, axes, f"src batch {wrapper.dims} ...", f"batch {wrapper.dims} {dest} ...")
    outputs = {
        (start - span.start, stop - span.start): rows
        for (start, stop), rows in sources.outputs.items()
        if span.start <= start and stop <= span.stop
    }
    ablations = wrapper.patch_src_outs[span]
    return _apply(x, mask, sources.read(span), how, list(outputs), ablations, *outputs.values())


class _Read(torch.autograd.Function):
    """x + sum_u mask[..., u] * rows[u], with a gradient in x, mask, and the ablations and outputs behind the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor,
        rows: Tensor,
        how: _Shared | _Separate,
        spans: list[tuple[int, int]],
        ablations: Tensor,
        *outputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(mask, rows)
        ctx.how, ctx.spans = how, spans
        return how.read(x, rows, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_order(_OP)
        mask, rows = ctx.saved_tensors
        to_mask = ctx.how.mask_gradient(rows, grad, mask) if ctx.needs_input_grad[1] else None
        used = (mask != 0).reshape(-1, len(rows)).any(0).tolist()
        wanted = [any(used[start:stop]) for start, stop in ctx.spans]
        # The rows are ablations - outputs, hence the sign.
        learned = ctx.needs_input_grad[5]
        to_rows = ctx.how.rows_gradient(rows, grad, -mask) if learned or any(wanted) else None
        to_outputs = (
            None if to_rows is None or not want else to_rows[start:stop]
            for want, (start, stop) in zip(wanted, ctx.spans, strict=True)
        )
        to_ablations = -to_rows if learned and to_rows is not None else None
        return (grad, to_mask, None, None, None, to_ablations, *to_outputs)


_apply: Callable[..., Tensor] = _Read.apply


class _Shared(NamedTuple):
    """Reads through one mask for all examples and positions, [(heads,) S], by the operators."""

    head_dim: int | None

    def _tokens(self, x: Tensor) -> Tensor:
        """[batch, ..., (heads,) D] -> [heads or 1, N, D]."""
        return (x.unsqueeze(0) if self.head_dim is None else x.movedim(self.head_dim, 0)).flatten(1, -2)

    def read(self, x: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        y = eap_kernels.masked_read(self._tokens(x), rows.flatten(1, -2), mask.reshape(-1, len(rows)).T)
        y = y.reshape(len(y), *rows.shape[1:])
        return y[0] if self.head_dim is None else y.movedim(0, self.head_dim)

    def mask_gradient(self, rows: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        receivers = self._tokens(grad)
        reach = torch.full((len(receivers),), len(rows), device="cpu")
        scores = eap_kernels.edge_scores(rows.flatten(1, -2), receivers, reach)  # [S, heads or 1]
        return scores.T.reshape(mask.shape).to(mask.dtype)

    def rows_gradient(self, rows: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        receivers = self._tokens(grad)
        zero = receivers.new_zeros(()).expand(receivers.shape[1:])
        return eap_kernels.masked_read(zero, receivers, mask.reshape(-1, len(rows))).reshape(rows.shape)


class _Separate(NamedTuple):
    """Reads through a mask per example or per position, by the package's own einsum."""

    einsum: Callable[..., Tensor]
    mask_axes: str
    row_axes: str
    axes: str

    def read(self, x: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        return x + self.einsum(mask, rows, f"{self.mask_axes}, {self.row_axes} -> {self.axes}")

    def mask_gradient(self, rows: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        return self.einsum(rows, grad, f"{self.row_axes}, {self.axes} -> {self.mask_axes}")

    def rows_gradient(self, rows: Tensor, grad: Tensor, mask: Tensor) -> Tensor:
        return self.einsum(mask, grad, f"{self.mask_axes}, {self.axes} -> {self.row_axes}")
