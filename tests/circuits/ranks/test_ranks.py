"""Ranks of a process group share the work of calls, and end together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = (
    "bits on two ranks", "bits on three ranks", "order_of_sums", "shares", "memory", "faults", "want_of_memory",
    "ended", "going_on", "commands", "wrapped", "tensor_parallel", "tensor_parallel_shares", "tensor_parallel_faults",
)  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """What is wrong, by check; all in one process that forks, as imports take longest."""
    script = Path(__file__).with_name("runs.py")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def test_every_check_is_looked_at(found):
    assert set(found) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_ranks(name, found):
    assert not found[name]
