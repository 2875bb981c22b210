"""pytest plugin (-p other_device): the operators' tests on a device that is not the CPU, without any.

What fails on every GPU fails here too: operands on different devices, tensors made on the default device where the CPU
was meant, a generator of another device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from eap_kernels import testing
from tests.circuits.adapters import pretend

DEVICE = str(pretend.DEVICES[1])
testing.backends_on_devices = lambda: [("reference", DEVICE)]


def refusing(func: Any, args: Any, kwargs: Any, run: Any = pretend._run) -> Any:
    if kwargs.get("generator") is not None and kwargs.get("device") in pretend.DEVICES:
        raise RuntimeError(f"{func}: expected a generator of {kwargs['device']}, got one of the CPU")
    return run(func, args, kwargs)


pretend._run = refusing


@pytest.fixture(autouse=True)
def pretended() -> Iterator[None]:
    with pretend.pretending():
        yield
