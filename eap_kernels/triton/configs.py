"""What the Triton kernels are compiled with: plain tables that are edited after measuring and enumerated by tests.

Rates are throughputs relative to the other entries of the same table. They are estimates: no entry has been timed on a
GPU yet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# Multiprocessors to fill: those of an H100. A constant, so that results depend on shapes alone.
PROCESSORS = 132


class Tile(NamedTuple):
    """One way to compile a kernel whose programs own a tile of the result."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    # Useful work per time, relative to the other entries of the same table.
    rate: float
    # Programs that run on a multiprocessor at once.
    resident: int = 1


# By shared memory: "large" is 227 KB (sm_90, sm_100), "small" the 99 KB that every card since sm_80 has.
# By arithmetic: "half" is fp16 and bf16, "tf32" is fp32 where the user allows tf32. From large tiles to small:
# the last one also serves operands that cannot be loaded in pieces of 16 bytes.
EDGE_SCORES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "large": {
        "half": (Tile(128, 256, 64, 8, 4, 1.0), Tile(128, 128, 64, 8, 4, 0.88), Tile(64, 64, 64, 8, 4, 0.4, 2)),
        "tf32": (Tile(128, 128, 32, 8, 4, 1.0), Tile(64, 64, 32, 4, 4, 0.6, 3)),
        "fp32": (Tile(128, 64, 16, 8, 3, 1.0, 2), Tile(64, 64, 16, 8, 3, 0.9, 2)),
        "fp64": (Tile(64, 64, 16, 8, 3, 1.0, 2),),
    },
    "small": {
        "half": (Tile(128, 128, 32, 8, 4, 1.0), Tile(64, 64, 64, 8, 3, 0.6, 2)),
        "tf32": (Tile(128, 64, 16, 8, 4, 1.0), Tile(64, 64, 32, 4, 3, 0.8, 2)),
        "fp32": (Tile(128, 64, 16, 8, 3, 1.0, 2), Tile(64, 64, 16, 8, 3, 0.9, 2)),
        "fp64": (Tile(64, 64, 16, 8, 3, 1.0, 2),),
    },
}
# Rows are receivers, columns are features, the inner dimension is senders. Loads follow a load of the list of senders,
# which takes its share of the stages.
MASKED_READ: dict[str, dict[str, tuple[Tile, ...]]] = {
    "large": {
        "half": (Tile(128, 128, 64, 8, 5, 1.0), Tile(32, 128, 64, 4, 7, 0.5), Tile(32, 64, 32, 4, 5, 0.4)),
        "tf32": (Tile(128, 64, 32, 8, 5, 1.0), Tile(32, 64, 32, 4, 5, 0.6)),
        "fp32": (Tile(64, 64, 16, 8, 5, 1.0), Tile(32, 64, 16, 4, 5, 0.9)),
        "fp64": (Tile(32, 64, 16, 4, 5, 1.0),),
    },
    "small": {
        "half": (Tile(128, 128, 32, 8, 3, 1.0), Tile(32, 128, 32, 4, 5, 0.6), Tile(32, 64, 32, 4, 5, 0.5)),
        "tf32": (Tile(64, 64, 32, 4, 5, 1.0), Tile(32, 64, 32, 4, 5, 0.8)),
        "fp32": (Tile(64, 64, 16, 8, 5, 1.0), Tile(32, 64, 16, 4, 5, 0.9)),
        "fp64": (Tile(32, 64, 16, 4, 5, 1.0),),
    },
}
# Share of kept edges in the dense path's tiles below which the sparse path runs: about the rate of the plain
# floating-point units over that of the matrix units.
SPARSE = {"half": 0.04, "tf32": 0.05, "fp32": 0.1, "fp64": 0.1}


def kind(dtype: torch.dtype, tf32: bool) -> str:
    """The row of a table for operands of this dtype, where fp32 may be rounded to tf32 or not."""
    if dtype == torch.float32:
        return "tf32" if tf32 else "fp32"
    return "fp64" if dtype == torch.float64 else "half"


def precision(kind: str) -> str:
    """`input_precision` of tl.dot; it matters for fp32 operands only."""
    return "tf32" if kind == "tf32" else "ieee"


def tiles(table: dict[str, dict[str, tuple[Tile, ...]]], kind: str, *operands: Tensor) -> tuple[Tile, ...]:
    """The entries to choose from for operands [rows, N, D].

    Single elements need more registers for addresses than pieces of 16 bytes: with them large tiles would spill.
    """
    entries = table[memory(operands[0].device)][kind]
    return entries if all(map(_aligned, operands)) else entries[-1:]


def _aligned(x: Tensor) -> bool:
    steps = (x.stride(0), x.stride(1), x.shape[2], x.data_ptr())
    return x.stride(2) == 1 and all(step % 16 == 0 for step in steps)


def memory(device: torch.device) -> str:
    """The size of a device's shared memory; the interpreter, on the CPU, counts as large."""
    return _memory(device.index or 0) if device.type == "cuda" else "large"


@functools.cache
def _memory(index: int) -> str:
    return "large" if torch.cuda.get_device_capability(index)[0] in (9, 10) else "small"


def one_row(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[rows, N, D] -> [rows, 1, N * D] where that is a view of every tensor: long rows leave fewer remainders."""
    if all(x.shape[2] == 1 or x.shape[1] == 1 or x.stride(1) == x.shape[2] * x.stride(2) for x in tensors):
        return tuple(x.view(len(x), 1, x.shape[1] * x.shape[2]) for x in tensors)
    return tensors
