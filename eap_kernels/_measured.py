"""Which backend was fastest on GPUs, by compute capability: measured.json, which bench/record.py writes.

A case is what decides within an operator: dtype, memory, sizes. The same functions name it when a bench is recorded and
when `auto` looks it up.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

TABLE = Path(__file__).with_name("measured.json")
# Of edge_scores: so few receivers, and all larger numbers, were measured apart.
FEW_RECEIVERS = (1, 12, 37)
# Of masked_read: up to so large a share of kept edges.
SHARES = (0.03, 0.3, 1.0)


def edge_scores_case(dtype: str, flat: bool, receivers: int) -> str:
    """`dtype` as _dtype names it; `flat`: tokens and features are one dimension in memory."""
    few = next((f", up to {n} receivers" for n in FEW_RECEIVERS if receivers <= n), "")
    return f"{_dtype(dtype)}, {'flat' if flat else 'strided'}{few}"


def masked_read_case(dtype: str, share: float) -> str:
    return f"{_dtype(dtype)}, up to {next(x for x in SHARES if share <= x):.0%} kept"


def head_space_scores_case(dtype: str) -> str:
    return _dtype(dtype)


def _dtype(name: str) -> str:
    # The same kernels at the same rate.
    return "bfloat16" if name == "float16" else name


@functools.cache
def _table() -> dict[str, dict[str, dict[str, list[str]]]]:
    found: dict[str, dict[str, dict[str, list[str]]]] = json.loads(TABLE.read_text())
    return found


def ranking(capability: str, op: str, case: str) -> list[str]:
    """Backends from the fastest on; none where this case was not measured on such a card."""
    return _table().get(capability, {}).get(op, {}).get(case, [])
