"""What a call changes, and how all of it is undone: hooks, modes, attributes, and state of torch and transformers.

Each change's undoing is noted before the change is made, and may be repeated. So wherever an interruption comes, every
change is undone: on exit of its own scope, or, where that very exit was interrupted, by the public call around it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial, wraps
from threading import get_ident
from time import sleep
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ..errors import InputError, expected

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
T = TypeVar("T")
# Of all threads, the latest last. There are no locks: one whose holder is interrupted as it lets go would stay locked.
_open: list[Changes] = []
_claims: list[Changes] = []
_shared: list[SharedChange] = []


class Changes:
    """Changes that are undone on exit, the latest first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self.hooked: set[nn.Module] = set()  # modules whose runs are changed
        self._thread = get_ident()
        self._parts: frozenset[int] = frozenset()

    def __enter__(self) -> Self:
        _open.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def note(self, undo: Callable[[], object]) -> None:
        """Note how to undo the next change on exit; `undo` may run twice, or when nothing was changed."""
        self._undo.append(undo)

    def keep_modes(self) -> None:
        """Leave this thread's grad mode and torch's stacks of modes on exit as they are now."""
        self.note_here(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
        stacks = _get_current_function_mode_stack(), torch._C._len_torch_dispatch_stack()
        self.note_here(partial(_restore_stacks, *stacks))

    def note_here(self, undo: Callable[[], object]) -> None:
        """The same for a change of this thread alone, which a process forked from another does not have."""
        thread = self._thread
        self.note(lambda: undo() if get_ident() == thread else None)

    def claim(self, model: nn.Module) -> None:
        """Keep other threads away from a model until exit, and from others that share a module or a weight with it.

        Raises:
            InputError: another thread has claimed it, or it is in the middle of a run that a call changes.
        """
        parts = [*model.modules()]
        if any(each._thread == self._thread and not each.hooked.isdisjoint(parts) for each in _open.copy()):
            found = f"one in the middle of another's run of this {type(model).__name__}, as from a hook on it"
            raise expected("model", "calls one after another, or a copy of the model for each", found)
        weights = (x for part in parts for x in part._parameters.values() if x is not None)
        self._parts = frozenset(map(id, (*parts, *weights)))
        _claims.append(self)  # of two that overlap, the later one sees the earlier
        for other in _claims.copy():
            if other is self:
                break
            if other._thread != self._thread and not self._parts.isdisjoint(other._parts):
                raise self._in_use(f"a call of another thread that is using this {type(model).__name__}")

    def refuse_other_threads(self, module: nn.Module) -> None:
        """Refuse a run of another thread, which would be changed, and mistaken for one of this call's."""
        # Backward passes on GPUs are in threads of torch's, where checkpointed modules run again.
        if get_ident() != self._thread and torch._C._current_graph_task_id() < 0:
            raise self._in_use(f"a run in another thread, of a {type(module).__name__} that a call is using")

    def _in_use(self, found: str) -> InputError:
        return expected("model", "one call at a time, or a copy of the model for each thread", found)

    def close(self) -> None:
        """Undo everything, also what comes after something that cannot be undone; does nothing the second time."""
        failed: Exception | None = None
        while self._undo:
            try:
                self._undo[-1]()
            except Exception as error:  # the user's own code may have changed the model meanwhile
                failed = failed or error
            self._undo.pop()
        for each in (_claims, _open):
            if self in each:
                each.remove(self)
        if failed is not None:
            raise failed


def _restore_stacks(functions: list[Any], operators: int) -> None:
    if _get_current_function_mode_stack() != functions:
        while torch._C._len_torch_function_stack():
            torch._C._pop_torch_function_stack()
        for mode in functions:
            torch._C._push_on_torch_function_stack(mode)
    while torch._C._len_torch_dispatch_stack() > operators:
        torch._C._pop_torch_dispatch_stack(None)


class FunctionMode(TorchFunctionMode):
    """A mode that can be left even after an interruption of torch's own dispatch, which takes modes off for a while."""

    def __exit__(self, *error: Any) -> None:
        if self in _get_current_function_mode_stack():
            super().__exit__(*error)


class SharedChange:
    """A change of what all threads share: made by its first user, undone after its last.

    Args:
        prepare: returns (make, undo), two functions without arguments, and changes nothing itself.
    """

    def __init__(self, prepare: Callable[[], tuple[Callable[[], object], Callable[[], object]]]) -> None:
        self._prepare = prepare
        self._held: dict[None, Changes] = {}  # by whom
        self._users: dict[Changes, int] = {}
        self._undo: Callable[[], object] | None = None
        _shared.append(self)

    def make(self, user: Changes) -> None:
        """Let it hold until this user's exit."""
        user.note(lambda: self._leave(user))
        self._hold(user)
        self._users[user] = get_ident()
        if self._undo is None:
            make, self._undo = self._prepare()
            make()
        self._release(user)

    def used_here(self) -> bool:
        """Is a user of this thread inside?"""
        return get_ident() in self._users.values()

    def _leave(self, user: Changes) -> None:
        self._hold(user)
        self._users.pop(user, None)
        if not self._users and self._undo is not None:
            self._undo()
            self._undo = None
        self._release(user)

    def _hold(self, user: Changes) -> None:
        while self._held.setdefault(None, user) is not user:
            sleep(1e-4)

    def _release(self, user: Changes) -> None:
        if self._held.get(None) is user:
            del self._held[None]

    def release_others(self) -> None:
        """Go on without threads that are no more."""
        if any(user._thread != get_ident() for user in self._held.values()):
            self._held.clear()


def _undo_of_others() -> None:
    """In a forked process only this thread is left: what the others' calls have changed is undone here."""
    for shared in _shared:
        shared.release_others()
    # Letting go of their modes would change this thread's.
    with torch.inference_mode(torch.is_inference_mode_enabled()), ExitStack() as ends:
        for changes in [each for each in _open.copy() if each._thread != get_ident()]:
            ends.callback(changes.close)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_undo_of_others)


def _end_what_hangs(error: BaseException | None) -> None:
    """End context managers that an interruption left halfway; they would live on as long as the error does."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__context__
    if not all(isinstance(each, Exception) for each in chain):
        for each in chain:
            traceback.clear_frames(each.__traceback__)


def gives_back(call: Callable[P, T]) -> Callable[P, T]:
    """`call`, which leaves none of its changes behind, even if undoing one of them was interrupted."""

    @wraps(call)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        before, around = list(_open), Changes()
        around.keep_modes()
        try:
            return call(*args, **kwargs)
        except BaseException as error:
            _end_what_hangs(error)
            raise
        finally:
            with ExitStack() as ends:  # the latest comes first, and all come, whatever one raises
                ends.callback(around.close)
                for changes in [x for x in list(_open) if x not in before and x._thread == get_ident()]:
                    ends.callback(changes.close)

    return made
