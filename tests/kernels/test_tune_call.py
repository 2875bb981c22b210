"""What `tune` is called with, and how it ends where nobody reads what it says."""

import os
import subprocess
import sys

import pytest
import torch

import eap_kernels as ek
from eap_kernels import _auto
from eap_kernels.tune import choices


@pytest.mark.parametrize("name", ["cuda:7", "meta", "nonsense"])
def test_only_devices_of_this_machine_are_measured(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=f"tune: expected .*, got '{name}'"):
        ek.tune([name])


@pytest.mark.parametrize("given", ["cpu", torch.device("cpu"), ["cpu", torch.device("cpu")], iter(["cpu"]), None])
def test_devices_are_given_as_torch_takes_them_one_or_several(given, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(choices, "stored", lambda device: {"bfloat16": {}})
    monkeypatch.setattr(_auto, "told", lambda device, arithmetic: {arithmetic: str(device)})
    cpu = torch.device("cpu")
    assert ek.tune(given) == [f"{choices.name_of(cpu)}, bfloat16: cpu", f"stored in {choices.path(cpu)}"]


@pytest.mark.parametrize("module", ["eap_kernels.info", "eap_kernels.tune"])
def test_a_reader_that_goes_ends_it_without_a_word(module):
    arguments = ["--help"] if module == "eap_kernels.tune" else []
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
