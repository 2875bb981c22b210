"""What was measured lies in the user's cache: no call fails for what is or is not in it."""

import json
import subprocess
import sys

import pytest
import torch

import eap_kernels as ek
from eap_kernels.tune import choices

CPU = torch.device("cpu")
RIGHT = {"date": "2026-01-01", "verified": {}, "failed": {}, "seconds": {}}
SECONDS = {"edge_scores": {"bfloat16, flat": {"1000": {"cpu": 1.0, "reference": 2.0}}}}


def scores():
    """In bf16, in which `auto` asks what was measured on a CPU."""
    x = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    assert "edge_scores: auto runs" in ek.explain("edge_scores", x, x, torch.tensor([1, 2]))
    return ek.edge_scores(x, x, torch.tensor([1, 2])).tolist()


@pytest.mark.parametrize("folder", ["x" * 300, "/dev/null/folder", "/proc/self/mem"])
def test_a_folder_that_cannot_be_looked_into_is_as_good_as_an_empty_one(folder, monkeypatch):
    monkeypatch.setenv("EAP_CACHE", folder)
    assert scores() == [[12, 12], [0, 12]]
    assert choices.stored(CPU) == {}


@pytest.mark.parametrize(
    "found",
    [
        {**RIGHT, "failed": {"edge_scores": 5}},
        {**RIGHT, "verified": {"edge_scores": 5}},
        {**RIGHT, "seconds": {"edge_scores": {"bfloat16, flat": {"1000": {"cpu": "1.0", "reference": 2.0}}}}},
        {**RIGHT, "seconds": {"edge_scores": {"bfloat16, flat": {"1000": {"cpu": None}}}}},
        {name: RIGHT[name] for name in ("verified", "failed", "seconds")},
        "[" * 100_000,
    ],
)
def test_choices_that_cannot_be_are_measured_again(found, monkeypatch, tmp_path):
    monkeypatch.setenv("EAP_CACHE", str(tmp_path))
    right = {"found": {"bfloat16": {**RIGHT, "seconds": SECONDS}}}
    choices.path(CPU).write_text(json.dumps(right))
    assert scores() == [[12, 12], [0, 12]] and choices.stored(CPU)
    choices._known.clear()
    choices.path(CPU).write_text(found if isinstance(found, str) else json.dumps({"found": {"bfloat16": found}}))
    with pytest.warns(UserWarning, match="expected measured choices, found something else; they are measured again"):
        assert scores() == [[12, 12], [0, 12]]


def test_an_interruption_is_one_word():
    code = "import sys, eap_kernels.tune.__main__ as m\ndef stop(*_): raise KeyboardInterrupt\nm.tune = stop\nm.main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")
