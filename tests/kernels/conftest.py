"""Backends and dtypes that every operator is tested on."""

import os

import pytest
import torch

from eap_kernels import testing
from eap_kernels.tune import choices

# Fewer and smaller cases, for Triton's interpreter in `make test`.
QUICK = os.environ.get("EAP_QUICK") == "1"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize(("impl", "device"), testing.backends_on_devices())
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_was_measured_here(monkeypatch, tmp_path_factory):
    """`auto` follows its rules, whatever the user's cache holds."""
    monkeypatch.setenv("EAP_CACHE", str(tmp_path_factory.getbasetemp() / "no-cache"))
    monkeypatch.setenv("EAP_TUNE", "0")
    monkeypatch.setattr(choices, "_known", {})


@pytest.fixture(autouse=True)
def tensors_on_the_backend_s_device(request):
    """Where a test has a `device`, tensors that it makes lie there."""
    with torch.device(request.node.callspec.params["device"] if "device" in request.fixturenames else "cpu"):
        yield


@pytest.fixture
def fp32_precision():
    """fp32_precision(name) sets torch's switch for matrix products on a GPU, for one test."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision

    def choose(name: str) -> None:
        matmul.fp32_precision = name

    yield choose
    choose(before)


@pytest.fixture
def randn(generator):
    """Normal values, the same on every device."""

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=dtype, device="cpu")
        return values.to(torch.get_default_device())

    return make
