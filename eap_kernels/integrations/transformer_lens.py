"""Make TransformerLens's edge attribution (`attribution_patch` of version 4) contract with our operators.

It stacks the contribution differences of all writers anew for each reader and position. Here one call contracts all of
them, a segment for each position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import eap_kernels
from eap_kernels.integrations._patch import Patch, Replacement, expect, load, part

_OP = "transformer_lens.patch"


def patch() -> Patch:
    """Let `transformer_lens.tools.analysis.attribution_patch` score edges with `edge_scores`.

    Its passes, its checks and what it returns stay as they are. Use the result as a context manager or call its
    `restore()`; otherwise the patch stays.

    Raises:
        ImportError: TransformerLens is not installed, or a version without `attribution_patch`.
        RuntimeError: its functions are not those that this patch was written for.
    """
    module = load(_OP, "transformer_lens.tools.analysis.attribution_patching")
    original, hook_of = part(_OP, module, "_edge_effects"), part(_OP, module, "_writer_hook_name")
    if original.__module__ != __name__:
        expect(_OP, original, "_writer_hook_name", "clean_cache", "corrupt_cache", "activations", "gradients")
        expect(_OP, part(_OP, module, "enumerate_edges"), "parallel_attn_mlp", "_assert_edges_unique")
    return Patch(Replacement(module, "_edge_effects", _instead_of(original, hook_of)))


def _instead_of(original: Callable[..., Any], hook_of: Callable[[Any], str]) -> Callable[..., Any]:
    def edge_effects(clean_cache: Any, corrupt_cache: Any, edges: Sequence[tuple[Any, Any]]) -> dict[Any, float]:
        # Edges come position by position and reader by reader; the readers of a position see ever more writers.
        end = next((i for i, (writer, _) in enumerate(edges) if writer.position != edges[0][0].position), len(edges))
        readers: dict[Any, int] = {}
        for _, reader in edges[:end]:
            readers[reader] = readers.get(reader, 0) + 1
        writers = [writer for writer, reader in edges[:end] if reader.kind == "logits"]
        gradients = [corrupt_cache.gradients.get(reader.hook_name) for reader in readers]
        if any(each is None for each in gradients):
            theirs: dict[Any, float] = original(clean_cache, corrupt_cache, edges)  # which says what is missing
            return theirs
        written = ((hook_of(writer), writer) for writer in writers)
        clean, corrupt = clean_cache.activations, corrupt_cache.activations
        delta = torch.stack([_rows(clean[hook], writer) - _rows(corrupt[hook], writer) for hook, writer in written])
        grad = torch.stack([_rows(each, reader) for each, reader in zip(gradients, readers, strict=True)])
        reach = torch.tensor([*readers.values()], device="cpu")
        positions = torch.arange(delta.shape[1], device="cpu")
        scores = eap_kernels.edge_scores(delta, grad, reach, segments=positions)  # [T, S, R]
        seen = torch.arange(len(writers), device="cpu") < reach[:, None]  # [R, S]
        return dict(zip(edges, scores.cpu().transpose(1, 2)[:, seen].flatten().tolist(), strict=True))

    return edge_effects


def _rows(values: Tensor, node: Any) -> Tensor:
    """[1, T, D] or, of heads, [1, T, heads, D] -> [T, D]."""
    return values[0] if node.head is None else values[0, :, node.head]
