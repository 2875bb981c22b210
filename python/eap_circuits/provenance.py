"""Where a result came from: what ran, on which model and prompts, when, and in which versions."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from datetime import datetime, timezone
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .request import Request

# The command that a call belongs to, where it came from the command line.
COMMAND: ContextVar[str | None] = ContextVar("command", default=None)
_UNSAID = ("progress",)


def provenance(request: Request, call: str, operator: str) -> dict[str, Any]:
    """What is known of a run as it starts, as plain JSON values.

    Args:
        request: what is run.
        call: the call, as `called` writes it.
        operator: what `eap_kernels.explain` says of the operator that the run will spend its time in, or "none: " and
            what computes without one.
    """
    from .checkpoint import data_identity, model_name, weights_digest
    from .files import digest

    model: Any = request.arch.model
    data = request.data
    prompts = None if data.prompts is None else digest({"prompts": data.prompts})
    return {
        "data": data.name,
        "n_examples": len(data),
        "seed": data.seed,
        "data_sha256": digest({"data": data_identity(data)}),
        "prompts_sha256": prompts,
        "model": model_name(model),
        "revision": getattr(model.config, "_commit_hash", None),
        "weights_sha256": weights_digest(model),
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "call": COMMAND.get() or call,
        "device": str(request.arch.device),
        "backend": operator,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions that run here."""
    import torch
    import transformers

    import eap_kernels

    found = {
        "eap-kernels": eap_kernels.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {**found, "python": platform.python_version()}


def called(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    """A call as one would write it, without what is left at its default: `attribute(model=…, method='eap')`."""
    parameters = inspect.signature(function).parameters
    given = {name: arguments[name] for name in parameters if name in arguments and name not in _UNSAID}
    said = [f"{name}={_said(value)}" for name, value in given.items() if not _same(value, parameters[name].default)]
    return f"{function.__name__}({', '.join(said)})"


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and isinstance(value, (str, int, float, tuple, type(None))) and value == default


def _said(value: Any) -> str:
    if isinstance(value, (str, PurePath)):
        return repr(without_folder(str(value)))
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= 20:
        return f"[{', '.join(map(_said, value))}]"
    return type(value).__name__


def command(arguments: list[str]) -> str:
    """A command as it was typed, without the folders of its files."""
    import shlex

    return shlex.join(["eap", *("=".join(map(without_folder, each.split("=", 1))) for each in arguments)])


def without_folder(name: str) -> str:
    """A path's last part, as results are passed on and must not reveal folders; names on the hub stay whole."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(name).is_absolute():
            return kind(name).name
    return name
