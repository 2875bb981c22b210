"""The CUDA kernels without a GPU: the schedule of edge_scores, what nvcc makes of every source, and the library."""

import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eap_kernels import _native
from tests.build.building import ROOT, build, copy_of_the_sources

SOURCES = ("edge_scores", "edge_scores_sm90", "masked_read")
ARCHITECTURES = ("80", "90a", "100")
DIRECT = -1


# The schedule: plain C++, present in every build.


@st.composite
def schedules(draw):
    senders = draw(st.integers(1, 700))
    reach = draw(st.lists(st.integers(0, senders), max_size=400))
    tokens = draw(st.integers(0, 40))
    segments = draw(st.none() | st.lists(st.integers(0, 5), min_size=tokens, max_size=tokens))
    return {
        "reach": sorted(reach) if draw(st.booleans()) else reach,
        "segments": segments,
        "tokens": tokens,
        "max_slabs": draw(st.sampled_from([2, 4])),
        "sorted": draw(st.booleans()),
        "workers": draw(st.integers(1, 264)),
        "steps": draw(st.integers(1, 128)),
    }


def described_build():
    """What describes the native build: skips where there is none, unless the native build is required."""
    build = _native.build_info()
    if build is None and "cpu" in os.environ.get("EAP_REQUIRE", "").split(","):
        pytest.fail("EAP_REQUIRE asks for cpu: the native build has no description for this Python")
    return build or pytest.skip("the native build has no description for this Python")


@given(schedules())
def test_the_schedule_covers_every_edge_and_token_once(request):
    build = described_build()
    schedule = build.cuda_schedule(**request)
    reach, tokens = request["reach"], request["tokens"]

    receivers = schedule["receiver"]
    assert len(set(receivers)) == len(receivers)
    assert {v for v, r in enumerate(reach) if r} <= set(receivers) <= set(range(len(reach)))
    assert schedule["reach"] == [reach[v] for v in receivers]
    if request["sorted"]:
        assert schedule["reach"] == sorted(schedule["reach"])
    else:
        assert receivers == list(range(len(reach)))

    slab, columns = build.cuda_slab, build.cuda_columns
    covered = torch.zeros(max(reach, default=0) + 4 * slab, len(receivers), dtype=torch.int32)
    for sender, slabs, column in schedule["tiles"]:
        assert 1 <= slabs <= request["max_slabs"] and sender % slab == 0 and column % columns == 0
        block = torch.tensor(schedule["reach"][column : column + columns])
        for first in range(sender, sender + slabs * slab, slab):
            assert (block > first).any(), "a slab without work"
        covered[sender : sender + slabs * slab, column : column + columns] += 1
    kept = torch.arange(len(covered))[:, None] < torch.tensor(schedule["reach"], dtype=torch.int64)
    assert (covered[kept] == 1).all() and not (covered > 1).any()

    if not schedule["tiles"]:
        return
    order = schedule["token"] or list(range(tokens))
    assert sorted(order) == list(range(tokens))
    segments = request["segments"] or [0] * tokens
    slots, position = {}, 0
    for first, count, segment, slot in schedule["chunks"]:
        assert first == position and count > 0
        assert all(segments[n] == segment for n in order[first : first + count])
        assert order[first : first + count] == sorted(order[first : first + count])
        slots.setdefault(segment, []).append(slot)
        position += count
    assert position == tokens
    used = []
    for segment, first, count in schedule["splits"]:
        assert slots.pop(segment) == list(range(first, first + count)) and count > 1
        used += range(first, first + count)
    assert used == list(range(schedule["slots"]))
    assert all(left == [DIRECT] for left in slots.values()), "a segment in several chunks that nothing adds up"
    assert build.cuda_schedule(**request) == schedule


def test_the_schedule_fills_the_card_and_bounds_the_partial_tiles():
    build = described_build()
    # The shape of an 8B model: 32 layers of 32 heads and 8 key/value heads.
    reach = [1 + 33 * layer + (32 if mlp else 0) for layer in range(32) for mlp in [False] * 48 + [True]] + [1057]
    for tokens in (1, 7, 100, 2048):
        schedule = build.cuda_schedule(reach, None, tokens=tokens, max_slabs=4, sorted=False, workers=132, steps=64)
        units = len(schedule["tiles"]) * len(schedule["chunks"])
        waves = -(-units // 132)
        assert schedule["slots"] * len(schedule["tiles"]) <= 4 * 132, "256 MB of partial tiles at most"
        if tokens >= 100:
            assert units / (waves * 132) > 0.9
    slabs = sum(tile[1] for tile in schedule["tiles"])
    assert sum(reach) / (slabs * build.cuda_slab * build.cuda_columns) > 0.75, "too much work outside the staircase"


# What nvcc makes of the sources.


@pytest.fixture(scope="module")
def compiled(nvcc, tmp_path_factory):
    """{(source, architecture): (nvcc's report, PTX)}."""

    def compile_one(case):
        source, architecture = case
        folder = tmp_path_factory.mktemp("cuda")
        command = [nvcc, "-O3", "-std=c++17", f"-arch=sm_{architecture}", "-cubin", "--keep", "--keep-dir", str(folder)]
        command += ["-Xptxas", "-v,-warn-spills", str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(folder / "out.cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (ptx,) = folder.glob("*.ptx")
        return done.stdout + done.stderr, ptx.read_text()

    cases = list(itertools.product(SOURCES, ARCHITECTURES))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(cases, pool.map(compile_one, cases), strict=True))


def test_every_kernel_fits_in_registers_and_shared_memory(compiled):
    for (source, architecture), (report, _) in compiled.items():
        assert "warning" not in report.lower(), report
        # What ptxas says where it makes the asynchronous products wait for each other.
        assert "performance loss" not in report.lower(), report
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        usage = re.findall(r"Function properties for (\S+)\n.*\n.*Used (\d+) registers(.*)", report)
        assert len(frames) == len(usage) == {"edge_scores": 12, "edge_scores_sm90": 3, "masked_read": 12}[source]
        assert set(frames) == {("0", "0", "0")}, (source, architecture, report)
        for name, registers, rest in usage:
            shared = re.search(r"(\d+) bytes smem", rest)
            assert shared is None or int(shared[1]) <= 48 * 1024, name
            # The bounds follow from the blocks meant to share a multiprocessor; all but the first warpgroup of the
            # TMA kernel take or give registers when they start.
            alone = re.search(r"portableI(d|\w+?Lb0E)", name)
            assert int(registers) <= (168 if source == "edge_scores_sm90" else 255 if alone else 128), name


def test_the_instructions_meant_are_there(compiled):
    for (source, architecture), (_, ptx) in compiled.items():
        if source == "edge_scores":
            assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx
            assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in ptx
            assert "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" in ptx
            assert "cvt.rna.tf32.f32" in ptx
            assert "ldmatrix.sync" in ptx
            assert "cp.async.cg.shared.global" in ptx
            assert "fma.rn.f64" in ptx
        if source == "edge_scores_sm90":
            for instruction in (
                "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
                "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16",
                "wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32",
                "cp.async.bulk.tensor.3d.shared::cluster.global",
                "setmaxnreg.inc",
            ):
                assert (instruction in ptx) == (architecture == "90a")
        assert not re.search(r"\b(atom|red)\.\S*\.f(16|32|64)", ptx), "sums of floats in no fixed order"


# The library.


def facts(folder, code):
    """The JSON that a fresh interpreter prints which imports the package of that folder."""
    code = f"import json, torch, eap_kernels as ek\nfrom eap_kernels import _native, info\n{code}"
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def library(nvcc, tmp_path_factory):
    """A copy of the package with CUDA kernels, whatever torch is there."""
    folder = copy_of_the_sources(tmp_path_factory.mktemp("library"))
    done = build(folder, EAP_CUDA="1", EAP_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_library_registers_cuda_kernels_and_needs_no_cuda_at_run_time(library):
    """In a process that must not touch CUDA: no driver, no runtime library, nothing initialised."""
    code = """
has = torch._C._dispatch_has_kernel_for_dispatch_key
keys = [has(f"eap_kernels::{op}", "CUDA") for op in ("edge_scores", "masked_read")]
loaded = sorted({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line})
print(json.dumps([keys, torch.cuda.is_initialized(), torch.version.cuda, loaded, ek.backends(), info.facts()]))
"""
    keys, initialised, torch_cuda, loaded, backends, lines = facts(library, code)
    assert keys == [True, True]
    assert not initialised
    assert backends["cpu"] is None
    assert lines["cuda architectures"] == ", ".join(ARCHITECTURES)
    if torch_cuda is None:
        assert not [name for name in loaded if re.search(r"libcuda(rt)?\.so", name)]
        assert backends["cuda"] == "torch sees no CUDA device"


@pytest.mark.slow
def test_without_a_device_cuda_is_refused_in_one_sentence(library):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    code = """
sentences = []
for device in ("cpu", "cuda"):
    try:
        ek._dispatch.check_impl("edge_scores", "cuda", torch.device(device))
    except (ValueError, RuntimeError) as error:
        sentences.append(str(error))
print(json.dumps(sentences))
"""
    assert facts(library, code) == [
        "edge_scores: expected CUDA tensors for impl='cuda', got cpu",
        "edge_scores: impl='cuda' is not available: torch sees no CUDA device",
    ]
