"""`python -m eap_kernels.info`: versions, backends, and why something is missing."""

from __future__ import annotations

import os
import platform
import sys

import torch

import eap_kernels
from eap_kernels import _auto, _native
from eap_kernels.tune import choices
from eap_kernels.tune.choices import cache_folder as cache_folder
from eap_kernels.tune.choices import instruction_set as instruction_set
from eap_kernels.tune.choices import processor as processor


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
        lines["native build"] = "not described"
    else:
        lines["compiler"] = build.compiler
        lines["instruction sets"] = ", ".join(build.instruction_sets)
        lines["instruction set in use"] = instruction_set()
        lines["cuda architectures"] = ", ".join(build.cuda_architectures) or f"none: {build.cuda_failure}"
    return lines | _choices()


def _choices() -> dict[str, str]:
    """What `auto` takes on each kind of device here, as far as it was measured on this machine."""
    lines: dict[str, str] = {}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in [torch.device("cuda", index) for index in range(count)] + [torch.device("cpu")]:
        name = choices.name_of(device)
        told = [_auto.told(device, arithmetic) for arithmetic in choices.ARITHMETICS[device.type]]
        lines |= {f"{name}, {what}": line for each in told for what, line in each.items()}
        if device.type == "cuda" and not any(told):
            lines[f"{name}, auto"] = "not measured yet; a first call does it, or `python -m eap_kernels.tune`"
    return lines


def show(line: str) -> None:
    """Print a line at once. Where nobody reads on, as behind `| head`, the process ends without a word."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python writes what is left
        sys.exit(1)


def main() -> None:
    lines = facts()
    width = max(map(len, lines))
    for name, value in lines.items():
        show(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
