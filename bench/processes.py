"""Commands that are stopped in time, with all processes they started, after a chance to report."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Seconds from the request to stop until the end, in which pytest writes its summary and the JSON of finished benches.
GRACE_SECONDS = 10.0


class Result(NamedTuple):
    """The outcome of one command: what was wrong in a few words, or None; what it printed; seconds."""

    stage: str
    label: str
    problem: str | None
    output: str
    seconds: float


def json_of(stage: str, label: str) -> str:
    """The file to which a stage's command writes the results of its benches."""
    return f"build/{stage}-{label.replace(' ', '-')}.json"


def has_results(path: Path) -> bool:
    """Whether a command came to write its results; some versions of pytest-benchmark make the file as they begin."""
    return path.exists() and path.stat().st_size > 0


def commit() -> str:
    """The measured commit: EAP_COMMIT if the sources come without git history, else git's."""
    named = os.environ.get("EAP_COMMIT")
    if named:
        return named
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"bench: expected the measured commit in EAP_COMMIT, or a git checkout, found neither in {ROOT}")
    return done.stdout.strip()


def stop(process: subprocess.Popen) -> None:
    """Interrupt a process and all that it started, and kill those that remain."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(GRACE_SECONDS)


def run(
    stage: str, label: str, command: Sequence[str], environment: Mapping[str, str], file: IO[str], limit: float
) -> Result:
    """Run one command for at most `limit` seconds, including its end, with its output in `file`."""
    begin = time.monotonic()
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]), "PYTHONUNBUFFERED": "1"}
    # With CI set, pytest does not cut the messages of its summary at the terminal's width. Only the stage that is there
    # for it measures what `auto` takes.
    fixed = {"OMP_WAIT_POLICY": "PASSIVE", "CI": "true", "EAP_TUNE": "0", **paths}
    print("$", *command, file=file, flush=True)
    problem = _run(command, {**os.environ, **fixed, **environment}, file, max(1.0, limit - GRACE_SECONDS))
    file.seek(0)
    return Result(stage, label, problem, file.read(), time.monotonic() - begin)


def _run(command: Sequence[str], environment: Mapping[str, str], file: IO[str], limit: float) -> str | None:
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        stop(process)
        return f"stopped after {limit:.0f} s"
    return f"exit status {code}" if code else None
