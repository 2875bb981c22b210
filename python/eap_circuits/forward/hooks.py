"""A model is borrowed: frozen, in eval mode, with our hooks; it comes back exactly as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters import Place, SenderSite, Together, as_given, foreign_hooks
from ..errors import expected
from ..modules.loans import Changes, SharedChange
from .layers.grouped_attention import SHARED_KEYS

if TYPE_CHECKING:
    from typing_extensions import Self

_Hook = Callable[[torch.Tensor], torch.Tensor | None]


def _without_compiler() -> tuple[Callable[[], object], Callable[[], object]]:
    """Compiled code knows nothing of hooks that come later; under this stance it runs uncompiled."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:  # nothing has been compiled
        return (lambda: None), (lambda: None)
    return partial(torch.compiler.set_stance, "force_eager"), partial(setattr, dynamo, "_stance", dynamo._stance)


_UNCOMPILED = SharedChange(_without_compiler)
# By thread, each where hooks of others begin that are running now.
_running: dict[int, list[Mark]] = {}


def _amid_others() -> bool:
    """Is this a run by a hook of others, as of a norm and the head by a logit lens, and so no part of ours?"""
    return bool(_running.get(get_ident()))


class Mark:
    """A hook before all hooks of others on a module or, with the one `before` them, behind them."""

    def __init__(self, before: Mark | None = None) -> None:
        self._before = before

    def __call__(self, *_: object) -> None:
        running = _running.setdefault(get_ident(), [])
        if self._before is None:
            running.append(self)
        while self._before is not None and running and running.pop() is not self._before:
            pass  # of hooks that raised


class borrowed(Changes):
    """Weights frozen and every module in eval mode inside; what was so before is so after, also after an error.

    Gradients are computed inside, whatever grad or inference mode the caller is in. Grad mode, inference mode, and
    torch's stacks of modes are afterwards what they were.

    Raises:
        InputError: on entry, if another thread has borrowed the model or a part of it, or under autocast.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._take()
        except BaseException:
            self.close()
            raise
        return self

    def _take(self) -> None:
        self.claim(self._model)
        self._mark()
        modes = [(module, module.training) for module in self._model.modules()]
        # By their names: accelerate puts others in the place of those that it offloads.
        named = [(part, name, x) for part, _ in modes for name, x in part._parameters.items() if x is not None]
        for device in {x.device.type for *_, x in named} - {"meta"}:
            refuse_autocast(device)
        flags = [(part, name, x.requires_grad) for part, name, x in named]
        self.note(partial(_restore, modes, flags))
        # Pruning and weight norms put a new weight there in each run.
        for part, _ in modes:
            made = {name: x for name, x in vars(part).items() if isinstance(x, torch.Tensor)}
            if made:
                self.note(partial(vars(part).update, made))
        SHARED_KEYS.make(self)
        _UNCOMPILED.make(self)
        self.keep_modes()
        outside = torch._C._InferenceMode(False)
        self.note_here(partial(outside.__exit__, None, None, None))
        for module, _ in modes:
            # In eval mode its layers round what they are given, or on a CPU pack their weights and give no gradients.
            module.training = type(module).__module__.startswith("bitsandbytes.")
            weight: Any = module._parameters.get("weight")
            if module.training and getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
                state = weight.quant_state
                self.note(partial(_pack, weight, weight.data, state, dict(vars(state))))
                with suppress(AssertionError):  # at some widths it cannot
                    module.state_dict()  # which unpacks what a run of the user's has packed
        _restore([], [(part, name, False) for part, name, _ in flags])
        outside.__enter__()
        torch.set_grad_enabled(True)

    def _mark(self) -> None:
        """Let it be known where hooks of others run."""
        for module in self._model.modules():
            for kind, register in (
                ("_forward_pre_hooks", module.register_forward_pre_hook),
                ("_forward_hooks", module.register_forward_hook),
            ):
                if foreign_hooks(module, (kind,)):
                    before = Mark()
                    behind = Mark(before)
                    for mark in (before, behind):
                        self.note(partial(unhook, module, mark))
                        register(mark, prepend=mark is before)


def _pack(weight: Any, packed: torch.Tensor, state: Any, said: dict[str, Any]) -> None:
    weight.data, weight.quant_state = packed, state
    vars(state).update(said)


def refuse_autocast(device: str) -> None:
    """Refuse what computes in other dtypes than the weights'."""
    if torch.is_autocast_enabled(device):
        wanted = "off (a model that is to compute in half precision is loaded in that dtype)"
        raise expected("torch.autocast", wanted, f"on for the device type {device!r}")


def _restore(modes: list[tuple[nn.Module, bool]], flags: list[tuple[nn.Module, str, bool]]) -> None:
    for module, training in modes:
        module.training = training
    for part, name, requires_grad in flags:
        found = part._parameters.get(name)
        if found is not None:  # else the user's own code has removed it meanwhile
            found.requires_grad_(requires_grad)


class Hooks(Changes):
    """Hooks and attribute changes on modules, all undone on exit.

    Hooks see [B, T, X] even if a model flattens batch and positions before it calls the module, and inputs on the
    device on which the module computes. What hooks of others run of the model they leave alone.

    Args:
        tokens: T.
        select: the part of [B, T, X] that hooks see; they can only read then.
    """

    def __init__(self, tokens: int, select: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self._tokens = tokens
        self._select = select

    def __enter__(self) -> Self:
        super().__enter__()
        running = _running.setdefault(get_ident(), [])
        self.note_here(partial(running.__setitem__, slice(None), [*running]))
        running.clear()  # of hooks that raised, or whose own call this is
        return self

    def on_input(self, module: nn.Module, hook: _Hook, first: bool = False) -> None:
        """Call `hook(x)` with the module's first input; what it returns, if anything, takes its place.

        `first`: before the hooks that are there.
        """
        if isinstance(module, Place):
            return self._on_place(module, hook)
        if isinstance(module, Together):
            return self._on_shared(module.parts, hook)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.refuse_other_threads(module)
            if _amid_others():
                return None
            if args:
                new = self._call(hook, as_given(module, args[0]))
                return None if new is None else ((new, *args[1:]), kwargs)
            new = self._call(hook, as_given(module, kwargs["hidden_states"]))
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        self.hooked.add(module)
        self.note(partial(unhook, module, before))
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=first)

    def on_argument(self, module: nn.Module, name: str, hook: Callable[[Any], object]) -> None:
        """Call `hook` with what the module gets by this keyword; None if nothing."""

        def before(_: nn.Module, __: object, kwargs: dict[str, Any]) -> None:
            hook(kwargs.get(name))

        self.note(partial(unhook, module, before))
        module.register_forward_pre_hook(before, with_kwargs=True)

    def on_output(self, module: nn.Module, hook: _Hook, first: bool = False) -> None:
        """Call `hook(y)` with the module's (first) output; what it returns, if anything, takes its place.

        `first`: before the hooks that are there.
        """
        if isinstance(module, Place):
            return self._on_place(module, hook)
        if isinstance(module, Together):
            return self._on_sum(module.parts, hook)

        def after(output: Any) -> Any:
            if isinstance(output, (tuple, list)):
                new = self._call(hook, output[0])
                return None if new is None else (new, *output[1:])
            return self._call(hook, output)

        self.on_result(module, after, first)

    def _on_place(self, place: Place, hook: _Hook) -> None:
        (self.on_input if place.reads else self.on_output)(place.at, hook)

    def _on_shared(self, parts: Sequence[nn.Module], hook: _Hook) -> None:
        """Call `hook` with what the first one reads; what it returns, if anything, all others read, too."""
        given: list[torch.Tensor | None] = []

        def begin(x: torch.Tensor) -> torch.Tensor | None:
            given[:] = [hook(x)]
            return given[0]

        self.on_input(parts[0], begin)
        for part in parts[1:]:
            self.on_input(part, lambda _: given[0])

    def _on_sum(self, parts: Sequence[nn.Module], hook: _Hook) -> None:
        """Call `hook` with the sum of outputs; what it returns comes out of the last part, and zeros of the others."""
        seen: list[torch.Tensor] = []
        reading = self._select is not None

        def put(result: Any, y: torch.Tensor) -> Any:
            return None if reading else (y, *result[1:]) if isinstance(result, tuple) else y

        def keep(result: Any) -> Any:
            seen.append(result[0] if isinstance(result, tuple) else result)
            # One row, as the hook may give the sum another number of rows.
            return put(result, seen[-1].new_zeros([1] * (seen[-1].dim() - 1) + [seen[-1].shape[-1]]))

        def add(result: Any) -> Any:
            both = sum(seen, result[0] if isinstance(result, tuple) else result)
            seen.clear()
            new = self._call(hook, both)
            return put(result, both if new is None else new)

        for part in parts[:-1]:
            self.on_result(part, keep)
        self.on_result(parts[-1], add)

    def on_result(self, module: nn.Module, hook: Callable[[Any], Any], first: bool = False) -> None:
        """Call `hook(result)` with all that the module returns; what it returns, if anything, takes its place."""

        def after(_: nn.Module, __: object, result: Any) -> Any:
            self.refuse_other_threads(module)
            return None if _amid_others() else hook(result)

        self.hooked.add(module)
        self.note(partial(unhook, module, after))
        module.register_forward_hook(after, prepend=first)

    def on_senders(self, site: SenderSite, hook: _Hook) -> None:
        """Call `hook(x)` with heads' values or an MLP's output; what it returns, if anything, takes their place."""
        if site.heads is not None:
            self.on_input(site.heads.out, hook)
        elif site.module is not None:
            self.on_output(site.module, hook)

    def _call(self, hook: _Hook, x: torch.Tensor) -> torch.Tensor | None:
        whole = x if x.dim() > 2 else x.unflatten(0, (x.shape[0] // self._tokens, self._tokens))
        if self._select is not None:
            return hook(self._select(whole))
        new = hook(whole)
        return new if new is None or x.dim() > 2 else new.flatten(0, 1)

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Give the module another value of a plain attribute until exit."""
        self.note(partial(setattr, module, name, getattr(module, name)))
        setattr(module, name, value)

    def pass_through(self, module: nn.Module, others: tuple[object, ...] | None) -> None:
        """The module computes nothing and returns its first input, and beside it `others`; None: no tuple."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            return x if others is None else (x, *others)

        self.replace_forward(module, forward)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let the module compute something else until exit; its hooks are called all the same."""
        # Set on the module itself, where a wrapper may have put a forward of its own already.
        own = vars(module).get("forward")
        self.note(
            partial(vars(module).pop, "forward", None) if own is None else partial(setattr, module, "forward", own)
        )
        theirs = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            return (theirs if _amid_others() else forward)(*args, **kwargs)

        run.__wrapped__ = forward  # type: ignore[attr-defined]  # for those who ask for its arguments
        setattr(module, "forward", run)  # noqa: B010 - mypy refuses the assignment


def unhook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Remove a hook by itself: its handle would not be there yet if registering it was interrupted."""
    for hooks, flags in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for key in [key for key, found in hooks.items() if found is hook]:
            for each in (*flags, hooks):
                each.pop(key, None)
