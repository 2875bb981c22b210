"""Ranks of a process group share the work of calls, and end together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import eap_circuits as eap
from eap_kernels.testing import relative_error
from tests.circuits.ranks import parts
from tests.circuits.ranks.runs import CHECKS

pytestmark = pytest.mark.long

NAMES = (
    "bits on two ranks", "bits on three ranks", "order_of_sums", "shares", "memory", "faults", "want_of_memory",
    "ended", "going_on", "commands", "wrapped", "in step on two ranks", "in step on three ranks", "tensor_parallel",
    "tensor_parallel_shares", "tensor_parallel_commands", "tensor_parallel_faults", "tensor_parallel_ended",
    "circuits_in_parts", "circuits_shared", "killed_at_random", "reproduced",
)  # fmt: skip
SLOW = ("expert_parallel", "experts_exchanged", "sharded_further")


def wrong(names: tuple[str, ...]) -> dict[str, list[str]]:
    """What is wrong, by check; all in one process that forks, as imports take longest."""
    script = Path(__file__).with_name("runs.py")
    ran = subprocess.run([sys.executable, str(script), *names], capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr
    return dict(json.loads(ran.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    return wrong(NAMES)


@pytest.fixture(scope="module")
def found_slowly() -> dict[str, list[str]]:
    return wrong(SLOW)


def test_every_check_is_looked_at():
    assert {*NAMES, *SLOW} == set(CHECKS)


@pytest.mark.parametrize("name", NAMES)
def test_ranks(name, found):
    assert not found[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_experts_and_further_shards(name, found_slowly):
    assert not found_slowly[name]


@pytest.mark.slow
def test_a_command_under_torchrun(tmp_path):
    """Two copies of a model, each divided between two processes."""
    if not parts.MAKES_COPIES:
        pytest.skip("only since transformers 5.23 several copies of a model can be in parts")
    folder = parts.saved("llama", str(tmp_path), torch.float32)
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(folder)
    parts.DATA.save(tmp_path / "pairs.safetensors")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "eap_circuits"]
    asked = ["--data", "pairs.safetensors", "--tensor-parallel", "2", "--batch-size", "2", "-o", "scores.safetensors"]
    paths = [str(Path(__file__).parents[3] / "python"), str(Path(__file__).parents[3])]
    ran = subprocess.run(
        [sys.executable, *torchrun, "attribute", folder, *asked],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    right = eap.attribute(AutoModelForCausalLM.from_pretrained(folder), parts.DATA, batch_size=2)
    assert relative_error(eap.EdgeScores.load(tmp_path / "scores.safetensors").values, right.values) < 1e-5
