"""`python triton_offline.py 90`: compiles every Triton configuration for sm_90, without a GPU; prints what each uses.

What is compiled is what the operators launch: they run up to the launch, where `warmup` replaces it. One JSON line
per kernel goes to standard output.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from eap_kernels.triton import collapse, configs, edge_scores, head_space_scores, masked_read, normalise_rows

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class NoDevice(DriverBase):
    """As much of a driver as compiling needs."""

    def __init__(self, capability):
        self.capability = capability
        super().__init__()

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, kind):
        return kind

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        # Compiled kernels are kept per device number.
        return self.capability

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        raise NotImplementedError


class Recorder:
    """Stands in for a kernel: compiles instead of launching."""

    def __init__(self, kernel, compiled):
        self.kernel = kernel
        self.compiled = compiled

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.compiled.append((self.kernel.__name__, self.kernel.warmup(*args, grid=grid, **options)))

        return launch


def record():
    """Every launch of the operators from now on ends in the list returned."""
    compiled = []
    for module in (edge_scores, head_space_scores, masked_read, normalise_rows, collapse):
        for name, value in list(vars(module).items()):
            # Functions with a result are called by kernels, not launched.
            if isinstance(value, triton.runtime.jit.JITFunction) and value.fn.__annotations__["return"] == "None":
                setattr(module, name, Recorder(value, compiled))
    return compiled


def resources(kernel):
    """Registers, bytes of stack and of shared memory, and which of the instructions that matter occur."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return {
        **{name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")},
        "shared": kernel.metadata.shared,
        # Rows and type of the left operand of matrix products.
        "dots": re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(\w+)> \*", kernel.asm["ttir"]),
        "opcodes": sorted(set(re.findall(r"\b(?:HGMMA|HMMA|DMMA|UTC\w*MMA|FFMA|DFMA|LDGSTS|LDL|STL)\b", code))),
    }


def narrow_strides(kernel):
    """Strides used in 32-bit arithmetic: each has to be widened before it meets an index."""
    head, body = kernel.asm["ttir"].split(" attributes ", 1)
    strides = re.findall(r"(%(?:base|delta|grad|out|weights|y|x|values|coefficients)_[a-z]): i32", head)
    return [line for line in body.splitlines() if "extsi" not in line for x in strides if re.search(rf"{x}\b", line)]


SHAPES = {
    # As in a model: strides and sizes are multiples of 16.
    "even": lambda rows, dtype: torch.empty(rows, 16, 1024, dtype=dtype),
    # As in a model, apart from a remainder; tokens come first, so that the memory is not flat.
    "rest": lambda rows, dtype: torch.empty(3, rows, 208, dtype=dtype).transpose(0, 1),
    # Nothing is a multiple of anything, and no dimension has stride 1.
    "odd": lambda rows, dtype: torch.empty(10, 37, rows, dtype=dtype).permute(2, 1, 0)[:, :, ::2],
    # Sizes and strides that do not fit into 32 bits.
    "huge": lambda rows, dtype: torch.empty(2**31 + 64, dtype=dtype).expand(rows, 1, 2**31 + 64),
}
DTYPES = {
    "half": (torch.bfloat16, torch.float16),
    "tf32": (torch.float32,),
    "fp32": (torch.float32,),
    "fp64": (torch.float64,),
}


def calls(name, shape, dtype, tf32):
    """Calls an operator in every way that changes what is compiled, apart from the tile."""
    delta, grad = (SHAPES[shape](rows, dtype) for rows in (64, 256))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if name == "edge_scores":
        segments = torch.arange(delta.shape[1]).flip(0) if shape in ("rest", "odd") else None
        out = torch.empty(*([] if segments is None else [len(segments)]), 64, 256, dtype=wide)
        edge_scores.edge_scores(delta, grad, torch.full((256,), 64), out, segments, tf32)
    elif shape != "huge":
        for mask_dtype, sparse in itertools.product((torch.bool, wide), (0.0, float("inf"))):
            configs.SPARSE = dict.fromkeys(configs.SPARSE, sparse)
            masked_read.masked_read(grad[0], delta, torch.ones(64, 256, dtype=mask_dtype), tf32)


def expand(features, dtype, tf32):
    """One side with every kind of group."""
    Group, new = head_space_scores.Group, partial(torch.empty, dtype=dtype)
    values, none = new(64, 4, 128), new(0)
    weights = new(2, 128, features), new(2, features, 128).mT
    groups = [Group(values, weight, new(4, 5, 64), new(5, 64, features)) for weight in weights]
    groups.append(Group(new(64, 1, features), none, none, none))
    head_space_scores.expand(groups, slice(64), features, dtype, tf32)


def captures(shape, dtype):
    """Calls the operators of one launch as models do, in every way that takes another number of registers."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = SHAPES[shape](2, dtype)
    points, tokens, features = x.shape
    rows = torch.zeros(tokens, dtype=torch.int64)
    normalise_rows.normalise_rows(x, 1e-5, False, None, None)
    # Only the shape and strides of out matter.
    normalise_rows.normalise_rows(x, 1e-5, True, rows, x if shape == "huge" else x.to(wide))
    # A projection's heads, a reader of the norm itself, and more points than one launch takes.
    for points, heads, gathered in ((5, 4, False), (5, 1, True), (300, 4, False)) if shape != "huge" else ():
        g = x[:1].expand(points, -1, -1)[..., : features // heads * heads].unflatten(-1, (heads, -1))
        r, c = torch.zeros(points, tokens, dtype=wide), torch.zeros(heads, points, tokens, dtype=wide)
        like = torch.zeros(g.shape[1:], dtype=wide)
        fixed = (None, like[0, 0]) if gathered else (like[0], None)
        collapse.collapse(g, g.to(wide) if gathered else g, r, r[:, 0], like, c, 64, gathered, rows, *fixed)


def main(capability, memory, shapes):
    triton.runtime.driver.set_active(NoDevice(capability))
    compiled = record()
    configs.memory = lambda device: memory
    seen = set()

    def say(**about):
        for name, kernel in compiled:
            if kernel.hash not in seen:
                told = {"kernel": name, **about, "narrow": narrow_strides(kernel), **resources(kernel)}
                sys.stdout.write(json.dumps(told) + "\n")
            seen.add(kernel.hash)
        compiled.clear()

    for kind, dtypes in DTYPES.items():
        torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
        for name, table in (("edge_scores", configs.EDGE_SCORES), ("masked_read", configs.MASKED_READ)):
            tiles = table[memory][kind]
            for tile, dtype, shape in itertools.product(tiles, dtypes, shapes):
                if shape == "odd" and tile != tiles[-1]:
                    continue
                table[memory][kind] = (tile,)
                calls(name, shape, dtype, kind == "tf32")
                say(dtype=str(dtype), kind=kind, shape=shape, tile=tile)
            table[memory][kind] = tiles
        for dtype, shape in itertools.product(dtypes, {"even", "odd"} & set(shapes)):
            expand({"even": 1024, "odd": 1001}[shape], dtype, kind == "tf32")
            say(dtype=str(dtype), kind=kind, shape=shape, tile=None)
        # fp16 and tf32 are bf16 and fp32 here.
        for dtype, shape in itertools.product(dtypes[:1] if kind != "tf32" else (), shapes):
            captures(shape, dtype)
            say(dtype=str(dtype), kind=kind, shape=shape, tile=None)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3].split(","))
