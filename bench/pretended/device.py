"""One H100 that does not exist: `torch.cuda` answers as if it did, and tensors say cuda:0 (tensors.py).

    with pretending():                           # values are computed on the CPU
        model = model.to("cuda")
        scores = eap.attribute(model, data)      # operators on mixed devices raise, as on a GPU
    with pretending(shapes=True): ...            # nothing is computed: full-sized models in no time

Under `shapes`, floating tensors made on the device have a shape and no values, and so has everything that comes from
meta tensors; integers, bools and copies from the CPU keep their values. If the host asks for a value that is not there,
the answer is True or 1, and "no" to a question about NaN. Compilation and fake tensors do not work inside.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from bench.pretended import graphs
from bench.pretended.tensors import Dispatch, Functions, bases, expanded, state, tell, untold

NAME, MEMORY = "NVIDIA H100 80GB HBM3", 85_028_962_304


class _Properties:
    name, major, minor, total_memory, multi_processor_count = NAME, 9, 0, MEMORY, 132
    L2_cache_size, warp_size, max_threads_per_multi_processor = 50 << 20, 32, 2048
    shared_memory_per_multiprocessor, shared_memory_per_block_optin = 233472, 232448
    regs_per_multiprocessor, gcnArchName, uuid, is_integrated = 65536, "", "0", 0


class _Nothing:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.at = 0.0

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: Any) -> float:
        return max(1e-3, (other.at - self.at) * 1e3)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        tell("wait", "synchronize")


def _answers() -> dict[str, Any]:
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda d: None,
        "is_initialized": lambda: False,
        "get_device_capability": lambda d=None: (9, 0),
        "get_device_name": lambda d=None: NAME,
        "get_device_properties": lambda d=None: _Properties,
        "is_bf16_supported": lambda *a, **k: True,
        "mem_get_info": lambda d=None: (MEMORY - (1 << 30), MEMORY),
        "synchronize": lambda d=None: tell("wait", "synchronize"),
        "_lazy_init": lambda: None,
        **graphs.answers(),
    }
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        answers[name] = lambda d=None: 1 << 30
    for name in ("empty_cache", "reset_peak_memory_stats", "reset_max_memory_allocated", "ipc_collect"):
        answers[name] = lambda *a, **k: None
    for name in ("Event", "device", "device_of"):
        answers[name] = _Nothing
    return answers


@contextlib.contextmanager
def pretending(shapes: bool = False, native: bool = False) -> Iterator[None]:
    """Inside there is an H100.

    Args:
        shapes: nothing is computed; see the module.
        native: the package's CUDA kernels count as built, and as the fastest measured.
    """
    before = dict(state)
    state.update(shapes=shapes, guard=graphs.guard)
    with contextlib.ExitStack() as stack:
        for name, answer in _answers().items():
            if hasattr(torch.cuda, name):
                stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        # Nothing can be measured on it.
        stack.enter_context(mock.patch.dict(os.environ, EAP_TUNE="0"))
        _pretend_triton(stack)
        if native:
            _pretend_native(stack)
        if shapes:  # there is nothing to compare with what a table says
            stack.enter_context(mock.patch("eap_circuits.request.fits.fitting", lambda arch, _: arch))
        stack.enter_context(Functions())
        stack.enter_context(Dispatch())
        try:
            yield
        finally:
            state.update(before)
            bases.clear()


def _pretend_triton(stack: contextlib.ExitStack) -> None:
    """The reference stands for Triton's kernels; what is one launch whatever was measured counts as one."""
    from eap_kernels import _auto, triton
    from eap_kernels.reference import edge_scores, head_space_scores, masked_read

    def reads(*args: Any) -> torch.Tensor:
        return masked_read.masked_read(*args[:3])

    def expand(groups: Any, *args: Any, tf32: bool) -> torch.Tensor:
        with untold():
            out = head_space_scores.expanded(groups, *args)
        tell("op", expanded, [x for group in groups for x in group], None, out)
        return out

    stand_ins = [
        ("edge_scores", "edge_scores", edge_scores.edge_scores),
        ("head_space_scores", "expand", expand),
        ("masked_read", "masked_read", reads),
        *((name, name, getattr(torch.ops.eap_kernels, name).default) for name in _auto.ONE_LAUNCH),
    ]
    for file, name, stand_in in stand_ins if triton.INSTALLED else ():
        module = importlib.import_module(f"eap_kernels.triton.{file}")
        stack.enter_context(mock.patch.object(module, name, stand_in))


def _pretend_native(stack: contextlib.ExitStack) -> None:
    """The CPU's kernels stand for CUDA's: all around a kernel runs, but no kernel."""
    from eap_kernels import _auto, cuda

    stack.enter_context(mock.patch.object(cuda, "not_built", return_value=None))
    stack.enter_context(mock.patch.object(_auto, "ranking", return_value=["cuda"]))
    cuda.trial.cache_clear()
    stack.callback(cuda.trial.cache_clear)
