"""Backends and dtypes that every operator is tested on."""

import pytest
import torch

from eap_kernels import testing

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pytest_generate_tests(metafunc):
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", testing.available_backends())
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
