"""`auto` on a user's own device: candidates that are wrong, hang or crash, what is stored, when nothing may run."""

import io
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import eap_kernels as ek
from eap_kernels import _auto, _schemas, info, testing
from eap_kernels._registry import BACKENDS
from eap_kernels.reference import Backend
from eap_kernels.testing import odd_shapes
from eap_kernels.tune import child as in_child
from eap_kernels.tune import choices, devices
from tests.kernels.test_dispatch import OnGpu

pytestmark = pytest.mark.long

CARD, DEVICE = "NVIDIA Test", torch.device("cuda", 0)
# A child without torch: it tries three backends, each of which does as it is told.
CHILD = """
import json, os, sys, time
pipe = os.fdopen(os.dup(1), "w")
request, faults, log = json.loads(sys.argv[2]), {faults!r}, {log!r}
def say(*words):
    pipe.write(json.dumps(words) + chr(10))
    pipe.flush()
with open(log, "a") as file:
    print(os.getpid(), file=file)
time.sleep({nap})
if "cuda" not in request["failed"].get("edge_scores", ()):
    say("trying", None, "cuda")
    if faults.get("cuda") == "unusable":
        os.abort()
for op in ("edge_scores", "collapse"):
    for impl in ("reference", "triton", "cuda"):
        fault = None if impl in request["failed"].get(op, ()) else faults.get(impl)
        say("trying", op, impl)
        if fault == "crash":
            os.abort()
        if fault == "hang":
            time.sleep(60)
        if fault == "exit":
            sys.exit("out of order")
        if fault in ("wrong", "unable"):
            say(fault, "it is " + fault)
            sys.exit()
        if impl not in request["failed"].get(op, ()):
            say("verified", op, impl)
seconds = {{"cuda": 0.001, "triton": 0.002, "reference": 0.004}}
left = {{impl: s for impl, s in seconds.items() if impl not in request["failed"].get("edge_scores", ())}}
say("seconds", "edge_scores", "bfloat16, flat", 1000, dict(reference=1e-5))
say("seconds", "edge_scores", "bfloat16, flat", 10**6, left)
say("seconds", "edge_scores", "bfloat16, strided", 10**6, dict(reference=0.001, triton=0.002))
say("done")
"""


@pytest.fixture
def log(tmp_path):
    """The children that were started, by process id."""
    (tmp_path / "log").write_text("")
    return tmp_path / "log"


@pytest.fixture
def child(monkeypatch, log):
    """child(cuda="crash", ...): what the backends do in the child."""

    def use(nap=0, **faults):
        monkeypatch.setattr(choices, "START", CHILD.format(faults=faults, log=str(log), nap=nap))

    return use


@pytest.fixture(autouse=True)
def card(monkeypatch, tmp_path):
    """A GPU as far as the choice looks at it, and an empty cache; measuring is allowed."""
    monkeypatch.setenv("EAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EAP_TUNE")
    monkeypatch.setattr(choices, "STEP_SECONDS", 5.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (1, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for impl in ("cuda", "triton"):
        monkeypatch.setattr(type(BACKENDS[impl]), "missing", lambda self: None)


def chosen(tokens=40, dtype=torch.bfloat16, op="edge_scores"):
    x = OnGpu(torch.empty(100, tokens, 50, dtype=dtype, device="meta"))
    return _auto.choose(op, x, x, None) if op == "edge_scores" else _auto.choose(op, x)


def another_process():
    choices._known.clear()


def test_the_fastest_is_taken_and_measured_once(child, log, capsys):
    child()
    assert (chosen().impl, chosen(op="collapse").impl) == ("cuda", "triton")
    assert "cuda 1 ms, triton 2 ms, reference 4 ms" in chosen().reason
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and f"on {CARD} in bfloat16, once" in said.err and not said.out
    another_process()
    assert chosen().impl == "cuda" and len(log.read_text().split()) == 1
    assert not capsys.readouterr().err
    # Sizes stand for all up to theirs, and where the reference is fast nothing else is taken.
    assert [chosen(tokens).impl for tokens in (0, 10**6)] == ["reference", "cuda"]
    assert chosen(dtype=torch.float64).impl == "reference" and len(log.read_text().split()) == 1
    chosen(dtype=torch.float16)
    assert len(log.read_text().split()) == 2, "an arithmetic of its own"


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("crash", "the process ended by SIGABRT"),
        ("exit", "the process ended with status 1 (out of order)"),
        ("wrong", "it is wrong"),
        ("hang", "no end after 0.7 s"),
    ],
)
def test_a_candidate_that_fails_is_never_taken_and_one_warning_says_so(fault, reason, child, log, monkeypatch):
    child(cuda=fault)
    if fault == "hang":
        monkeypatch.setattr(choices, "STEP_SECONDS", 0.7)
    with pytest.warns(UserWarning, match="leaves out") as caught:
        assert chosen().impl == "triton"
    (warning,) = caught
    assert f"`auto` leaves out cuda for edge_scores, collapse: {reason}" in str(warning.message)
    assert "collapse: " in str(warning.message) and "python -m eap_kernels.info" in str(warning.message)
    assert f"cuda is left out ({reason}" in chosen().reason
    started = log.read_text().split()
    assert len(started) == 3, "one child for each failure, and one that is done"
    assert not any(os.path.exists(f"/proc/{pid}") for pid in started)
    another_process()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen().impl == "triton"
    (line,) = _auto.told(DEVICE, "bfloat16").values()
    assert f"edge_scores without cuda: {reason}" in line


def test_a_kernel_that_is_not_right_is_not_taken_for_its_one_launch_either(child):
    child(triton="wrong")
    with pytest.warns(UserWarning, match="leaves out triton for edge_scores"):
        assert chosen(op="collapse").impl == "reference"
    assert "triton is not right on this device; triton is left out (it is wrong)" in chosen(op="collapse").reason


def test_a_library_that_fails_at_its_trial_is_left_out_of_all_operators(child, log):
    child(cuda="unusable")
    with pytest.warns(UserWarning, match="leaves out cuda for edge_scores, .*, collapse: the process ended by SIGABRT"):
        assert chosen().impl == "triton"
    assert len(log.read_text().split()) == 2


@pytest.mark.parametrize("faults", [{"cuda": "unable"}, {"reference": "wrong"}, {"reference": "crash"}])
def test_what_is_nobody_s_fault_is_not_stored_and_not_tried_again(faults, child, log):
    child(**faults)
    with pytest.warns(UserWarning, match=f"could not measure its kernels on {CARD} .*python -m eap_kernels.tune"):
        assert chosen().impl == "reference"
    assert chosen().reason == f"nothing was measured on {CARD}"
    assert len(log.read_text().split()) == 1 and not choices.path(DEVICE).exists()


def test_a_cache_that_cannot_be_written_is_said_before_anything_runs(child, log, monkeypatch):
    child()
    monkeypatch.setenv("EAP_CACHE", "/proc/nothing")
    with pytest.warns(UserWarning, match="cannot be written: .*; EAP_CACHE names another folder"):
        assert chosen().impl == "reference"
    assert not log.read_text()


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: '{"found": {"bfloat16": []}}'])
def test_a_damaged_file_is_measured_again(damage, child, log):
    child()
    chosen()
    file = choices.path(DEVICE)
    right = file.read_text()
    file.write_text(damage(right))
    another_process()
    with pytest.warns(UserWarning, match="expected measured choices, found something else"):
        assert chosen().impl == "cuda"
    assert file.read_text() == right and len(log.read_text().split()) == 2
    assert {each.name for each in file.parent.iterdir()} == {file.name, f"{file.name}.lock"}


def test_what_was_measured_under_another_key_does_not_count(child, log, monkeypatch, tmp_path):
    child()
    chosen()
    paths = {choices.path(DEVICE)}
    facts = dict(choices.key("cuda", CARD))
    assert set(facts) == {"device", "driver", "torch", "cuda", "triton", "sources"}
    for name in facts:
        monkeypatch.setattr(choices, "key", lambda *_, name=name: {**facts, name: "another"})
        paths.add(choices.path(DEVICE))
    assert len(paths) == 7
    another_process()
    chosen()
    assert len(log.read_text().split()) == 2
    (tmp_path / "_C.abi3.so").write_text("library")
    (tmp_path / "triton").mkdir(exist_ok=True)
    (tmp_path / "triton/kernel.py").write_text("kernel")
    monkeypatch.setattr(choices, "__file__", str(tmp_path / "tune/choices.py"))
    digests = {choices._digest()}
    for file in ("_C.abi3.so", "triton/kernel.py"):
        (tmp_path / file).write_text("changed")
        digests.add(choices._digest())
    assert len(digests) == 3


def test_processors_of_one_name_and_other_instructions_have_a_choice_each(monkeypatch):
    paths = {choices.path(torch.device("cpu"))}
    monkeypatch.setattr(choices, "instruction_set", lambda: "another")
    choices.key.cache_clear()
    paths.add(choices.path(torch.device("cpu")))
    choices.key.cache_clear()
    assert len(paths) == 2


def deterministic(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)


def capturing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def forbidden(monkeypatch):
    monkeypatch.setenv("EAP_TUNE", "0")


@pytest.mark.parametrize("forbid", [deterministic, capturing, forbidden])
def test_where_nothing_may_run_the_stored_choice_counts_else_the_prior(forbid, child, log, monkeypatch):
    child()
    with monkeypatch.context() as here:
        forbid(here)
        assert [chosen(op=op).impl for op in ("edge_scores", "collapse")] == ["reference", "reference"]
        here.setattr(_auto, "MEASURED", {CARD: {"operators": {"edge_scores": {"bfloat16, flat": ["triton"]}}}})
        assert [chosen(op=op).impl for op in ("edge_scores", "collapse")] == ["triton", "triton"]
        assert not log.read_text()
    assert chosen().impl == "cuda", "it may run now, in the same process"
    another_process()
    forbid(monkeypatch)
    assert chosen().impl == "cuda" and len(log.read_text().split()) == 1


def test_two_processes_measure_once(child, log, tmp_path):
    child(nap=0.5)
    code = (
        "import json, sys, torch; from eap_kernels.tune import choices; choices.START = sys.argv[1]\n"
        "print(json.dumps(choices.measured(torch.device('cpu'), 'bfloat16')))"
    )
    command = [sys.executable, "-c", code, choices.START]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    first, second = (json.loads(process.communicate()[0]) for process in both)
    assert first == second and first["verified"]["collapse"] == ["reference", "triton", "cuda"]
    assert len(log.read_text().split()) == 1


@pytest.mark.parametrize(
    "switch",
    [
        lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    ],
)
def test_tf32_is_an_arithmetic_however_it_was_switched_on(switch, fp32_precision):
    x = torch.zeros(1)
    fp32_precision("none")
    assert _auto._arithmetic(x) == "float32"
    before = torch.backends.fp32_precision, torch.get_float32_matmul_precision()
    try:
        switch()
        assert _schemas.tf32() and _auto._arithmetic(x) == "tf32"
    finally:
        torch.backends.fp32_precision = before[0]
        torch.set_float32_matmul_precision(before[1])


def test_a_first_call_on_a_cpu_measures_nothing_and_reads_no_sources(monkeypatch):
    def never(*_):
        raise AssertionError("a first call must be fast")

    for name in ("_digest", "_measure", "processor"):
        monkeypatch.setattr(choices, name, never)
    x = torch.ones(3, 4, 5, dtype=torch.bfloat16)
    ek.edge_scores(x, x, torch.tensor([1, 2, 3]))
    assert "measured on this device" not in ek.explain("edge_scores", x, x, None)


# The child itself, on the CPU.


class Wrong(Backend):
    name, device = "wrong", "cpu"

    def edge_scores(self, *args, **options):
        Backend.edge_scores(*args, **options)
        args[3].mul_(1.01)


class Greedy(Backend):
    name, device = "greedy", "cpu"

    def edge_scores(self, *args, **options):
        raise torch.OutOfMemoryError("none is left")


def run_child(arithmetic, monkeypatch, **state):
    monkeypatch.setenv("EAP_TUNE", "0")
    monkeypatch.setitem(in_child.SIZES, "cpu", (2**19,))
    monkeypatch.setattr(in_child, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(in_child, "BUDGET", 0.0)
    monkeypatch.setattr(odd_shapes, "SHAPES", odd_shapes.SHAPES[:1])
    monkeypatch.setattr(odd_shapes, "LONG", (5, 4, 521, 64))
    pipe = io.StringIO()
    request = {"device": "cpu", "arithmetic": arithmetic, "verified": {}, "failed": {}, "seconds": {}, **state}
    in_child.run(request, pipe)
    return [json.loads(line) for line in pipe.getvalue().splitlines()]


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
def test_the_child_checks_and_times_every_candidate(arithmetic, monkeypatch):
    words = run_child(arithmetic, monkeypatch)
    assert words[-1] == ["done"]
    able = [impl for impl, device in testing.backends_on_devices() if device == "cpu"]
    assert [rest for what, *rest in words if what == "verified"] == [
        [op, impl] for op in in_child.OPERATORS["cpu"] for impl in able
    ]
    seconds = {(op, case): times for what, op, case, _, times in (w for w in words if w[0] == "seconds")}
    assert len(seconds) == 9 and all(set(times) == set(able) for times in seconds.values())
    assert all(value > 0 for times in seconds.values() for value in times.values())
    # What an earlier child has done is not done again.
    done = {op: {case: {str(2**19): times}} for (op, case), times in seconds.items()}
    verified = dict.fromkeys(in_child.OPERATORS["cpu"], able)
    again = run_child(arithmetic, monkeypatch, verified=verified, seconds=done)
    assert not any(what == "verified" for what, *_ in again)
    assert len([what for what, *_ in again if what == "seconds"]) == 9 - len(done)


@pytest.mark.parametrize(("backend", "what"), [(Wrong(), "wrong"), (Greedy(), "unable")])
def test_the_child_ends_at_a_wrong_candidate_and_where_memory_is_short(backend, what, monkeypatch):
    monkeypatch.setitem(BACKENDS, backend.name, backend)
    *_, at, last = run_child("float32", monkeypatch)
    assert at == ["trying", "edge_scores", backend.name] and last[0] == what
    assert ("exceeds" if what == "wrong" else "none is left") in last[1]


SITE = """
import os, torch
from eap_kernels.tune import child
from eap_kernels._registry import BACKENDS
from eap_kernels.reference import Backend
child.SIZES["cpu"], child.LEAST_SECONDS, child.BUDGET = (2**19,), 0.0, 0.0
child.odd_shapes.SHAPES, child.odd_shapes.LONG = child.odd_shapes.SHAPES[:1], (5, 4, 521, 64)
class Aborts(Backend):
    device = "cpu"
    def edge_scores(self, *args, **options):
        os.abort()
BACKENDS["aborts"] = Aborts()
"""


def test_all_of_it_on_this_cpu(tmp_path, monkeypatch):
    """In processes of its own, with a backend that aborts."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(SITE)
    paths = [str(tmp_path / "site"), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(choices, "STEP_SECONDS", 60.0)
    with pytest.warns(UserWarning, match="aborts for edge_scores, head_space_scores: the process ended by SIGABRT"):
        told, where = devices.tune(["cpu"])
    assert where == f"stored in {choices.path(torch.device('cpu'))}"
    assert told in {f"{name}: {line}" for name, line in info.facts().items()}
    x = torch.ones(9, 4, 5, dtype=torch.bfloat16)
    another_process()
    found = _auto.choose("edge_scores", x, x, None)
    assert found.impl in testing.available_backends() and "measured on this device" in found.reason
    assert "aborts is left out" in ek.explain("edge_scores", x, x, None)
