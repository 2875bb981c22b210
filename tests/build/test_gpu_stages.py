"""`make gpu`: its stages, what is stopped in time, and what is printed first."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from bench import gpu, gpu_report, processes
from bench.processes import ROOT, Result


def python(code):
    return [sys.executable, "-c", code]


def by_label(results):
    return {result.label: result.problem for result in results}


# Ignores the request to stop, and so does what it started.
STUBBORN = (
    "import signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(60)"
)


def test_every_stage_runs_whatever_became_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    found = "from importlib.util import find_spec as f; assert f('eap_kernels') and f('eap_circuits')"
    stages = [
        gpu.Stage(
            "fails",
            1,
            {"exit": python("print('first'); exit(3)"), "mark": python("import os; print(os.environ['MARK'])")},
            {"MARK": "m"},
        ),
        gpu.Stage("hangs", 1, {"hang": python(STUBBORN), "beside": python("print('beside')")}, at_once=2),
        gpu.Stage("absent", 0.1, {"none": ["no-such-program"]}),
        gpu.Stage("works", 4, {"works": python(found)}),
    ]
    begin = time.monotonic()
    results = gpu.run_stages(stages, tmp_path / "logs", total=24)
    assert time.monotonic() - begin < 24
    problems = by_label(results)
    assert list(problems) == [label for stage in stages for label in stage.commands]
    assert problems["exit"] == "exit status 3"
    assert problems["hang"].startswith("stopped after")
    assert problems["none"] == "no-such-program: No such file or directory"
    assert problems["mark"] is problems["beside"] is problems["works"] is None
    outputs = {result.label: result.output.splitlines()[1:] for result in results}
    assert outputs["exit"] == ["first"] and outputs["mark"] == ["m"] and outputs["beside"] == ["beside"]
    assert not running(int(outputs["hang"][-1])), "what a stage started was left running"
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["gpu.log"]
    log = (tmp_path / "logs" / "gpu.log").read_text()
    assert all(f": {label}: " in log for label in problems) and "\nbeside\n" in log


def test_after_a_failed_build_nothing_runs(tmp_path):
    stages = [gpu.Stage("build", 1, {"build": python("exit(1)")}), gpu.Stage("kernels", 1, {"tests": python("")})]
    assert by_label(gpu.run_stages(stages, tmp_path, total=30)) == {"build": "exit status 1"}


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_interrupted_command_can_finish_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 2.0)
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('report')"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        (result,) = gpu.run_stages([gpu.Stage("slow", 1, {"it": python(code)})], tmp_path, total=4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.problem.startswith("stopped after") and result.seconds < 4
    assert result.output.endswith("report\n")


def test_a_log_stays_small_enough_to_be_brought_back(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGGED", 1000)
    code = "print('begin'); print('.' * 50_000); print('end')"
    gpu.run_stages([gpu.Stage("prints", 1, {"it": python(code)})], tmp_path, total=30)
    log = (tmp_path / "gpu.log").read_text()
    assert len(log) < 1200 and "begin" in log and log.endswith("end\n")


def test_every_operator_is_tested_on_every_backend():
    tests = gpu.kernel_tests()
    assert {f"{impl} {op}" for impl in gpu_report.IMPLS for op in gpu.OPERATORS} < set(tests)
    named = {word for command in tests.values() for word in command if word.endswith(".py")}
    assert all((ROOT / name).is_file() for name in named)


def test_what_matters_most_comes_first():
    first = gpu.PARTS["first"]
    assert gpu.PARTS["all"][: len(first)] == first
    assert first.index("kernels") < first.index("sanitize") < first.index("bench-first") < first.index("record-first")
    rest = gpu.PARTS["rest"]
    assert rest.index("models") < rest.index("record-models") < rest.index("tune") < rest.index("bench-rest")
    assert "compiled" not in gpu.PARTS["all"]
    assert all(name in gpu.STAGES for part in gpu.PARTS.values() for name in part)


def test_first_lines_and_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setenv("EAP_COMMIT", "0123456789abc")
    (tmp_path / "build").mkdir()
    times = {"seconds": {"cuda": 1e-3, "triton": 2e-3, "reference": 3e-3}}
    reads = {"seconds": {"cuda@0.01": 5e-3, "cuda@1.0": 1.0, "reference@0.01": 4e-3, "reference@1.0": 1.0}}
    floors = {"model": "llama-3.1-8b", "call": "attribute", "ratios": {"speedup": 0.5}}
    infos = {
        "test_edge_scores[llama-3.1-8b-bfloat16-contiguous]": times,
        "test_masked_read[llama-3.1-8b-bfloat16-layer]": reads,
        "test_shape_over_floor[llama-3.1-8b]": floors,
    }
    benches = [{"name": name, "extra_info": info} for name, info in infos.items()]
    (tmp_path / "build/bench-first-edge_scores.json").write_text(json.dumps({"benchmarks": benches}))
    (tmp_path / "build/bench-first-masked_read.json").touch()  # of a command that was killed
    failed = "FAILED tests/a.py::test_x - error 1\n= 1 failed, 3 passed in 2.1s =\n"
    results = [
        Result("kernels", "cuda edge_scores", "exit status 1", failed, 2.0),
        Result("kernels", "triton edge_scores", None, "= 4 passed, 2 deselected in 1.0s =\n", 2.0),
        Result("sanitize", "memcheck cuda", None, "", 9.0),
        Result("bench-first", "edge_scores", None, "", 9.0),
        Result("bench-first", "masked_read", "stopped after 9 s", "", 9.0),
    ]
    assert gpu_report.first_lines(results).splitlines()[2:] == [
        "commit 0123456789",
        "cuda: cuda edge_scores exit status 1, 3 tests passed",
        "triton: right, 4 tests passed",
        "sanitizer: right",
        "edge_scores, llama-3.1-8b bf16: cuda 1.00 ms, triton 2.00 ms, reference 3.00 ms",
        "masked_read, llama-3.1-8b bf16: reference 4.00 ms, cuda 5.00 ms",
        "over the model's own passes: attribute llama-3.1-8b 2.00",
    ]
    assert "kernels: cuda edge_scores: 1 failures\nFAILED tests/a.py::test_x" in gpu_report.failures(results)
    assert "triton" not in gpu_report.failures(results)
    assert "exit status 1; 1 failed, 3 passed" in gpu_report.table(results)


def test_the_messages_of_failing_tests_are_printed(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_a():\n    assert False, 'the reason' + 200 * '.' + 'why'\n")
    stage = gpu.Stage("tests", 1, {"it": [*gpu.TEST, "--rootdir", str(tmp_path), str(tmp_path)]})
    (result,) = gpu.run_stages([stage], tmp_path / "logs", total=120)
    assert result.problem == "exit status 1"
    printed = gpu_report.failure(result._replace(output="." * 20_000 + result.output), 1000)
    assert "1 failures" in printed and "the reason...." in printed and "...why" in printed
    assert len(printed) < 1100


def test_an_unknown_stage_is_refused():
    with pytest.raises(SystemExit, match=r"gpu: expected parts or stages of first, .*, got paint"):
        gpu.chosen(["build", "paint"])
    assert gpu.chosen(["first", "build"]) == list(gpu.PARTS["first"])


def test_nothing_is_recorded_of_an_unknown_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    monkeypatch.delenv("EAP_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(SystemExit, match="expected the measured commit in EAP_COMMIT, or a git checkout"):
        processes.commit()
    if shutil.which("git"):
        for words in ("init -q", "-c user.name=n -c user.email=e commit -q --allow-empty -m t"):
            subprocess.run(["git", *words.split()], cwd=tmp_path, check=True)
        assert len(processes.commit()) == 40
