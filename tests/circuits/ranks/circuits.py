"""Checks of how ranks that have parts of a model divide the work of its circuits, for `runs.py`."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

import eap_circuits as eap
from eap_circuits.adapters import Projection, bind
from eap_circuits.intervention import circuit_runs
from eap_circuits.intervention.groups import circuit_group
from eap_kernels import masked_read
from tests.circuits.ranks.forked import on_ranks
from tests.circuits.ranks.parts import DATA, checks, load, never_whole, saved, wrong_numbers

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def circuits_of(model: Any) -> dict[str, Callable[..., Any]]:
    """Circuits by key and by query head, of which one keeps so little that a rank has nothing to compute, and the
    gradient of a mask."""
    calls: dict[str, Callable[..., Any]] = {}
    for heads in ("kv", "query"):
        graph = bind(model).graph(heads)
        kept = torch.rand(graph.edge_mask.shape, generator=torch.Generator().manual_seed(0))
        some = [eap.Circuit(graph, graph.edge_mask & (kept < share)) for share in (0.4, 0.02)]
        calls[heads] = partial(eap.evaluate, model, some, DATA[:2])
    return {**calls, "gradient": partial(eap.attribute_circuit, model, some[0], DATA[:2])}


@contextmanager
def counted(work: Counter[str]) -> Iterator[None]:
    """Count what circuits store, the products of their reads, and the weights that project these."""
    allocate, of_heads = circuit_group.CircuitGroup.allocate, Projection.of_heads

    def stored(group: circuit_group.CircuitGroup, device: torch.device) -> None:
        work["stored"] += sum(map(math.prod, group._shapes))
        allocate(group, device)

    def read(base: torch.Tensor, delta: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        work["read"] += mask.numel() * base.numel()
        return masked_read(base, delta, mask)

    def projected(projection: Projection, heads: slice, dtype: torch.dtype) -> Any:
        found = of_heads(projection, heads, dtype)
        work["projected"] += found[0].numel()
        return found

    with (
        mock.patch.object(circuit_group.CircuitGroup, "allocate", stored),
        mock.patch.object(circuit_group, "masked_read", read),
        mock.patch.object(Projection, "of_heads", projected),
    ):
        yield


def circuits_in_parts() -> list[str]:
    """One process's circuits, where projections are divided, where their outputs are put together, and where one module
    computes them all; also where all circuits are read together, as on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        llama, olmo, phi = (saved(name, folder) for name in ("llama", "olmo2", "phi3"))
        with mock.patch.object(circuit_runs, "shared", return_value=True):
            wrong = wrong_numbers(llama, 2, circuits_of)
        wrong += wrong_numbers(llama, 2, circuits_of)
        wrong += wrong_numbers(olmo, 2, circuits_of)
        return wrong + wrong_numbers(phi, 2, circuits_of, divided="self_attn.qkv_proj.weight")


def circuits_shared() -> list[str]:
    """Each of two ranks stores, reads and projects half of what one process does; no weight of attention is whole."""

    def work_of(model: Any) -> dict[str, int]:
        calls = circuits_of(model)
        with counted(work := Counter()), never_whole(model.model.layers, ATTENTION):
            for name in ("kv", "query"):
                calls[name]()
        return dict(work)

    with tempfile.TemporaryDirectory() as folder:
        path = saved("llama", folder)
        alone, both = work_of(load(path)), on_ranks(2, lambda _: work_of(load(path, 2)))
    right = [{name: size // 2 for name, size in alone.items()}] * 2
    return [] if both == right and min(alone.values()) > 0 else [f"{both}, of one process {alone}"]


CHECKS = checks(circuits_in_parts, circuits_shared)
