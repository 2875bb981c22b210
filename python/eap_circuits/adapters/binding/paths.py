"""What a table says of a model: the modules at its paths, and the values of its configuration."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import expected
from ...families import Factor, Paths


def factor(model: Any, said: Factor | None) -> float:
    """A number, the configuration field that holds it, or a function of the model; without any it is 1."""
    if said is None:
        return 1.0
    return float(getattr(model.config, said) if isinstance(said, str) else said(model) if callable(said) else said)


def configured(config: Any, name: str, default: object = None) -> Any:
    """What a configuration says, or that of its language model."""
    text = getattr(config, "get_text_config", None)
    return getattr(config if hasattr(config, name) or text is None else text(), name, default)


def maybe(root: nn.Module, path: str | None) -> nn.Module | None:
    try:
        return None if path is None else root.get_submodule(path)
    except AttributeError:
        return None


def site(root: nn.Module, paths: Paths) -> nn.Module:
    paths = (paths,) if isinstance(paths, str) else paths
    for path in paths:
        module = maybe(root, path)
        if module is not None:
            return module
    raise expected(type(root).__name__, f"a module at {' or '.join(map(repr, paths))}", "none there")


def linear_at(root: nn.Module, path: str) -> Any:
    module = site(root, path)
    # Adapters and quantised layers are not always nn.Linear, but they have in_features and out_features.
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not isinstance(module, Conv1D) and not all(isinstance(size, int) for size in sizes):
        raise expected(f"{type(root).__name__}.{path}", "a linear layer", type(module).__name__)
    return module
