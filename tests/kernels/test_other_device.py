"""The operators' tests, and what is benched, know which tensors are on the device and which on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eap_kernels._schemas import OPERATORS

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
TESTS = [str(FOLDER / "operators" / f"test_{op}.py") for op in OPERATORS]


def test_the_operators_tests_pass_on_a_pretended_device():
    """In a process of its own: what devices there are is decided when tests are collected."""
    path = os.pathsep.join(filter(None, [str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "EAP_QUICK": "1", "EAP_REQUIRE": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "other_device", "-p", "no:cacheprovider", "-k", "meta"]
    done = subprocess.run([*command, *TESTS], capture_output=True, text=True, env=env, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
