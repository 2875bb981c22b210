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
from eap_kernels.testing.shapes import MODELS
from tests.build.building import ROOT, build, copy_of_the_sources

pytestmark = pytest.mark.long

SOURCES = ("edge_scores", "edge_scores_sm90", "masked_read")
ARCHITECTURES = ("80", "90a", "100")
DIRECT = -1


# The schedule: plain C++, present in every build.

# How the two kernels take their operands: receivers one by one; in boxes, by TMA.
KINDS = {
    "portable": {"columns": 128, "max_slabs": 2, "gathers": True, "row_bytes": 64},
    "hopper": {"columns": 256, "max_slabs": 4, "gathers": False, "row_bytes": 128},
}


@st.composite
def schedules(draw):
    senders = draw(st.integers(1, 700))
    reach = draw(st.lists(st.integers(0, senders), max_size=400))
    tokens = draw(st.integers(0, 40))
    segments = draw(st.none() | st.lists(st.integers(0, 5), min_size=tokens, max_size=tokens))
    # Rows so wide that a period is short.
    kind = KINDS[draw(st.sampled_from(list(KINDS)))] | {"row_bytes": draw(st.sampled_from([64, 2**12, 2**18]))}
    return kind | {
        "reach": sorted(reach) if draw(st.booleans()) else reach,
        "segments": segments,
        "tokens": tokens,
        "workers": draw(st.integers(1, 264)),
        "steps": draw(st.integers(1, 40)),
    }


def described_build():
    """What describes the native build: skips where there is none, unless the native build is required."""
    build = _native.build_info()
    if build is None and "cpu" in os.environ.get("EAP_REQUIRE", "").split(","):
        pytest.fail("EAP_REQUIRE asks for cpu, and nothing describes the native build")
    return build or pytest.skip("nothing describes the native build")


@given(schedules())
def test_tiles_cover_every_edge_once(request):
    build = described_build()
    schedule = build.cuda_schedule(**request)
    reach, columns, slab, box = request["reach"], request["columns"], build.cuda_slab, schedule["box"]

    receivers = schedule["receiver"]
    used = [v for v in receivers if v >= 0]
    assert len(set(used)) == len(used) and len(receivers) % columns == 0
    assert {v for v, r in enumerate(reach) if r} <= set(used) <= set(range(len(reach)))
    assert schedule["reach"] == [reach[v] if v >= 0 else 0 for v in receivers]
    assert box == 1 if request["gathers"] else box in (8, 16, 32, 64)
    boxes = [receivers[i : i + box] for i in range(0, len(receivers), box)]
    for first, *others in boxes:
        assert first < 0 or others == [v if v < len(reach) else -1 for v in range(first + 1, first + box)]
    deepest = [max(schedule["reach"][i : i + box]) for i in range(0, len(receivers), box)]
    assert deepest == sorted(deepest)

    seen = torch.tensor(schedule["reach"], dtype=torch.int64).view(-1, slab)
    covered = torch.zeros(max(reach, default=0) + 4 * slab, len(receivers), dtype=torch.int32)
    for sender, slabs, column, depths in schedule["tiles"]:
        assert 1 <= slabs <= request["max_slabs"] and sender % slab == 0 and column % columns == 0
        assert max(depths) == slabs, "slabs without work"
        for group, depth in enumerate(depths):
            deepest = int(seen[column // slab + group].max())
            assert depth == min(slabs, max(0, -(-(deepest - sender) // slab))), "a group goes as deep as it sees"
            covered[sender : sender + depth * slab, column + group * slab : column + (group + 1) * slab] += 1
    kept = torch.arange(len(covered))[:, None] < seen.view(-1)
    assert (covered[kept] == 1).all() and not (covered > 1).any()


def cost(tile):
    return tile[1] + 2


@given(schedules())
def test_every_step_of_every_tile_is_dealt_once_and_evenly(request):
    schedule = described_build().cuda_schedule(**request)
    tiles, tokens = schedule["tiles"], request["tokens"]
    if not tiles or not tokens:
        assert not schedule["pieces"]
        return
    order = schedule["token"] or list(range(tokens))
    segments = request["segments"] or [0] * tokens
    assert sorted(order) == list(range(tokens))
    assert [segments[n] for n in order] == sorted(segments)
    counts = {segment: segments.count(segment) for segment in segments}

    steps, slots, loads = {}, {}, []
    assert 1 <= len(schedule["pieces"]) <= request["workers"]
    for pieces in schedule["pieces"]:
        loads.append(0)
        assert sum(slot != DIRECT for _, _, _, slot, _ in pieces) <= 2, "partial tiles of one worker"
        for tile, segment, token, slot, walked in pieces:
            assert walked == sorted(walked), "from the first token to the last"
            assert token == sum(count for other, count in counts.items() if other < segment)
            steps.setdefault((tile, segment), []).extend(walked)
            slots.setdefault((tile, segment), []).append(slot)
            loads[-1] += len(walked) * cost(tiles[tile])
    for (tile, segment), walked in steps.items():
        assert sorted(walked) == list(range(counts[segment] * request["steps"])), (tile, segment)
    assert set(steps) == {(tile, segment) for tile in range(len(tiles)) for segment in counts}

    # Whoever has less than a whole tile has a slot, and slots are added up in order.
    used = []
    for tile, segment, first, count in schedule["splits"]:
        assert slots.pop((tile, segment)) == list(range(first, first + count)) and count > 1
        used += range(first, first + count)
    assert used == list(range(schedule["slots"])) and len(used) <= 2 * len(schedule["pieces"])
    assert all(left == [DIRECT] for left in slots.values()), "a tile of several workers that nothing adds up"
    # A cut moves by less than eight steps, and rounds to whole ones.
    assert max(loads) <= sum(loads) / len(loads) + 2 * 8 * (request["max_slabs"] + 2)

    assert described_build().cuda_schedule(**request) == schedule, "sums in another order from run to run"


def model_schedule(name, tokens=2048):
    """The schedule of a model in bf16 on an H100, whose 132 processors are 66 workers, and its reach."""
    model = MODELS[name]
    steps = -(-model.width * 2 // 128)
    kind = KINDS["hopper"] | {"segments": None, "tokens": tokens, "workers": 66, "steps": steps}
    return described_build().cuda_schedule(reach=model.reach.tolist(), **kind), model.reach


# Counted, not measured. Balance: the mean worker's slabs times steps over the largest; before work was cut evenly 0.74,
# 0.70, 0.85, 0.74, 0.89. Useful: how much of what is multiplied lies in the staircase; before, 0.44, 0.57, 0.86, 0.51,
# 0.79.
COUNTED = {
    "gpt2": (0.92, 0.56),
    "qwen2.5-0.5b": (0.99, 0.69),
    "pythia-2.8b": (0.92, 0.91),
    "gemma-2-2b": (0.89, 0.68),
    "llama-3.1-8b": (0.93, 0.87),
}


@pytest.mark.parametrize("name", COUNTED)
def test_workers_get_equal_shares_on_the_shapes_of_models(name):
    schedule, reach = model_schedule(name)
    tiles, pieces = schedule["tiles"], schedule["pieces"]
    balance, useful = COUNTED[name]
    assert len(pieces) == 66 and schedule["slots"] <= 2 * 66, "70 MB of partial tiles at most"
    for load, least in ((cost, 0.995), (lambda tile: tile[1], balance)):
        loads = [sum(len(walked) * load(tiles[tile]) for tile, *_, walked in some) for some in pieces]
        assert sum(loads) / 66 / max(loads) >= least
    assert int(reach.sum()) / (64 * 64 * sum(sum(depths) for *_, depths in tiles)) >= useful
    # Both blocks of a cluster multiply about as much.
    blocks = [(depths[0] + depths[3], depths[1] + depths[2]) for *_, depths in tiles]
    assert sum(map(sum, blocks)) / (2 * sum(map(max, blocks))) >= 0.9


def test_few_tokens_are_dealt_to_few_workers():
    assert 1 <= len(model_schedule("gpt2", tokens=1)[0]["pieces"]) < 10
    assert len(model_schedule("llama-3.1-8b", tokens=1)[0]["pieces"]) == 66


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
                *(f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16" for n in (64, 128, 192, 256)),
                *(f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.f16.f16" for n in (64, 128, 192, 256)),
                *(f"wgmma.mma_async.sync.aligned.m64n{n}k8.f32.tf32.tf32" for n in (64, 128, 192, 256)),
                "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [",
                "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster",
                "mbarrier.arrive.shared::cluster",
                "barrier.cluster.arrive.release.aligned",
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
