"""Every operator on small odd shapes by the named backends, for compute-sanitizer in `make gpu`.

python bench/sanitize.py triton cuda
python bench/sanitize.py triton --few    # the first shape in the first layout
"""

from __future__ import annotations

import os
import sys

# Out-of-bounds accesses show only if each tensor is its own allocation. Torch reads this when it is loaded.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

import eap_kernels as ek
from eap_kernels._registry import BACKENDS
from eap_kernels.testing.odd_shapes import CHECKS, SHAPES
from eap_kernels.testing.shapes import LAYOUTS

ARITHMETICS = ("float32", "tf32", "bfloat16", "float64")


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    few = "--few" in sys.argv
    for impl in (word for word in sys.argv[1:] if word != "--few"):
        reason = ek.backends()[impl]
        if reason is not None:
            sys.exit(f"{impl}: {reason}")
        for op, check in CHECKS.items():
            cases = [
                (shape, arithmetic, layout)
                for shape in (SHAPES[:1] if few else SHAPES)
                for arithmetic in ARITHMETICS
                for layout in (LAYOUTS[:1] if few else LAYOUTS)
            ]
            for case in cases:
                check(impl, BACKENDS[impl].device or "cpu", *case, generator)
            print(f"{impl} {op}: {len(cases)} runs", flush=True)


if __name__ == "__main__":
    main()
