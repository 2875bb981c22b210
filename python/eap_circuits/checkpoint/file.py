"""What a long call has done so far, in a file from which the same call goes on.

A call keeps its sums and the examples that are finished. Both are added up batch by batch and written together, so what
is read is always of whole batches, and files of different examples can be merged by addition.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapters import is_in_parts
from ..errors import InputError, expected, warn
from ..files import CHECKSUM, DAMAGED, check_digest, check_writable, digest, write_whole
from ..forward import Batch, some_of
from ..ranks import alike, count, exchange, follows, least, rank
from ..tasks import PairedDataset
from .identity import model_identity
from .weights import weights_sample

_FORMAT = "eap-circuits/checkpoint-1"
_PART = "part/"
_SHOWN = 3  # differences in an error message
SECONDS_BETWEEN_SAVES = 1.0
SHARE_OF_TIME = 0.05  # that goes into saving: what takes long to write is written less often


class _File:
    """The tensors of a call and of its current part, by name, and what these calls are asked."""

    def __init__(self, path: Path | None, calls: dict[str, Any]) -> None:
        self.path, self.calls = path, calls
        self.tensors: dict[str, Tensor] = {}
        self.whole, self._changed = True, False
        self._next = -float("inf")
        if path is not None:
            alike(lambda: None if rank() or not path.exists() else self._read(path))
            self.calls, self.tensors = exchange((self.calls, self.tensors))[0]

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                found, calls = metadata.get("format"), json.loads(metadata.get("calls", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()} if found == _FORMAT else {}  # noqa: SIM118
            if found == _FORMAT:
                check_digest(metadata.get(CHECKSUM), {}, tensors)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except DAMAGED as error:
            raise expected(str(path), "a checkpoint", f"a file that cannot be read ({error})") from error
        wanted = "a checkpoint of this model, data and request"
        if found != _FORMAT or not isinstance(calls, dict):
            raise expected(str(path), wanted, f"another file ({found or 'no format'})")
        if differences := list(_differences(calls.get(""), self.calls[""])):
            more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise expected(str(path), wanted, f"another {', '.join(differences[:_SHOWN])}{more}")
        self.calls, self.tensors = calls, tensors

    def save(self) -> None:
        """Note a change, and write the file if enough time has passed."""
        self._changed = True
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write what has changed."""
        if self.path is None or not self._changed or not self.whole or follows():
            return
        began = time.monotonic()
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.tensors.items()}
        metadata = {"format": _FORMAT, "calls": json.dumps(self.calls), CHECKSUM: digest({}, tensors)}
        write_whole(self.path, lambda file: save_file(tensors, file, metadata=metadata))
        self._changed = False
        ended = time.monotonic()
        self._next = ended + max(SECONDS_BETWEEN_SAVES, (ended - began) / SHARE_OF_TIME)


class Checkpoint:
    """What a call has done so far. `opened` makes it; without a path nothing is written."""

    def __init__(self, file: _File, prefix: str = "") -> None:
        self._file, self._prefix = file, prefix

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill these tensors with what the file has of them; from now on they are what is saved."""
        for name, x in tensors.items():
            found = self._file.tensors.get(self._prefix + name)
            if found is not None:
                if found.shape != x.shape or found.dtype != x.dtype:
                    wanted, got = (f"{each.dtype} {list(each.shape)}" for each in (x, found))
                    raise expected(f"{self._file.path}, {name}", wanted, got)
                x.detach().copy_(found)
            self._file.tensors[self._prefix + name] = x

    def tokens(self, fitting: int, of: str = "tokens") -> int:
        """The tokens of a pass, or of a batch: as many as before the interruption, so that batches and bits are the
        same, if as many still fit; as the rank on which the fewest fit has."""
        fitting = least(fitting)
        kept = torch.tensor(fitting)
        self.keep({of: kept})
        return int(kept.clamp_(max=fitting))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around changes that belong together, such as adding a batch: half of them is never written; saved after."""
        self._file.whole = False
        yield
        self._file.whole = True
        self.save()

    def save(self) -> None:
        """Called after every change: writes the file, at most once a second."""
        self._file.save()

    def named(self, name: str) -> Checkpoint:
        """The checkpoint of one of several calls inside this one; what the others have kept stays."""
        return Checkpoint(self._file, f"{self._prefix}{name}/")

    def part(self, call: Any) -> Checkpoint:
        """That of a call inside this one; what another part has kept is forgotten."""
        prefix = self._prefix + _PART
        call = json.loads(json.dumps(call))
        if self._file.calls.get(prefix) != call:
            for held in (self._file.tensors, self._file.calls):
                for name in [name for name in held if name.startswith(prefix)]:
                    del held[name]
            self._file.calls[prefix] = call
        return Checkpoint(self._file, prefix)


Where = str | os.PathLike[str] | Checkpoint | None  # a file, a checkpoint that this call is part of, or none


@contextmanager
def opened(where: Where, model: nn.Module, settings: Callable[[], dict[str, Any]]) -> Iterator[Checkpoint]:
    """The checkpoint of a call; it is written on the way out too, also after an error, Ctrl-C or SIGTERM.

    Args:
        where: a `.safetensors` file.
        model: what the call runs.
        settings: what else it was asked; called only if there is a checkpoint.

    Raises:
        InputError: the file is of another call, damaged, or cannot be written.
    """
    _refuse_other_calls(model, settings)
    if isinstance(where, Checkpoint):
        yield where.part(settings()) if where._file.path is not None else Checkpoint(_File(None, {}))
        return
    if where is None:
        yield Checkpoint(_File(None, {}))
        return
    path = check_writable(where)
    if path.suffix != ".safetensors":
        raise expected("checkpoint", "a name ending in .safetensors", repr(path.name))
    # Rank 0 reads and writes the file; weights in parts are read by all ranks together.
    call = {**settings(), **model_identity(model)} if not follows() or is_in_parts(model) else None
    file = _File(path, {"": json.loads(json.dumps(call))})
    with _termination_raised():
        try:
            yield Checkpoint(file)
        except BaseException:
            try:
                file.write()
            except InputError as error:  # the first error is what matters
                warn(f"What was done last is not in the checkpoint. {error}")
            raise
        file.write()


def remaining(
    data: PairedDataset, batches: Iterable[Batch], finished: Tensor, begun: Tensor | None = None
) -> Iterator[Batch]:
    """What is left of the batches.

    Args:
        finished: bool [E], the examples that are done; looked at before each batch.
        begun: bool [E], the examples of a batch that was begun, which comes by itself.
    """
    for batch in batches:
        left = ~finished[batch.index]
        apart = torch.zeros_like(left) if begun is None else begun[batch.index]
        for which in (left & apart, left & ~apart):
            if which.all():
                yield batch
            elif which.any():
                yield some_of(data, batch, which.nonzero()[:, 0])


def _refuse_other_calls(model: nn.Module, settings: Callable[[], dict[str, Any]]) -> None:
    """Refuse what is not the same call on all ranks, as each would contribute to the others' results."""
    if count() == 1:
        return
    call: dict[str, Any] = {"weights": weights_sample(model)}
    with suppress(InputError):  # what cannot be read cannot be compared
        call |= settings()
    calls = [json.loads(text) for text in exchange(json.dumps(call))]
    for number, other in enumerate(calls):
        if differences := list(_differences(other, calls[0])):
            found = f"another {', '.join(differences[:_SHOWN])} on rank {number}"
            raise expected("ranks", "the same call on all", found)


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """The names of what differs, with both values where they are short."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for index, both in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(*both, f"{name}[{index}]")
    elif json.dumps(found) != json.dumps(wanted):
        short = all(isinstance(x, (bool, int, float, str, type(None))) and len(str(x)) < 30 for x in (found, wanted))
        yield f"{name} ({found!r}, here {wanted!r})" if short else name


class _Terminated(BaseException):
    pass


@contextmanager
def _termination_raised() -> Iterator[None]:
    """SIGTERM, which would end the process at once, raises inside; then it ends the process as it would have."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    asked = []

    def terminate(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows is the way out
        raise _Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if asked or signal.getsignal(signal.SIGTERM) is terminate:  # else the user's own code has put another there
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if asked:  # though the user's own code may have caught what was raised
            os.kill(os.getpid(), signal.SIGTERM)
