"""The CUDA kernels run without a GPU: compiled for the CPU, with threads, barriers, asynchronous copies and matrix
instructions emulated (cuda_emulator/), on random shapes, strides, segments and masks.

What the emulator cannot show, compiling and a GPU must: registers, the order of memory, and speed.
"""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent / "cuda_emulator"
CSRC = Path(__file__).parents[3] / "csrc"
KERNELS = ("edge_scores.cu", "edge_scores_sm90.cu", "masked_read.cu")


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} no longer says {old!r} once"
    path.write_text(text.replace(old, new))


def compile_all(nvcc: str, folder: Path, sources: list[Path]) -> None:
    """An object file of each source. With -x c++ nvcc only finds its headers and calls the host compiler."""
    command = [nvcc, "-x", "c++", "-std=c++17", "-O1", "-c", f"-I{folder}", f"-I{EMULATOR}", "-Xcompiler"]
    # Attributes, pragmas and parameters of kernels mean nothing to the host compiler.
    command.append(f"-include,{EMULATOR / 'emulator.h'},-Wno-attributes,-Wno-unknown-pragmas,-Wno-psabi")

    def compile_one(source: Path) -> None:
        done = subprocess.run([*command, source, "-o", folder / f"{source.name}.o"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources))


def link(nvcc: str, folder: Path) -> Path:
    objects = sorted(folder.glob("*.o"))
    subprocess.run([nvcc, "-cudart", "none", *objects, "-o", folder / "cases"], check=True, capture_output=True)
    return folder / "cases"


@pytest.fixture(scope="module")
def built(nvcc, tmp_path_factory) -> Path:
    """A folder with the sources, their objects and the program."""
    folder = tmp_path_factory.mktemp("emulated")
    shutil.copytree(CSRC, folder / "csrc")
    for header in ("ptx.h", "ptx_sm90.h"):
        shutil.copy(EMULATOR / header, folder / "csrc/cuda")
    # Sums are handed over after so many products: few enough that small cases do it several times.
    replace(folder / "csrc/cuda/edge_scores.h", "kRun = 4096;", "kRun = 128;")
    # And few enough bytes of a period that they have several.
    replace(folder / "csrc/cuda/schedule.h", "kPeriodBytes = 4 << 20;", "kPeriodBytes = 1 << 16;")
    compile_all(nvcc, folder, [folder / "csrc/cuda" / name for name in KERNELS] + sorted(EMULATOR.glob("*.cpp")))
    link(nvcc, folder)
    return folder


def run(program: Path, operator: str, first: int, last: int) -> subprocess.CompletedProcess:
    return subprocess.run([program, operator, str(first), str(last)], capture_output=True, text=True, timeout=1200)


EXPECTED = {
    "scores": {
        *("portable", "hopper", "tf32 portable", "tf32 hopper", "receivers out of order", "tiles with a lower half"),
        *("whole", "cut", "cut in periods", "cut in periods by hopper", "workers with several pieces", "in step"),
        *(f"tiles of {slabs} slabs" for slabs in (1, 2, 3, 4)),
    },
    "reads": {"pieces of 16 bytes", "any layout"},
}


@pytest.mark.parametrize(
    ("first", "last"), [(0, 100), pytest.param(100, 1500, marks=pytest.mark.slow)], ids=["some", "many"]
)
@pytest.mark.parametrize("operator", EXPECTED)
def test_results_are_right_and_no_entry_is_written_twice(built, operator, first, last):
    done = run(built / "cases", operator, first, last)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert set(seen) == EXPECTED[operator]
    assert all(seen.values())


FAULTS = {
    "a tile touches its neighbour": (
        "edge_scores.cu",
        "if (16 * i >= target.tile.slabs * kSlab) break;",
        "",
    ),
    "a copy is not waited for": (
        "edge_scores.cu",
        "cp_async_wait<kStages - 2>",
        "cp_async_wait<kStages - 1>",
    ),
    "a stage is loaded while it is read": (
        "edge_scores.cu",
        "__syncthreads();  // everybody has left the stages of the piece before",
        "",
    ),
    "offsets in 32 bits": (
        "edge_scores.cu",
        "u * delta.stride[0]",
        "int32_t(u * delta.stride[0])",
    ),
    "slots are not all added": (
        "edge_scores.cu",
        "slot < split.first + split.count",
        "slot < split.first + split.count - 1",
    ),
    "a stage is free before its products are done": (
        "edge_scores_sm90.cu",
        "wgmma_wait<1>",
        "wgmma_wait<2>",
    ),
    "a wrong parity": ("edge_scores_sm90.cu", "ring.parity ^ 1", "ring.parity"),
    "tf32 is cut off instead of rounded": (
        "edge_scores.cu",
        "r[i] = rounded_to_tf32(r[i]);",
        ";",
    ),
    "fp32 is copied as it is for tf32": (
        "edge_scores_sm90.cu",
        "CU_TENSOR_MAP_DATA_TYPE_TFLOAT32",
        "CU_TENSOR_MAP_DATA_TYPE_FLOAT32",
    ),
    "tokens of another segment": (
        "edge_scores_sm90.cu",
        "plan.token_at(piece.token + walk.token)",
        "(piece.token + walk.token)",
    ),
    "later runs overwrite": ("edge_scores_sm90.cu", "start == 0);", "true);"),
    "bytes that never arrive": (
        "edge_scores_sm90.cu",
        "tile.slabs * kSlabBytes + kReceiversBytes);",
        "kSendersBytes + kReceiversBytes);",
    ),
    "a stage is loaded while the other block multiplies": (
        "edge_scores_sm90.cu",
        "kHopperBlocks * kConsumers / 32);",
        "kConsumers / 32);",
    ),
    "both blocks load the same half of the senders": (
        "edge_scores_sm90.cu",
        "tile.sender + slab * kSlab + block * kShare",
        "tile.sender + slab * kSlab",
    ),
    "a block ends before the other has": (
        "edge_scores_sm90.cu",
        "cluster_sync();  // the other block may still write to this one's shared memory",
        "",
    ),
    "receivers in the place of others": (
        "edge_scores_sm90.cu",
        "const int from = tile_group(block, row / kSlab) * kSlab + row % kSlab;",
        "const int from = block * kReceivers + row;",
    ),
    "others wait for periods that nobody counts": (
        "edge_scores_sm90.cu",
        "if (paced) in_step.end_before(piece.pace.periods);",
        "",
    ),
    "a period is left out": (
        "schedule.h",
        "if (period >= 0) start += piece.all.in(period);",
        "if (period > 0) start += piece.all.in(period);",
    ),
    "unused senders are listed": (
        "masked_read.cu",
        "__ballot_sync(0xFFFFFFFFu, w != 0);",
        "__ballot_sync(0xFFFFFFFFu, u < call.senders);",
    ),
    "weights in 32-bit places": (
        "masked_read.cu",
        "const int64_t i = u * mask_stride[0] + v * mask_stride[1];",
        "const int64_t i = int32_t(u * mask_stride[0] + v * mask_stride[1]);",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("source", "old", "new"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found(built, nvcc, tmp_path, source, old, new):
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "csrc/cuda" / source
    replace(path, old, new)
    # A header is part of both kernels.
    compile_all(nvcc, tmp_path, [path] if path.suffix == ".cu" else sorted(path.parent.glob("edge_scores*.cu")))
    done = run(link(nvcc, tmp_path), "reads" if source == "masked_read.cu" else "scores", 0, 100)
    # Reading far outside of a tensor ends the program with a signal.
    assert done.returncode != 0
