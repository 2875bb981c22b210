"""Fixtures over passes.py."""

import pytest

from bench import measure
from bench.circuits import passes


@pytest.fixture(scope="session")
def model_and_data():
    return passes.model_and_data()


@pytest.fixture(scope="session")
def floor(model_and_data):
    return lambda steps: passes.floor(*model_and_data, steps)


@pytest.fixture(scope="session")
def forward(model_and_data):
    return lambda: passes.forward(*model_and_data)


@pytest.fixture(scope="session")
def peak_memory():
    """peak_memory(what, steps, **environment): bytes, see passes.py."""
    return lambda *what, **environment: measure.in_fresh_process(passes.peak, *what, **environment)
