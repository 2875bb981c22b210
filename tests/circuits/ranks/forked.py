"""Forks processes that are the ranks of a process group."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from eap_circuits.cli.entry import main as command


def on_ranks(count: int, run: Callable[[int], Any], seconds: float = 180) -> list[Any]:
    """What `run(rank)` returns on each of this many ranks, made of tensors and plain values; of one that raises,
    "error: type: message", and of one that ends otherwise, "ended"."""
    with tempfile.TemporaryDirectory() as folder:
        children = [_fork(rank, count, run, folder, seconds) for rank in range(count)]
        for child in children:
            os.waitpid(child, 0)
        files = [os.path.join(folder, f"{rank}.pt") for rank in range(count)]
        return [torch.load(file, weights_only=True) if os.path.exists(file) else "ended" for file in files]


def trouble(run: Callable[[], Any]) -> str:
    """What a call raises."""
    try:
        run()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def typed(words: list[str]) -> list[Any]:
    """The exit code, the output and the errors of a command of eap's on this rank."""
    sys.argv, code = ["eap", *words], None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            command()
        except SystemExit as exit:
            code = exit.code
    return [code, out.getvalue(), errors.getvalue()]


def _fork(rank: int, count: int, run: Callable[[int], Any], folder: str, seconds: float) -> int:
    if child := os.fork():
        return child
    signal.alarm(int(seconds))  # nothing waits for ever; four ranks on two busy cores took more than a minute
    try:
        store = dist.FileStore(os.path.join(folder, "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timedelta(seconds=seconds))
        store.set(f"joined {rank}", "")
        store.wait([f"joined {each}" for each in range(count)])  # one that dies before breaks the others' joining
        try:
            found = run(rank)
        except BaseException as error:
            found = f"error: {type(error).__name__}: {error}"
            if os.environ.get("EAP_SHOW"):
                traceback.print_exc()
        file = os.path.join(folder, f"{rank}.pt")
        torch.save(found, file + ".part")
        os.replace(file + ".part", file)
    finally:
        os._exit(0)
