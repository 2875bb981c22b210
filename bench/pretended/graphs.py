"""CUDA graphs of the pretended device: what was captured is computed again, in the same memory, as one launch.

As on a real one, nothing runs while it is captured: tensors made then hold no values before the first replay, and what
was there before is left alone. An operator for which the host waits raises, and the capture is lost; so does one that
sends something to the device, which a real one would read again from memory that is no longer the host's. Conjugates of
complex numbers are not replayed right.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.pretended.tensors import Pretend, is_cuda, replayed, state, tell, tensors_of, written

_WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_unique2", "unique_dim", "unique_consecutive",
            "masked_select")  # fmt: skip
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_LOST = "operation failed due to a previous error during capture"
# Graphs whose memory has not been given back.
alive: weakref.WeakSet[CUDAGraph] = weakref.WeakSet()


def waits(name: str, args: Any, kwargs: Any) -> Iterator[str]:
    """Why the host waits for an operator, in a word or two each time."""
    if name in _WAITING:
        yield name
    if name in ("_to_copy", "copy_"):
        source, target = (args[1], args[0]) if name == "copy_" else (args[0], None)
        here = isinstance(source, Pretend)
        there = isinstance(target, Pretend) if name == "copy_" else _target(source, kwargs)
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if here != there and blocking and source.numel():
            yield "copy to the host" if here else "copy to the device"
    for index in indices(name, args):
        if not isinstance(index, Pretend):
            yield "index from the host"
        elif index.dtype == torch.bool:
            yield "index by a mask"


def indices(name: str, args: Any) -> list[Tensor]:
    return [x for x in args[1] if isinstance(x, Tensor)] if name in INDEXING else []


def _target(source: Tensor, kwargs: Any) -> bool:
    """Is what `_to_copy` makes on the device?"""
    device = kwargs.get("device")
    return isinstance(source, Pretend) if device is None else is_cuda(device)


class Tape:
    """What is captured."""

    def __init__(self) -> None:
        self.lost = False
        self._calls: list[tuple[Callable[[], Any], list[Tensor]]] = []
        self._made: dict[int, Tensor] = {}  # tensors by their memory, those that do not share another's
        self._before: dict[int, tuple[Any, Any]] = {}

    def forbid(self, why: str) -> None:
        self.lost = True
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({why})")

    def keep(self, written: list[Tensor]) -> None:
        """Before an operator writes into tensors."""
        for x in written:
            if not x.is_meta and _memory(x) not in self._made.keys() | self._before.keys():
                self._before[_memory(x)] = x.untyped_storage(), x.untyped_storage().clone()

    def record(self, call: Callable[[], Any], given: Iterable[Tensor], made: Any) -> None:
        """A call that has been made once, of tensors of the CPU, and what it gave."""
        tensors = tensors_of(made if isinstance(made, (list, tuple)) else [made])
        if not any(x.is_meta for x in (*given, *tensors)):
            self._calls.append((call, tensors))
            shared = {_memory(x) for x in given}
            self._made |= {_memory(x): x for x in tensors if _memory(x) not in shared}

    def end(self) -> None:
        """Nothing has run yet."""
        for x in self._made.values():
            x.fill_(float("nan") if x.is_floating_point() else 1)
        for storage, kept in self._before.values():
            storage.copy_(kept)

    def play(self) -> None:
        for call, made in self._calls:
            again = call()
            for x, y in zip(made, tensors_of(again if isinstance(again, (list, tuple)) else [again]), strict=True):
                if x.data_ptr() != y.data_ptr():
                    x.copy_(y)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class CUDAGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    begun = 0  # captures, of all graphs

    def __init__(self) -> None:
        self._tape: Tape | None = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if state["stream"] is None:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        CUDAGraph.begun += 1
        self._tape = state["tape"] = Tape()
        alive.add(self)

    def capture_end(self) -> None:
        tape, state["tape"] = state["tape"], None
        if tape.lost:
            raise RuntimeError(f"CUDA error: {_LOST}")
        tape.end()

    def replay(self) -> None:
        assert self._tape is not None and not self._tape.lost
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            self._tape.play()
        tell("op", replayed)

    def reset(self) -> None:
        self._tape = None
        alive.discard(self)


class graph:
    """Stands for `torch.cuda.graph`, which leaves its stream behind where a capture was lost."""

    def __init__(
        self, cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> None:
        self._graph, self._stream = cuda_graph, torch.cuda.stream(stream or torch.cuda.Stream())

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        self._stream.__enter__()
        self._graph.capture_begin()

    def __exit__(self, *error: Any) -> None:
        self._graph.capture_end()
        self._stream.__exit__(*error)


class Stream:
    """Stands for `torch.cuda.Stream`; of streams, only which is the current one is known."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = record_event = wait_stream

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        tell("wait", "synchronize")


_DEFAULT = Stream()


def current_stream(*_: Any) -> Stream:
    return state["stream"] or _DEFAULT


def set_stream(stream: Stream) -> None:
    state["stream"] = None if stream is _DEFAULT else stream


class on_stream:
    """Stands for `torch.cuda.stream`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = current_stream()
        set_stream(self._stream)

    def __exit__(self, *_: Any) -> None:
        set_stream(self._before)


def guard(func: Any, args: Any, kwargs: Any) -> None:
    """Before an operator on the device, or a wait with a word for it: what a capture and torch's own warnings need."""
    name = func if isinstance(func, str) else func._schema.name.split("::")[-1]
    why = [name] if isinstance(func, str) else list(waits(name, args, kwargs))
    tape = state["tape"]
    if tape is None:
        for _ in why if state["told of waits"] else ():
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return
    if why:
        tape.forbid(why[0])
    source = args[name == "copy_"] if name in ("_to_copy", "copy_") else None
    if source is not None and not isinstance(source, Pretend) and source.numel():
        tape.forbid("copy to the device")
    if not isinstance(func, str):
        tape.keep([x.held for x in written(func, args, kwargs) if isinstance(x, Pretend)])


def answers() -> dict[str, Any]:
    """What `torch.cuda` answers of streams and graphs."""
    return {
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "stream": on_stream,
        "set_stream": set_stream,
        "current_stream": current_stream,
        "default_stream": lambda *_: _DEFAULT,
        "is_current_stream_capturing": lambda: state["tape"] is not None,
        "get_sync_debug_mode": lambda: int(state["told of waits"]),
        "set_sync_debug_mode": lambda mode: state.update({"told of waits": mode in ("warn", 1)}),
    }
