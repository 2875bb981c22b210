"""`make gpu`: build, test, sanitize and measure on a machine with a GPU, from a bare checkout and without a network.

Needs only what such a machine has: Python with PyTorch, Triton, transformers, pytest, pytest-benchmark, hypothesis and
ninja, and nvcc. What matters most comes first: our own kernels, then the two most important shapes, then the rest.
If the build fails, nothing else runs. Every other stage runs even if an earlier one failed, and is stopped at its share
of the time. If a call may not last ten minutes, or every call gets a bare machine, run it in two parts of five and a
half minutes:

make gpu STAGES=first      # kernels, sanitizer, the benches of llama-3.1-8b and gpt2 in bfloat16
make gpu STAGES=rest       # models against their own passes, the tuner of `auto`, the other benches
make gpu STAGES=compiled   # edge_scores against torch.compile, which compiles for minutes

SECONDS=300 gives other stages than a part's, or a shorter call, their time.

$OUT, or build/gpu, has the log of all stages (gpu.log) and the results. Elsewhere `python -m bench.record FILE` merges
these results into bench/results and writes the tables made from them: those of the docs, and what `auto` takes on such
a card. If the sources come without git history, EAP_COMMIT names the commit.

--rehearse runs the same on a pretended device: it tests everything around the kernels, but not the kernels.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import gpu_report
from bench.gpu_report import KERNELS, OPERATORS
from bench.processes import ROOT, Result, commit, json_of, run

# Seconds of all stages, and of a part: a call on such a machine may last ten minutes, including its start.
TOTAL_SECONDS = {"all": 560.0, "first": 330.0, "rest": 330.0}
# Seconds of a rehearsal, which only has to end.
REHEARSAL_SECONDS = 3000.0
# Bytes of each command's output that the joined log keeps: some machines return at most 16 MiB.
LOGGED = 400_000

# Print each test's name as it begins: if a kernel hangs, the log ends with its test.
PYTEST = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--show-capture=stdout", "-p", "no:cacheprovider"]
TEST = [*PYTEST, "--maxfail=10", "-m", "not slow"]
# Those without a bench of their own are measured with models.
TESTED = (*OPERATORS, "normalise_rows", "collapse")
# The longest files, in several processes.
SPREAD = ["-n", "4"]
JOBS = max(1, (os.cpu_count() or 2) // 2)
FIRST = "bfloat16 and (llama-3.1-8b or gpt2)"
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
# What the pretended device cannot do: fake tensors, inference mode, gradients of operations that two models do in
# place, and whatever only the kernel itself does.
NOT_PRETENDED = (
    "not opcheck and not eap_ig_circuit and not llama4 and not olmo-query and not sparse_path and not row_outside"
)
# A call of the driver that finds nothing is not an error: torch tries which functions exist.
TOOLS = {"memcheck": ["--tool", "memcheck", "--report-api-errors", "no"], "racecheck": ["--tool", "racecheck"]}
# Watching every access to shared memory takes long: on an H100 all cases took more than 40 s.
FEWER = {"memcheck": [], "racecheck": ["--few"]}


class Stage(NamedTuple):
    """Commands by name, how many of them run at once, the share of the time that they have together, and the seconds
    that they have even if that share is less."""

    name: str
    share: float
    commands: Mapping[str, Sequence[str]]
    environment: Mapping[str, str] = {}
    at_once: int = 1
    least: float = 0.0


def kernel_tests() -> dict[str, list[str]]:
    """Tests of what runs only on the GPU, each in its own process, so that a failing kernel harms no other."""
    # Triton compiles for every kind of stride and size: fewer random cases.
    quick, folder = ["env", "EAP_QUICK=1"], "tests/kernels"

    def of(impl: str) -> dict[str, list[str]]:
        command = [*(quick if impl == "triton" else []), *TEST, "-k", f"{impl}-cuda"]
        spread = {"masked_read": SPREAD}
        return {f"{impl} {op}": [*command, *spread.get(op, []), f"{folder}/operators/test_{op}.py"] for op in TESTED}

    return {
        **{label: command for impl in KERNELS for label, command in of(impl).items()},
        "models": [*TEST, *SPREAD, "tests/circuits/forward/test_on_gpu.py"],
        # As the sanitizer runs it: Triton's kernels are compiled before, which under it would take minutes.
        **{f"{impl} odd shapes": [sys.executable, "bench/sanitize.py", impl] for impl in KERNELS},
        "triton tiles": [*quick, *TEST, f"{folder}/on_triton/test_triton_kernels.py"],
        **of("reference"),
        "integrations": [
            *TEST,
            "-k",
            "cuda",
            *(f"{folder}/integrations/test_integrations_{x}.py" for x in ("auto_circuit", "eap_ig")),
        ],
    }


def benches(stage: str, chosen: Mapping[str, tuple[str, str]], *options: str) -> dict[str, list[str]]:
    """{name: (file, -k)} as commands that write their results to `json_of`."""
    return {
        label: [*PYTEST, "-s", path, "-k", names, *options, f"--benchmark-json={json_of(stage, label)}"]
        for label, (path, names) in chosen.items()
    }


def recording(*stages: Stage) -> dict[str, list[str]]:
    runs = [json_of(stage.name, label) for stage in stages for label in stage.commands]
    return {"record": [sys.executable, "-m", "bench.record", *runs]}


KERNEL_BENCHES = {op: f"bench/kernels/bench_{op}.py" for op in OPERATORS}
# One after the other, or they would disturb each other.
BENCH_FIRST = Stage(
    "bench-first",
    6.0,
    benches("bench-first", {op: (path, FIRST) for op, path in KERNEL_BENCHES.items()}, "--without-compiled"),
)
BENCH_REST = Stage(
    "bench-rest",
    9.0,
    benches("bench-rest", {op: (path, f"not ({FIRST})") for op, path in KERNEL_BENCHES.items()}, "--without-compiled"),
)
# `auto` takes what `record-first` or an earlier run has recorded of such a card, else of its architecture.
MODELS = Stage("models", 9.0, benches("models", {"shapes": ("bench/circuits/bench_shapes.py", "shape or fit")}))
COMPILED = Stage("compiled", 9.0, benches("compiled", {"edge_scores": (KERNEL_BENCHES["edge_scores"], "contiguous")}))
STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            "build",
            3.0,
            {"build": [sys.executable, "setup.py", "build_ext", "--inplace"]},
            {"EAP_REQUIRE_EXT": "1"},
            least=90.0,
        ),
        Stage("info", 0.5, {"info": [sys.executable, "-m", "eap_kernels.info"]}, least=20.0),
        Stage("kernels", 6.0, kernel_tests(), {"EAP_REQUIRE": "cpu,triton,cuda", "OMP_NUM_THREADS": "2"}, JOBS, 110.0),
        Stage(
            "sanitize",
            2.5,
            {
                f"{tool} {impl}": [
                    SANITIZER,
                    *options,
                    "--error-exitcode",
                    "1",
                    sys.executable,
                    "bench/sanitize.py",
                    impl,
                    *FEWER[tool],
                ]
                for tool, options in TOOLS.items()
                for impl in KERNELS
            },
            at_once=4,
        ),
        BENCH_FIRST,
        Stage("record-first", 0.3, recording(BENCH_FIRST), least=25.0),
        MODELS,
        Stage("record-models", 0.3, recording(MODELS), least=25.0),
        # It compiles and times for long, and stores an arithmetic only once all of it was measured.
        Stage("tune", 6.0, {"tune": [sys.executable, "-m", "eap_kernels.tune"]}, least=100.0),
        BENCH_REST,
        Stage("record-rest", 0.3, recording(BENCH_REST), least=25.0),
        COMPILED,
        Stage("record-compiled", 0.3, recording(COMPILED), least=25.0),
    )
}
PARTS = {
    "first": ("build", "info", "kernels", "sanitize", "bench-first", "record-first"),
    "rest": ("build", "info", "models", "record-models", "tune", "bench-rest", "record-rest"),
    "compiled": ("build", "compiled", "record-compiled"),
}
PARTS["all"] = (*PARTS["first"], *PARTS["rest"][2:])


def rehearsed(stage: Stage) -> Stage:
    """The same on the pretended device; nothing is sanitized."""
    if stage.name == "build":
        return stage
    pretended = {
        # Whole models compute nothing.
        "EAP_PRETEND": "shapes" if stage.name == "models" else "values",
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("bench/pretended/site", "", "python")),
        "EAP_QUICK": "1",
        "EAP_CACHE": str(ROOT / "build/rehearsal-cache"),
    }

    def command(words: Sequence[str]) -> list[str]:
        plain = [*words[words.index(sys.executable) :]]
        if TEST[-1] in plain:
            chosen = plain[plain.index("-k") + 1 :][:1] if "-k" in plain else []
            plain += ["-k", " and ".join([*(f"({names})" for names in chosen), NOT_PRETENDED])]
        return plain

    commands = {label: command(words) for label, words in stage.commands.items()}
    return stage._replace(commands=commands, environment={**stage.environment, **pretended})


def run_stage(stage: Stage, log: Path, end: float) -> list[Result]:
    """The results of a stage's commands. Each output goes to the log when its command is done."""
    waiting, lock = list(stage.commands.items()), Lock()

    def next_one(_: object) -> Result:
        with lock:
            label, command = waiting.pop(0)
            # One after another, they share the time that is left.
            parts = len(waiting) + 1 if stage.at_once == 1 else 1
            limit = (end - time.monotonic()) / parts
        with tempfile.TemporaryFile("w+", errors="replace") as file:
            result = run(stage.name, label, command, stage.environment, file, limit)
            with lock, log.open("a") as joined:
                text = result.output
                cut = "" if len(text) <= LOGGED else f"\n[{len(text) - LOGGED} characters]\n"
                joined.write(f"### {stage.name}: {label}: {result.problem or 'ok'}\n")
                joined.write(text if not cut else text[: LOGGED // 4] + cut + text[-3 * LOGGED // 4 :])
        return result

    with ThreadPoolExecutor(stage.at_once) as pool:
        return list(pool.map(next_one, stage.commands))


def run_stages(stages: Sequence[Stage], folder: Path, total: float) -> list[Result]:
    """The results of all commands. Later stages share the time that a stage leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "gpu.log"
    log.write_text("")
    end, results = time.monotonic() + total, []
    for index, stage in enumerate(stages):
        begin = time.monotonic()
        share = stage.share / sum(later.share for later in stages[index:])
        results += run_stage(stage, log, begin + max(stage.least, share * (end - begin)))
        print(f"{stage.name}: {time.monotonic() - begin:.0f} s", flush=True)
        if stage.name == "build" and any(result.problem for result in results):
            break  # nothing that is measured without it would count
    return results


def need_a_gpu() -> None:
    try:
        import torch
    except ImportError:
        sys.exit(f"gpu: expected a Python with torch, got {sys.executable}: make gpu PYTHON=... names another")
    if not torch.cuda.is_available():
        sys.exit(f"gpu: expected a GPU, but torch {torch.__version__} of {sys.executable} sees none")
    # Kernels for other cards cannot run here, and compiling them takes most of the time.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))


def seconds_of(words: Sequence[str]) -> float:
    """The time of all stages: what --seconds says, or what these words have."""
    said = [word.removeprefix("--seconds=") for word in sys.argv if word.startswith("--seconds=")]
    if said and not said[-1].isdigit():
        sys.exit(f"gpu: expected a whole number of seconds, got {said[-1]}")
    if said:
        return float(said[-1])
    if "--rehearse" in sys.argv:
        return REHEARSAL_SECONDS
    return TOTAL_SECONDS.get(words[0] if len(words) == 1 else "all", TOTAL_SECONDS["all"])


def chosen(words: Sequence[str]) -> list[str]:
    """Names of stages, for names of parts and stages."""
    known = [*PARTS, *STAGES]
    unknown = [word for word in words if word not in known]
    if unknown:
        sys.exit(f"gpu: expected parts or stages of {', '.join(known)}, got {', '.join(unknown)}")
    found = [name for word in words or ["all"] for name in PARTS.get(word, (word,))]
    return list(dict.fromkeys(found))


def main() -> int:
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    stages = [STAGES[name] for name in chosen(words)]
    if "--rehearse" in sys.argv:
        stages = [rehearsed(stage) for stage in stages]
    elif any(stage.name not in ("build", "info") for stage in stages):
        need_a_gpu()
    os.environ["EAP_COMMIT"] = commit()
    # An ignored interrupt, as a shell's background job has it, would be inherited, and stopping a command relies on it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    (ROOT / "build").mkdir(exist_ok=True)
    for stage in stages:  # results of an earlier run would be recorded as this one's
        for label in stage.commands:
            (ROOT / json_of(stage.name, label)).unlink(missing_ok=True)
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    results = run_stages(stages, folder, seconds_of(words))
    if "--rehearse" in sys.argv:
        print("\nRehearsed on a device that does not exist: no time below means anything.")
    print(gpu_report.first_lines(results))
    print(gpu_report.table(results))
    print(gpu_report.failures(results))
    return int(any(result.problem for result in results))


if __name__ == "__main__":
    sys.exit(main())
