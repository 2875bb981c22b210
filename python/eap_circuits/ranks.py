"""Processes that share the work of a call: with `modules/parts/` the only place that knows `torch.distributed`.

Inside an initialised process group every rank makes the same calls with the same arguments. Batches are dealt, and what
one rank finds all receive, in the order of the batches. So every rank adds up the same numbers in the same order as one
process would, for any data and any number of ranks. Without a process group, or with one rank, nothing here does
anything.

All that ranks say to each other is `exchange`, in which each hands in a value or an error. A rank that fails takes part
in the exchange that the others come to next; then all of them end.

Ranks that hold one model in parts are a team and run each pass together. If one fails in a pass, the others wait there
in torch until its process ends. So it leaves word in the process group's store, where they find why.
"""

from __future__ import annotations

import io
import math
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from itertools import groupby, islice
from typing import Any, ParamSpec, TypeVar

from .errors import InputError, out_of_memory, reason, warn

A = TypeVar("A")
P = ParamSpec("P")
T = TypeVar("T")

SECONDS_TO_TELL = 30.0  # how long a rank that failed waits for the others to hear why
SECONDS_IN_TEAM = 5.0  # the same inside a team, whose ranks fail together or wait in a pass for the one that failed
SECONDS_TO_CONNECT = 60.0  # how long ranks that have just met take to make their process group, at most
_SECONDS_UNTIL_SAID = 60.0  # how long a rank waits for others before it says so
_LONGEST_WAIT = timedelta(hours=2)
_calls: list[str] = []  # the public calls that are running, the outermost first
_agreed: dict[str, int] = {}  # what was agreed once for the outermost call
_team: list[bool] = []  # not empty if the outermost call's model is in parts
_WHY = "eap_circuits: why a rank has left"  # in the process group's store
_groups: dict[str, Any] = {}  # "world": the user's process group; "own": ours beside it; "lost": one that broke


@dataclass(frozen=True)
class Team:
    """The ranks that run each pass of a model together.

    Args:
        size: how many, one after another.
        in_step: every pass needs the other teams, too, which run one with the same parts of the model meanwhile.
    """

    size: int = 1
    in_step: bool = False


ALONE = Team()


def count() -> int:
    """How many ranks share the work; 1 without a process group."""
    # A process group takes torch, which this module does not load.
    dist = sys.modules.get("torch.distributed")
    return dist.get_world_size() if dist is not None and dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return sys.modules["torch.distributed"].get_rank() if count() > 1 else 0


def join() -> None:
    """Make the process group of a launcher, such as torchrun, if one has started this process."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys() or os.environ["WORLD_SIZE"] == "1":
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # Parts of a model on GPUs talk by nccl, which starts nothing before they do.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo")


def follows() -> bool:
    """Does rank 0 write what this rank would write: inside a call that ranks share?"""
    return bool(_calls) and rank() > 0


def exchange(value: Any = None) -> list[Any]:
    """What every rank hands in, in the order of ranks; tensors arrive on the CPU.

    Args:
        value: tensors and plain values, or lists, tuples and dicts of them.

    Raises:
        what a rank has told in place of a value, on all ranks; ConnectionError: one has ended.
    """
    return [value] if count() == 1 else _gather((None, _portable(value)))


def dealt(
    items: Iterable[A], run: Callable[[A], T], team: Team = ALONE, passes: Callable[[A], object] | None = None
) -> Iterator[tuple[A, T]]:
    """(item, `run(item)`) of all items, in order; teams of ranks run items side by side.

    Teams in step do so with neighbours that take the same passes. A team without one runs another's, too.

    Args:
        items: the same on all ranks.
        run: what it returns on the first rank of a team is exchanged.
        team: which ranks run an item together, as each has a part of the model.
        passes: equal for items that take the same passes; by default no two items do.
    """
    if count() == 1:
        for item in items:
            yield item, run(item)
        return
    number, place = divmod(rank(), team.size)
    for turn in _turns(items, team, passes):
        own = turn[number : number + 1]
        with _told():
            ran = [run(item) for item in own or turn[: int(team.in_step)]]
        found = [result for each in exchange(ran if own and place == 0 else []) for result in each]
        yield from zip(turn, found, strict=True)


def _turns(items: Iterable[A], team: Team, passes: Callable[[A], object] | None) -> Iterator[list[A]]:
    """The items that teams run side by side, one turn after another."""
    most = 1 if team.in_step and passes is None else count() // team.size
    for _, same in groupby(items, passes if team.in_step and passes else lambda _: None):
        while turn := list(islice(same, most)):
            yield turn


def form_team() -> None:
    """The call's model is in parts, and ranks run each pass together."""
    if _calls:
        _team.append(True)


def in_team() -> bool:
    """Is the call's model in parts, so that no rank can run anything by itself?"""
    return bool(_team)


def alike(run: Callable[[], T]) -> T:
    """`run()`, of which every rank keeps its own result; an error of one is an error of all, at this very place."""
    with _told():
        found = run()
    exchange()
    return found


def least(number: int) -> int:
    """The least of the ranks' numbers."""
    return min(exchange(number))


def least_share(name: str, free: Mapping[str, int]) -> int:
    """The least that a rank has of what is free, if ranks share places of their machine evenly.

    It is agreed once for a call: what is free changes all the time, and all ranks must go by one number.

    Args:
        name: of the number.
        free: bytes by place, such as a device.
    """
    if count() == 1:
        return min(free.values())
    if name not in _agreed:
        host = socket.gethostname()
        every = exchange({f"{host} {place}": size for place, size in free.items()})
        users = Counter(place for each in every for place in each)
        _agreed[name] = min(size // users[place] for each in every for place, size in each.items())
    return _agreed[name]


def together(call: Callable[P, T]) -> Callable[P, T]:
    """A public call that all ranks make: they leave it together, with a result or with an error."""

    @wraps(call)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        with one_call(call.__name__):
            return call(*args, **kwargs)

    return made


@contextmanager
def one_call(name: str) -> Iterator[None]:
    """Around what all ranks do; see `together`."""
    if _calls or count() == 1:
        yield
        return
    _calls.append(name)
    try:
        if "own" not in _groups:
            exchange()  # ranks meet before one of them can fail alone
        with _told():
            yield
        exchange()
    finally:
        _calls.clear()
        _agreed.clear()
        _team.clear()


@contextmanager
def _told() -> Iterator[None]:
    """An error inside is an error of all ranks in the exchange that they come to next."""
    try:
        yield
    except BaseException as error:
        _tell(error)
        raise


def _tell(error: BaseException) -> None:
    """Hand in an error where the others hand in values, unless they know it already.

    Raises:
        what another rank has told, if this error only says that it is gone from a pass.
    """
    if count() == 1 or any(getattr(each, "told", False) for each in _chain(error)):
        return
    kind = "memory" if out_of_memory(error) else ""
    kind = next((name for name, each in _kinds().items() if isinstance(error, each)), kind)
    kind = "lost" if is_lost(error) else kind
    plain = {"input": str(error), "interrupt": "interrupted"}
    said = plain.get(kind, f"{type(error).__name__}: {reason(error)}")
    _as_told(error)
    try:
        _gather(((kind, said), None), SECONDS_IN_TEAM if in_team() else SECONDS_TO_TELL)
    except ConnectionError as other:  # they wait in a pass until this process ends, or wait for one that has ended
        if in_team():
            _leave_word(kind, said, other)
    except Exception as other:  # else the error itself is what matters
        if kind == "lost":
            raise other from error


def _leave_word(kind: str, said: str, ended: ConnectionError) -> None:
    """Write down for the others why this rank leaves, or raise what another one has written."""
    from torch.distributed.distributed_c10d import _get_default_store

    words = ""
    with suppress(Exception):  # it may have ended with the process that kept it
        store = _get_default_store()
        if kind != "lost":
            store.set(_WHY, f"{kind} rank {rank()}: {said}")
        elif store.check([_WHY]):
            words = store.get(_WHY).decode()
    if kind == "lost":
        kind, _, said = words.partition(" ")
        raise _as_told(_kinds().get(kind, RuntimeError)(said)) if words else ended


def is_lost(error: BaseException) -> bool:
    """Does it say that another rank has left a pass?"""
    from torch.distributed import DistError

    return in_team() and (isinstance(error, DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)))


def _kinds() -> dict[str, type[BaseException]]:
    """Errors that are of the same kind on all ranks; any other is a RuntimeError on those that hear of it."""
    import torch

    return {"input": InputError, "memory": torch.OutOfMemoryError, "interrupt": KeyboardInterrupt}


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and those from which it was made."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _as_told(error: BaseException) -> BaseException:
    error.told = True  # type: ignore[attr-defined]
    return error


def _gather(own: tuple[tuple[str, str] | None, Any], patience: float = math.inf) -> list[Any]:
    """Every rank's value; raises another rank's error. This rank waits no longer than its patience, in seconds.

    A thread of its own does it, which Ctrl-C does not interrupt: half an exchange would be read in the next one.
    """
    import torch.distributed as dist

    arrived: list[tuple[tuple[str, str] | None, Any]] = []
    failed: list[BaseException] = []
    thread = threading.Thread(target=_run_gather, args=(own, arrived, failed), daemon=True)
    interrupted = _wait(thread, patience)
    errors = [(number, *told) for number, (told, _) in enumerate(arrived) if told is not None]
    errors.sort(key=lambda error: error[1] == "lost")
    if not arrived:
        _groups["lost"] = dist.group.WORLD
    if interrupted is not None:
        raise _as_told(interrupted) if errors or not arrived else interrupted
    if not arrived:
        wanted = f"rank {rank()}: expected all {count()} ranks to go on, found that one has ended or does not answer"
        why = f" ({reason(failed[0])})" if failed else ""
        raise _as_told(ConnectionError(f"{wanted}{why}."))
    if errors:
        number, kind, said = errors[0]
        raise _as_told(_kinds().get(kind, RuntimeError)(f"rank {number}: {said}"))
    return [value for _, value in arrived]


def _wait(thread: threading.Thread, patience: float) -> BaseException | None:
    """Run a thread until it ends or patience does; after an interruption, which is returned, only a little longer."""
    try:
        thread.start()
        _join(thread, patience)
    except BaseException as error:
        interrupted = error
    else:
        return None
    _join(thread, SECONDS_TO_TELL)
    return interrupted


def _join(thread: threading.Thread, seconds: float) -> None:
    thread.join(min(seconds, _SECONDS_UNTIL_SAID))
    if thread.is_alive() and seconds > _SECONDS_UNTIL_SAID:
        warn(
            f"{_calls[0] if _calls else 'exchange'}: rank {rank()} has waited for others for a minute; inside a "
            "process group every rank must make the same calls."
        )
        thread.join(min(seconds - _SECONDS_UNTIL_SAID, threading.TIMEOUT_MAX))


def _run_gather(own: Any, arrived: list[Any], failed: list[BaseException]) -> None:
    import torch
    import torch.distributed as dist

    try:
        group, buffer = _own_group(), io.BytesIO()
        torch.save(own, buffer)
        sent = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(count())]
        dist.all_gather(sizes, torch.tensor([len(sent)]), group)
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(sent)] = sent
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group)
        whole = (part[: int(size)].numpy() for part, size in zip(parts, sizes, strict=True))
        arrived += [torch.load(io.BytesIO(part.tobytes()), weights_only=True) for part in whole]
    except BaseException as error:
        failed.append(error)


def _own_group() -> Any:
    """Our own process group, of the user's ranks, in which tensors of CPUs are sent whatever the user's can send."""
    import torch
    import torch.distributed as dist

    world = dist.group.WORLD
    if _groups.get("lost") is world:
        raise ConnectionError("a rank ended before")
    if _groups.get("world") is not world:
        patience = _LONGEST_WAIT
        if torch.device("cpu") in getattr(world, "_device_types", ()):
            dist.all_reduce(torch.zeros(1))  # where a rank has ended this fails, and a new group would wait for it
            patience = timedelta(seconds=SECONDS_TO_CONNECT)  # as one may end now
        own = dist.new_group(backend="gloo", timeout=patience)
        dist.distributed_c10d._set_pg_timeout(_LONGEST_WAIT, own)
        _groups.update(world=world, own=own)
    return _groups["own"]


def _portable(value: Any) -> Any:
    """The same on the CPU, without what else is in tensors' storages."""
    from torch import Tensor, contiguous_format

    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=contiguous_format)
    if isinstance(value, dict):
        return {name: _portable(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_portable, value))
    return value
