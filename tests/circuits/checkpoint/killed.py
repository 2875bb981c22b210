"""Kills processes in the middle of every long call, goes on and compares bits; says what differs and exits with 1."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import torch

here = Path(__file__).resolve()
sys.path[:0] = [str(here.parents[3] / "python"), str(here.parents[3])]

from eap_circuits.checkpoint import file as checkpoint_file  # noqa: E402
from tests.circuits.checkpoint.calls import long_calls, numbers  # noqa: E402
from tests.circuits.conftest import random_pairs, tiny_model  # noqa: E402


def child(call, file: Path, how: signal.Signals, at: int, after: float | None) -> int:
    """Runs the call in a process of its own that is killed at a batch, or after some seconds; how it ended."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        done = []

        def progress(*_):
            done.append(1)
            if after is None and len(done) == at:
                os.kill(os.getpid(), how)

        if after is not None:
            threading.Timer(after, os.kill, (os.getpid(), how)).start()
        call(checkpoint=file, progress=progress)
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(repr(error))
        os._exit(1)


def main() -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a process with more must not fork
    checkpoint_file.SECONDS_BETWEEN_SAVES = 0.0
    rng, wrong = random.Random(0), []
    calls = long_calls(tiny_model("gpt2", torch.float32), random_pairs(seed=3, n=5))
    with tempfile.TemporaryDirectory() as folder:
        for name, call in calls.items():
            began = time.monotonic()
            right = numbers(call())
            took = time.monotonic() - began
            for how in (signal.SIGKILL, signal.SIGTERM):
                for at, after in ((rng.randint(1, 3), None), (0, rng.uniform(0.02, took))):
                    file = Path(folder) / f"{name}-{how.name}-{at}.safetensors"
                    ended = child(call, file, how, at, after)
                    if ended != -how and not (after is not None and ended == 0):
                        wrong.append(f"{name}: ended with {ended}, not by {how.name}")
                    if after is None and not file.exists():
                        wrong.append(f"{name}: {how.name} at batch {at} left nothing")
                    found = numbers(call(checkpoint=file))
                    if not all(map(torch.equal, found, right)):
                        wrong.append(f"{name}: other bits after {how.name} at {at or after}")
                    left = [path.name for path in Path(folder).iterdir() if path.name.startswith(".")]
                    if how is signal.SIGTERM and left:
                        wrong.append(f"{name}: SIGTERM left {left}")
                    for path in left:
                        os.unlink(os.path.join(folder, path))
    sys.stdout.write("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
