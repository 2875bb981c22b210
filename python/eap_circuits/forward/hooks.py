"""A model is borrowed: frozen, in eval mode, with our hooks; it comes back exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..adapters import SenderSite, as_given
from .grouped_attention import shared_keys


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Weights frozen and every module in eval mode inside; what was so before is so after, also after an error.

    Gradients can be computed inside whatever grad or inference mode the caller is in.
    """
    modes = [(module, module.training) for module in model.modules()]
    # By their names: accelerate puts others in the place of those that it offloads.
    named = [(part, name, x) for part in model.modules() for name, x in part._parameters.items()]
    frozen: list[tuple[Any, str, bool]] = [(part, name, x.requires_grad) for part, name, x in named if x is not None]
    try:
        for module, _ in modes:
            # In eval mode its layers round what they are given, or on a CPU pack their weights and give no gradients.
            module.training = type(module).__module__.startswith("bitsandbytes.")
        for part, name, _ in frozen:
            part._parameters[name].requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), shared_keys():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for part, name, requires_grad in frozen:
            part._parameters[name].requires_grad_(requires_grad)


class Hooks:
    """Hooks and attribute changes on modules, all undone on exit.

    Hooks see [B, T, X] also where a model flattens batch and positions before it calls the module, and inputs on the
    device on which the module computes.

    Args:
        tokens: T.
        select: what of [B, T, X] hooks see that only read.
    """

    def __init__(self, tokens: int, select: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        self._tokens = tokens
        self._select = select
        self._stack = ExitStack()

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def on_input(self, module: nn.Module, hook: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Call `hook(x)` with the module's first input; what it returns, if anything, takes its place."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                new = self._call(hook, as_given(module, args[0]))
                return None if new is None else ((new, *args[1:]), kwargs)
            new = self._call(hook, as_given(module, kwargs["hidden_states"]))
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        self._stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)

    def on_output(self, module: nn.Module, hook: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Call `hook(y)` with the module's (first) output; what it returns, if anything, takes its place."""

        def after(_: nn.Module, __: object, output: Any) -> Any:
            if isinstance(output, tuple):
                new = self._call(hook, output[0])
                return None if new is None else (new, *output[1:])
            return self._call(hook, output)

        self._stack.callback(module.register_forward_hook(after).remove)

    def on_senders(self, site: SenderSite, hook: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        """Call `hook(x)` with heads' values or an MLP's output; what it returns, if anything, takes their place."""
        if site.heads is not None:
            self.on_input(site.heads.out, hook)
        elif site.module is not None:
            self.on_output(site.module, hook)

    def _call(self, hook: Callable[[torch.Tensor], torch.Tensor | None], x: torch.Tensor) -> torch.Tensor | None:
        whole = x if x.dim() > 2 else x.unflatten(0, (x.shape[0] // self._tokens, self._tokens))
        if self._select is not None:
            return hook(self._select(whole))
        new = hook(whole)
        return new if new is None or x.dim() > 2 else new.flatten(0, 1)

    def set_attribute(self, module: nn.Module, name: str, value: object) -> None:
        """Give the module another value of a plain attribute until exit."""
        old = getattr(module, name)
        self._stack.callback(setattr, module, name, old)
        setattr(module, name, value)

    def on_result(self, module: nn.Module, hook: Callable[[Any], None]) -> None:
        """Call `hook(result)` with all that the module gives back, as it is."""
        self._stack.callback(module.register_forward_hook(lambda _, __, result: hook(result)).remove)

    def pass_through(self, module: nn.Module, result: object) -> None:
        """The module gives back its first input and computes nothing; `result` is what it gave back elsewhere."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            return (x, *[None] * (len(result) - 1)) if isinstance(result, tuple) else x

        self.replace_forward(module, forward)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let the module compute something else until exit; its hooks are called all the same."""
        # Set on the module itself, where a wrapper of its forward may stand already.
        own = vars(module).get("forward")
        self._stack.callback(lambda: delattr(module, "forward") if own is None else setattr(module, "forward", own))
        setattr(module, "forward", forward)  # noqa: B010 - mypy refuses the assignment
