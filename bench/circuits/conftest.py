"""Fixtures over passes.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PASSES = Path(__file__).with_name("passes.py")


@pytest.fixture(scope="session")
def passes():
    spec = importlib.util.spec_from_file_location("passes", PASSES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model_and_data(passes):
    return passes.model_and_data()


@pytest.fixture(scope="session")
def floor(passes, model_and_data):
    return lambda steps: passes.floor(*model_and_data, steps)


@pytest.fixture(scope="session")
def forward(passes, model_and_data):
    return lambda: passes.forward(*model_and_data)


@pytest.fixture(scope="session")
def peak_memory():
    """peak_memory(what, steps, **environment): bytes, see passes.py."""

    def measure(what, steps, **environment):
        command = [sys.executable, str(PASSES), what, str(steps)]
        given = os.environ | environment
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=given).stdout)

    return measure
