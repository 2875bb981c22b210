"""`python -m eap_kernels.info`: versions, backends, and why something is missing."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

import eap_kernels
from eap_kernels import _native


def processor() -> str:
    """The processor's name if the system tells it, else its architecture."""
    listed = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", listed.read_text() if listed.is_file() else "", re.MULTILINE)
    return names[0] if names else platform.machine()


def facts() -> dict[str, str]:
    """What this installation can do, as pairs to print."""
    lines = {
        "eap-kernels": eap_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }
    for backend, reason in eap_kernels.backends().items():
        lines[f"backend {backend}"] = "available" if reason is None else f"missing: {reason}"
    build = _native.build_info()
    if build is None:
        lines["native build"] = "no description for this Python version"
    else:
        lines["compiler"] = build.compiler
        lines["instruction sets"] = ", ".join(build.instruction_sets)
        lines["instruction set in use"] = build.instruction_set()
        lines["cuda architectures"] = ", ".join(build.cuda_architectures) or f"none: {build.cuda_failure}"
    return lines


def main() -> None:
    lines = facts()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
