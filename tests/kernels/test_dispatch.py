"""Choosing a backend, missing backends, tracing, and what an import costs."""

import json
import os
import subprocess
import sys

import pytest
import torch

import eap_kernels as ek
from eap_kernels import _auto, info, testing
from eap_kernels._registry import BACKENDS
from eap_kernels._schemas import OPERATORS
from eap_kernels.reference import Backend
from eap_kernels.tune import choices

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked")
sys.meta_path.insert(0, Block())
"""
SCORES = "ek.edge_scores(torch.ones(2, 1, 3), torch.ones(1, 1, 3), torch.tensor([2]){})"


def python(code, blocked=(), **env):
    """The last line that a fresh interpreter prints."""
    script = BLOCK.format(blocked=set(blocked)) + "import json, torch\nimport eap_kernels as ek\n" + code
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_import_is_light():
    code = "print(json.dumps([torch.cuda.is_initialized(), sorted(sys.modules)]))"
    initialised, modules = python(code)
    assert not initialised
    heavy = {"triton", "transformers", "matplotlib", "eap_circuits"}
    assert not heavy & set(modules)


def test_torch_is_all_that_the_operators_and_drop_ins_need():
    others = [
        "accelerate",
        "jinja2",
        "matplotlib",
        "numpy",
        "packaging",
        "rich",
        "safetensors",
        "transformers",
        "typer",
    ]
    imports = "from eap_kernels import info, integrations; from eap_kernels.tune import child, devices"
    code = f"{imports}; print(json.dumps({SCORES.format('')}.tolist()))"
    assert python(code, blocked=[*others, "eap_circuits"]) == [[3], [3]]


def test_what_eap_circuits_lacks_is_said_in_one_sentence():
    code = """
import importlib.metadata
def sentence(name="python"):
    sys.argv[0] = name
    try:
        import eap_circuits
    except (ImportError, SystemExit) as error:
        return str(error)
found = [sentence(), sentence("/usr/bin/eap")]
sys.meta_path.pop(0)
importlib.metadata.version = lambda name: "4.57.6"
print(json.dumps([*found, sentence()]))
"""
    bare, command, old = python(code, blocked=["numpy", "transformers", "typer"])
    get = "pip install 'eap-kernels[circuits]' brings what is missing."
    assert bare == f"eap_circuits needs numpy, transformers: {get}"
    assert command == f"eap: eap_circuits needs numpy, transformers, typer: {get}"
    assert old == f"eap_circuits needs transformers >= 5 (found 4.57.6): {get}"


def test_missing_kernels_are_said_once_at_the_first_use_and_how_to_get_them():
    code = f"""
import warnings
counts = []
for impl in ("reference", "auto", "auto"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        {SCORES.format(", impl=impl")}
    counts.append([str(warning.message) for warning in caught if "eap_kernels" in str(warning.message)])
print(json.dumps(counts))
"""
    reference, first, second = python(code, blocked=["eap_kernels._C"])
    assert not reference and not second and len(first) == 1
    assert "(eap_kernels._C is blocked)" in first[0]
    assert "pip install --force-reinstall --no-deps --no-cache-dir" in first[0]
    if "cpu" in testing.available_backends():
        assert python(code) == [[], [], []]


def test_want_of_memory_is_one_kind_of_error_on_every_backend_and_in_backward():
    code = """
n, kinds = 2**20, []
def kind(call):
    try:
        call()
    except Exception as error:
        kinds.append([type(error).__name__, str(error)])
wide = torch.ones(1, 1, 1).expand(1, n, n)
for impl in (name for name, reason in ek.backends().items() if reason is None and name in ("cpu", "reference")):
    kind(lambda: ek.masked_read(torch.zeros(1, 1).expand(n, n), wide, torch.ones(1, 1024), impl=impl))
    kind(lambda: ek.edge_scores(wide.transpose(0, 1), wide.transpose(0, 1), torch.ones(n).long(), impl=impl))
from eap_kernels import _dispatch
for error in (MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("can't allocate memory"), RuntimeError("x")):
    def masked_read(*args):
        raise error
    kind(lambda: _dispatch.in_memory(masked_read)())
print(json.dumps(kinds))
"""
    *wanting, other = python(code)
    assert len(wanting) >= 5 and {name for name, _ in wanting} == {"OutOfMemoryError"}
    assert all(": expected enough memory, got " in text for _, text in wanting)
    assert other == ["RuntimeError", "x"]


def test_without_the_extension_the_reference_runs_and_cpu_says_why():
    code = f"""
scores = {SCORES.format("")}.tolist()
try:
    {SCORES.format(", impl='cpu'")}
except RuntimeError as error:
    message = str(error)
print(json.dumps([scores, message, ek.backends(), ek.explain("edge_scores", *[torch.ones(1, 1, 1)] * 3)]))
"""
    scores, message, backends, explained = python(code, blocked=["eap_kernels._C", "eap_kernels._build_info"])
    assert scores == [[3], [3]]
    reason = "the compiled library could not be loaded (eap_kernels._C is blocked)"
    assert message == f"edge_scores: impl='cpu' is not available: {reason}"
    assert backends["reference"] is None
    assert backends["cpu"] == backends["cuda"] == reason
    assert explained == f"edge_scores: auto runs reference: {reason}"


def test_a_required_backend_that_is_missing_is_an_error():
    code = """
from eap_kernels import testing
try:
    message = str(testing.available_backends())
except RuntimeError as error:
    message = str(error)
print(json.dumps(message))
"""
    assert python(code, EAP_REQUIRE="cpu", blocked=["eap_kernels._C"]).startswith("EAP_REQUIRE asks for cpu, which")
    assert f"expected one of {', '.join(BACKENDS)}, got 'gpu'" in python(code, EAP_REQUIRE="gpu")


def test_the_operator_library_loads_without_the_build_description():
    code = "from eap_kernels import info; print(json.dumps([ek.backends(), info.facts()['native build']]))"
    if "cpu" in testing.available_backends():
        backends, description = python(code, blocked=["eap_kernels._build_info"])
        assert backends["cpu"] is None
        assert description == "not described"


@pytest.mark.parametrize("level", ["default", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16", "x86-64-v4-amx"])
def test_every_instruction_set_level_is_right(level):
    """Integers small enough to be exact in every dtype, so that all levels must agree to the bit."""
    if "cpu" not in testing.available_backends():
        return
    code = """
import itertools
from eap_kernels import testing
ok, generator = True, torch.Generator()
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    delta, grad = (torch.randint(-2, 3, (rows, 5, 67)).to(dtype) for rows in (31, 23))
    reach, mask = torch.randint(0, 32, (23,)), torch.randint(0, 2, (31, 23)).bool()
    scores = torch.einsum("und,vnd->uv", delta.double(), grad.double()) * (torch.arange(31)[:, None] < reach)
    ok &= torch.equal(ek.edge_scores(delta, grad, reach, impl="cpu").double(), scores)
    # Tiles and blocks with and without remainders, several of each.
    for senders, receivers, tokens, features in ((431, 517, 1, 64), (70, 90, 3, 1101), (9, 31, 1500, 1), (41, 3, 2, 5)):
        for layouts in itertools.product(("contiguous", "tokens_first", "padded"), repeat=2):
            d, g = (
                testing.random_tensor((rows, tokens, features), dtype, generator, layout).round_()
                for rows, layout in zip((senders, receivers), layouts)
            )
            ends = torch.randint(0, senders + 1, (receivers,))
            scores = d.double().flatten(1) @ g.double().flatten(1).T * (torch.arange(senders)[:, None] < ends)
            ok &= torch.equal(ek.edge_scores(d, g, ends, impl="cpu").double(), scores)
    read = delta[0].double() + torch.einsum("uv,und->vnd", mask.double(), delta.double())
    ok &= torch.equal(ek.masked_read(delta[0], delta, mask, impl="cpu").double(), read)
from eap_kernels import _native
build = _native.build_info()
print(json.dumps([ok, build and build.instruction_set()]))
"""
    ok, used = python(code, EAP_CPU_ISA=level)
    assert ok
    assert used in (None, level, info.facts()["instruction set in use"])


@pytest.mark.parametrize(("missing", "chosen"), [(None, "triton"), ("triton is not installed", "reference")])
def test_one_kernel_is_taken_without_a_measurement_on_a_device_where_it_was_tested(missing, chosen, monkeypatch):
    monkeypatch.setattr(type(BACKENDS["triton"]), "missing", lambda self: missing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    on_gpu = OnGpu(torch.zeros(1))
    for op in _auto.ONE_LAUNCH:
        assert _auto.choose(op, on_gpu).impl == chosen
        on_cpu = "cpu" if BACKENDS["cpu"].missing() is None else "reference"
        assert _auto.choose(op, torch.zeros(1)).impl == on_cpu


@pytest.mark.parametrize(("instruction_set", "dense"), [("x86-64-v3", "cpu"), ("x86-64-v4-amx", "reference")])
def test_auto_follows_its_rule(instruction_set, dense, randn, monkeypatch):
    if "cpu" not in testing.available_backends():
        return
    monkeypatch.setattr(choices, "instruction_set", lambda: instruction_set)
    delta, grad = randn(3, 4, 5), randn(20, 4, 5)
    strided, reach = delta.transpose(0, 1).contiguous().transpose(0, 1), torch.tensor([1, 3])
    mask, many = torch.ones(3, 9), randn(200, 1, 5)
    assert "auto runs reference" in ek.explain("edge_scores", delta, grad[:1], reach)
    assert "auto runs cpu" in ek.explain("edge_scores", delta, grad, reach)
    assert "auto runs cpu" in ek.explain("edge_scores", delta, grad[:9], reach)
    assert "auto runs cpu" in ek.explain("edge_scores", strided, grad, reach)
    assert "auto runs cpu" in ek.explain("edge_scores", delta.bfloat16(), grad.bfloat16(), reach)
    assert "auto runs cpu" in ek.explain("edge_scores", delta, grad, reach, None, torch.zeros(4).long())
    assert f"auto runs {dense}" in ek.explain("masked_read", many[0], many, torch.ones(200, 9))
    assert "auto runs cpu" in ek.explain("masked_read", many[0], many, torch.ones(200, 8))
    wide = torch.zeros(500, 1, 1)
    assert "auto runs reference" in ek.explain("masked_read", wide[0], wide, torch.ones(500, 9))
    assert "auto runs cpu" in ek.explain("masked_read", delta[0], delta, mask)
    assert "auto runs cpu" in ek.explain("masked_read", delta[0], delta, torch.stack([mask, mask, mask]))
    assert f"auto runs {dense}" in ek.explain("masked_read", many[0], many, torch.ones(9, 200, 1))
    with pytest.raises(ValueError, match="explain: expected one circuit's delta"):
        ek.explain("masked_read", delta[0], delta[None], mask[None])
    known = ", ".join(OPERATORS)
    with pytest.raises(ValueError, match=f"explain: expected one of {known}, got 'scores'"):
        ek.explain("scores", delta, grad, reach)
    with pytest.raises(TypeError, match="explain: expected the tensors of masked_read, got 2 arguments"):
        ek.explain("masked_read", delta, mask)


class Doubled(Backend):
    """A backend with one operator, which it computes in a way of its own."""

    name = "doubled"
    device = "cpu"

    def edge_scores(self, *args, **options):
        Backend.edge_scores(*args, **options)
        args[3].mul_(2)


def test_a_backend_is_an_entry_and_what_it_lacks_is_shared(monkeypatch):
    monkeypatch.setitem(BACKENDS, "doubled", Doubled())
    assert ek.backends()["doubled"] is None
    assert ("doubled", "cpu") in testing.backends_on_devices()
    delta, reach = torch.ones(2, 1, 3), torch.tensor([2, 2])
    assert ek.edge_scores(delta, delta, reach, impl="doubled").tolist() == [[6, 6], [6, 6]]
    nodes = [ek.Nodes(delta.transpose(0, 1))]
    assert ek.head_space_scores(nodes, nodes, reach, impl="doubled").tolist() == [[6, 6], [6, 6]]
    assert ek.masked_read(delta[0], delta, torch.ones(2, 1), impl="doubled").tolist() == [[[3, 3, 3]]]
    with pytest.raises(ValueError, match=r"expected impl to be one of auto, .*, doubled, got 'fast'"):
        ek.edge_scores(delta, delta, reach, impl="fast")
    monkeypatch.setattr(BACKENDS["doubled"], "missing", lambda: "it is broken")
    with pytest.raises(RuntimeError, match="edge_scores: impl='doubled' is not available: it is broken"):
        ek.edge_scores(delta, delta, reach, impl="doubled")


class OnGpu:
    """As much of a CUDA tensor as the choice looks at: its values lie on the CPU."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda", 0)

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


def test_on_a_gpu_auto_takes_what_was_measured_fastest_there_and_runs(monkeypatch, fp32_precision):
    def choices(dtype):
        delta, grad = (OnGpu(torch.ones(rows, 4, 5, dtype=dtype)) for rows in (30, 40))
        strided = OnGpu(torch.ones(4, 30, 5, dtype=dtype).transpose(0, 1))
        few = OnGpu(torch.ones(12, 4, 5, dtype=dtype))
        segments = torch.zeros(4, dtype=torch.int64)
        asked = (delta, grad, None), (strided, grad, None), (delta, few, None), (delta, grad, None, None, segments)
        scores = [_auto.choose("edge_scores", *each) for each in asked]
        masks = [torch.arange(100).reshape(4, 25) < kept for kept in (3, 30, 31)]
        return (
            [choice.impl for choice in scores],
            [_auto.choose("masked_read", delta, delta, mask).impl for mask in masks],
            _auto.choose("head_space_scores", [delta]).impl,
        )

    table = {
        "edge_scores": {
            "bfloat16, flat": ["cuda", "reference"],
            "bfloat16, strided": ["triton", "cuda", "reference"],
            "bfloat16, flat, up to 12 receivers": ["reference", "cuda"],
            "float32, flat": ["cuda"],
        },
        "masked_read": {"bfloat16, up to 3% kept": ["cuda"], "bfloat16, up to 30% kept": ["triton", "reference"]},
        "head_space_scores": {"bfloat16": ["cuda"]},
    }
    monkeypatch.setattr(_auto, "MEASURED", {"NVIDIA H100": {"capability": "9.0", "operators": table}})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(BACKENDS["cuda"], "missing", lambda: None)
    monkeypatch.setattr(BACKENDS["triton"], "missing", lambda: "not here")
    fp32_precision("ieee")
    right = ["cuda", "cuda", "reference", "cuda"], ["cuda", "reference", "reference"], "cuda"
    assert choices(torch.bfloat16) == choices(torch.float16) == right
    nothing = ["reference"] * 3
    assert choices(torch.float64) == (["reference"] * 4, nothing, "reference")
    assert choices(torch.float32) == (["cuda", *nothing], nothing, "reference")
    fp32_precision("tf32")
    assert choices(torch.float32) == (["reference"] * 4, nothing, "reference"), "tf32 was not measured"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choices(torch.bfloat16) == right, "another card of the same architecture"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert choices(torch.bfloat16) == (["reference"] * 4, nothing, "reference")


def test_meta_tensors_have_no_native_kernel():
    delta = torch.ones(2, 1, 3, device="meta")
    with pytest.raises(ValueError, match="expected CPU tensors for impl='cpu', got meta"):
        ek.masked_read(delta[0], delta, torch.ones(2, 1, device="meta"), impl="cpu")
    assert ek.masked_read(delta[0], delta, torch.ones(2, 1, device="meta")).shape == (1, 1, 3)


def test_both_operators_compile_in_one_graph(impl, device, randn):
    def both(base, delta, mask, reach, out):
        y = ek.masked_read(base, delta, mask, impl=impl)
        return ek.edge_scores(delta, y, reach, out, impl=impl) * 2

    delta, mask = randn(3, 4, 5), randn(3, 2)
    args = (delta[0], delta, mask, torch.tensor([1, 3]))
    out = torch.ones(3, 2)
    result = torch.compile(both, backend="aot_eager", fullgraph=True)(*args, out)
    expected = torch.ones(3, 2)
    torch.testing.assert_close(result, both(*args, expected))
    torch.testing.assert_close(out, expected)


def test_info_prints_facts(capsys):
    info.main()
    printed = capsys.readouterr().out
    assert ek.__version__ in printed
    assert "backend cpu" in printed
