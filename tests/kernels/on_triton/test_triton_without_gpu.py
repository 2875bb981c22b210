"""The Triton backend where there is no GPU: run in Triton's interpreter, and compiled for three architectures.

Both need a process of their own: whether kernels are interpreted is decided when Triton is imported.
"""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from eap_kernels.triton import configs

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]
OPERATORS = ("edge_scores", "masked_read", "normalise_rows", "collapse")
TESTS = [str(FOLDER / "test_triton_kernels.py"), *(str(FOLDER.parent / f"operators/test_{op}.py") for op in OPERATORS)]
TARGETS = ((80, "small"), (90, "large"), (100, "large"))
MATRIX_UNIT = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Bytes that a program may take: of every card since sm_80, and of sm_90 and sm_100.
SHARED = {"small": 99 * 1024, "large": 227 * 1024}


def need(missing):
    """Skips for this reason; a failure where EAP_REQUIRE names triton."""
    if missing and "triton" in os.environ.get("EAP_REQUIRE", "").split(","):
        pytest.fail(f"EAP_REQUIRE asks for triton: {missing}")
    if missing:
        pytest.skip(missing)


def interpreter_problem():
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton before 3.7 fails with numpy 2.4"
    return None


def run(*command, **env):
    path = os.pathsep.join(filter(None, [str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH")]))
    # Threads would only wait for each other: the blocks are small.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    env = {**os.environ, **threads, "PYTHONPATH": path, **env}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=ROOT, timeout=900)


@pytest.mark.parametrize("quick", ["1", pytest.param("0", marks=pytest.mark.slow)], ids=["quick", "full"])
def test_the_operators_tests_pass_in_the_interpreter(quick):
    if torch.cuda.is_available():
        pytest.skip("the kernels run on this machine's GPU, in the operators' own tests")
    need(interpreter_problem())
    options = ["-q", "-k", "triton", "-p", "triton_bf16", "-p", "no:cacheprovider", "-W", "ignore"]
    done = run("-m", "pytest", *options, *TESTS, TRITON_INTERPRET="1", EAP_REQUIRE="triton", EAP_QUICK=quick)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    summary = done.stdout.splitlines()[-1]
    assert " passed" in summary
    assert "skipped" not in summary


def compile_all(shapes, tmp_path_factory):
    """{target: what each kernel of the table for this size of shared memory uses}."""
    need(None if importlib.util.find_spec("triton") else "triton is not installed")

    def compile_one(target, cache):
        capability, memory = target
        done = run(str(FOLDER / "triton_offline.py"), str(capability), memory, shapes, TRITON_CACHE_DIR=str(cache))
        assert done.returncode == 0, done.stderr[-10_000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    # Made here: pytest's own folder comes into being with the first, which two threads would both try.
    caches = [tmp_path_factory.mktemp("triton") for _ in TARGETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(TARGETS, pool.map(compile_one, TARGETS, caches), strict=True))


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    return compile_all("even", tmp_path_factory)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return compile_all("rest,odd,huge", tmp_path_factory)


def check(kernels, capability, memory):
    for kernel in kernels:
        assert kernel["LOCAL"] == 0, kernel
        # Some sums of runs may wait on the stack, which is read once for thousands of products: the largest tile's, and
        # a few where addresses of single elements take the registers.
        sums = kernel["kernel"] == "_contract"
        most = 512 if sums and kernel["tile"][:2] == [128, 256] else 32 if sums and kernel["shape"] == "odd" else 0
        assert kernel["STACK"] <= most, kernel
        assert most or not {"LDL", "STL"} & set(kernel["opcodes"]), kernel
        assert kernel["shared"] <= SHARED[memory], kernel
        assert not kernel["narrow"], kernel
        for rows, dtype in kernel["dots"]:
            # Smaller tiles than 64 rows do not fit the matrix unit of sm_90 and sm_100, and take the older one.
            if dtype in ("bf16", "f16") or kernel["kind"] == "tf32":
                assert (MATRIX_UNIT[capability] if int(rows) >= 64 else "HMMA") in kernel["opcodes"], kernel


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "memory"), TARGETS)
def test_every_configuration_compiles_without_spills(capability, memory, even):
    kernels = even[capability, memory]
    check(kernels, capability, memory)
    assert {"_normalise", "_collapse"} <= {kernel["kernel"] for kernel in kernels}
    dtypes = {(k["dtype"], k["kind"]) for k in kernels}
    assert {(k["dtype"], k["kind"]) for k in kernels if k["kernel"] == "_expand"} == dtypes
    for name, table in (("_contract", configs.EDGE_SCORES), ("_dense", configs.MASKED_READ)):
        found = {(k["dtype"], k["kind"], tuple(k["tile"])) for k in kernels if k["kernel"] == name}
        dtypes = {"half": ("torch.bfloat16", "torch.float16"), "fp64": ("torch.float64",)}
        assert found == {
            (dtype, kind, tile)
            for kind, tiles in table[memory].items()
            for dtype in dtypes.get(kind, ("torch.float32",))
            for tile in tiles
        }
        # Loads run ahead of the products.
        assert all("LDGSTS" in k["opcodes"] for k in kernels if k["kernel"] == name)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "memory"), TARGETS)
def test_remainders_odd_strides_and_huge_sizes_compile_without_spills(capability, memory, uneven):
    kernels = uneven[capability, memory]
    check(kernels, capability, memory)
    assert {k["shape"] for k in kernels} == {"rest", "odd", "huge"}
