"""A call that was stopped anywhere goes on from its checkpoint to the same bits."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import eap_circuits as eap
from eap_circuits.checkpoint import file as checkpoint_file
from eap_circuits.evaluation import faithfulness
from eap_circuits.methods import METHODS
from tests.circuits.checkpoint.calls import long_calls, numbers

NAMES = (
    "eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "eap-conductance", "eap-gp",
    "information-flow-routes", "exact", "evaluate", "evaluate-mean", "curve", "card", "learn_mask", "prune_gradually",
    "refine", "ibcircuit", "optimal_constants",
)  # fmt: skip


class Stop(BaseException):
    pass


@pytest.fixture(autouse=True)
def every_batch_is_saved(monkeypatch):
    monkeypatch.setattr(checkpoint_file, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(checkpoint_file, "SHARE_OF_TIME", float("inf"))


@pytest.fixture
def calls(make_model, make_pairs):
    return long_calls(make_model("gpt2", torch.float32), make_pairs(seed=3, n=5))


def same(found, right) -> bool:
    pairs = zip(numbers(found), numbers(right), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def counted(into: list, stop_after: int = 0):
    def progress(done, total):
        into.append((done, total))
        if len(into) == stop_after:
            raise Stop

    return progress


def test_every_long_call_is_tested(calls):
    assert set(calls) == set(NAMES) and set(METHODS) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_stopped_between_batches_it_redoes_none(name, calls, tmp_path):
    call, file, steps, more = calls[name], tmp_path / "x.safetensors", [], []
    right = call(progress=counted(steps))
    with pytest.raises(Stop):
        call(checkpoint=file, progress=counted([], 2))
    assert same(call(checkpoint=file, progress=counted(more)), right)
    assert more == steps[2:]
    # What is done is not done again, and gives the same.
    before, again = file.read_bytes(), []
    assert same(call(checkpoint=file, progress=counted(again)), right)
    assert not again and file.read_bytes() == before and [file] == list(tmp_path.iterdir())


class Fails(TorchDispatchMode):
    """Raises at one of the operations on what sums and masks are made of."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = (x for x in args if isinstance(x, torch.Tensor))
        self.left -= any(x.dtype in (torch.float64, torch.bool) for x in found)
        if self.left == 0:
            raise Stop
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_stopped_within_a_sum_nothing_counts_twice_or_is_lost(name, calls, tmp_path):
    call, right = calls[name], calls[name]()
    with Fails(-1) as never:
        call()
    count = -1 - never.left
    for number, at in enumerate(random.Random(name).sample(range(1, count), min(count - 1, 3))):
        file = tmp_path / f"{number}.safetensors"
        with contextlib.suppress(Stop), Fails(at):
            call(checkpoint=file)
        assert same(call(checkpoint=file), right), at


@pytest.mark.parametrize("name", ["eap", "exact", "evaluate", "optimal_constants"])
def test_a_save_that_fails_is_said_and_costs_nothing(name, calls, tmp_path, monkeypatch):
    call, right, real, file = calls[name], calls[name](), checkpoint_file.save_file, tmp_path / "x.safetensors"
    for failing in (1, 2, 3):
        saves = []

        def save(tensors, path, metadata, failing=failing, saves=saves):
            saves.append(path)
            if len(saves) == failing:
                Path(path).write_bytes(b"half")
                raise OSError(28, "No space left on device")
            real(tensors, path, metadata=metadata)

        monkeypatch.setattr(checkpoint_file, "save_file", save)
        with pytest.raises(eap.InputError, match=r"x\.safetensors: cannot be written \(No space left"):
            call(checkpoint=file)
        monkeypatch.setattr(checkpoint_file, "save_file", real)
        assert same(call(checkpoint=file), right)
        assert list(tmp_path.iterdir()) == [file]
        file.unlink()


def test_an_error_on_the_way_out_does_not_hide_the_first(calls, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_file, "SECONDS_BETWEEN_SAVES", 1e9)

    def stop(done, total):
        if done > 2:
            monkeypatch.setattr(checkpoint_file, "save_file", full)
            raise Stop

    with pytest.warns(UserWarning, match="not in the checkpoint"), pytest.raises(Stop):
        calls["eap"](checkpoint=tmp_path / "x.safetensors", progress=stop)


@pytest.mark.parametrize("name", NAMES)
def test_after_want_of_memory_it_goes_on_with_other_batches(name, make_model, make_pairs, tmp_path, relative):
    call = long_calls(make_model("gpt2"), make_pairs(seed=3, n=5))[name]
    file = tmp_path / "x.safetensors"
    right = call()
    with pytest.raises(Stop):
        call(checkpoint=file, progress=counted([], 1))
    whole = name in ("learn_mask", "ibcircuit", "prune_gradually", "refine")
    smaller = {"memory": 0} if whole else {"batch_size": 1, "memory": "1GB"}
    found = call(checkpoint=file, **smaller)
    for a, b in zip(numbers(found), numbers(right), strict=True):
        assert relative(a.double(), b.double()) < 1e-5


def test_constants_learned_for_each_circuit_go_on_wherever_they_stopped(make_model, make_pairs, tmp_path, monkeypatch):
    model, data = make_model("gpt2", torch.float32), make_pairs(seed=3, n=4)
    scores = eap.attribute(model, data, method="eap")
    circuits = [scores.select(10), scores.select(20)]
    monkeypatch.setattr(faithfulness, "optimal_constants", lambda *args, **more: learn(*args, steps=2, **more))
    learn = eap.optimal_constants

    def call(**more):
        return eap.evaluate(model, circuits, data, ablation="optimal", batch_size=2, **more)

    right, real, file = call(), checkpoint_file._File.save, tmp_path / "x.safetensors"
    for at in (1, 4, 9, 14):
        saves = []

        def save(self, at=at, saves=saves):
            real(self)
            saves.append(1)
            if len(saves) == at:
                raise Stop

        monkeypatch.setattr(checkpoint_file._File, "save", save)
        with pytest.raises(Stop):
            call(checkpoint=file)
    monkeypatch.setattr(checkpoint_file._File, "save", real)
    assert same(call(checkpoint=file), right)


def test_a_termination_that_the_users_code_catches_comes_all_the_same(make_model, make_pairs, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda _, number: sent.append((number, signal.getsignal(number))))

    def metric(logits, batch):
        if not sent:
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)
        return logits[:, 0]

    eap.attribute(make_model("gpt2"), make_pairs(n=3), metric, method="eap", checkpoint=tmp_path / "x.safetensors")
    assert sent == [(signal.SIGTERM, signal.SIG_DFL)]


def test_a_signals_handler_that_the_users_code_sets_stays(make_model, make_pairs, tmp_path):
    def own(*_):
        pass

    def metric(logits, batch):
        signal.signal(signal.SIGTERM, own)
        return logits[:, 0]

    before = signal.getsignal(signal.SIGTERM)
    try:
        eap.attribute(make_model("gpt2"), make_pairs(n=3), metric, method="eap", checkpoint=tmp_path / "x.safetensors")
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
def test_killed_processes_leave_what_they_had_done():
    """SIGKILL and SIGTERM, at batches and at any moment; in one process that forks, as imports take longest."""
    script = Path(__file__).with_name("killed.py")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
