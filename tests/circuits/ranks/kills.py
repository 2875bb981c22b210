"""A check of ranks that are killed at any moment, for `runs.py`."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

import eap_circuits as eap
from eap_circuits.checkpoint import file as checkpoint_file
from eap_circuits.methods.gradient import method
from tests.circuits.conftest import random_pairs, tiny_model
from tests.circuits.ranks.forked import on_ranks, trouble


def killed_at_random() -> list[str]:
    """One of three ranks, then all of two: the file lacks no more than the batch in which each rank was, and where rank
    0 was killed the one before, which it was about to write. From there one process goes on to the same bits."""
    call = partial(eap.attribute, tiny_model("gpt2", torch.float32), random_pairs(seed=6, n=30), steps=2, batch_size=1)
    began = time.monotonic()
    right, wrong = call(), []
    seconds = time.monotonic() - began
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.safetensors"

        def run(victims: list[int], after: float, rank: int) -> str:
            log = os.open(Path(folder) / f"begun-{rank}", os.O_WRONLY)

            class Scores(method.BatchScores):
                def __init__(self, request: Any, batch: Any) -> None:
                    os.write(log, bytes(batch.index.tolist()))
                    super().__init__(request, batch)

            if rank in victims:
                threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
            with (
                mock.patch.object(method, "BatchScores", Scores),
                mock.patch.object(checkpoint_file, "SECONDS_BETWEEN_SAVES", 0.0),
                mock.patch.object(checkpoint_file, "SHARE_OF_TIME", 1.0),
            ):
                return trouble(lambda: call(checkpoint=file))

        for count, victims in ((3, [random.randrange(3)]), (2, [0, 1])):
            after, logs = random.uniform(0, seconds / count), [Path(folder) / f"begun-{rank}" for rank in range(count)]
            for log in logs:
                log.write_bytes(b"")
            on_ranks(count, partial(run, victims, after))
            begun = {example for log in logs for example in log.read_bytes()}
            finished = load_file(file)["finished"] if file.exists() else torch.zeros(30, dtype=torch.bool)
            lost = [example for example in sorted(begun) if not finished[example]]
            if len(lost) > count * (1 + (0 in victims)):
                wrong.append(f"{victims} of {count} killed after {after:.2f} s: examples {lost} are lost")
        if not torch.equal(call(checkpoint=file).values, right.values):
            wrong.append("other bits")
    return wrong


CHECKS = {"killed_at_random": killed_at_random}
