"""What two calls must have in common for one to go on where the other stopped, in plain JSON values.

Everything that changes a number: weights and buffers, what modules compute with them, hooks, data, metric, settings and
versions. Not what only cuts the work: batch size, memory, prefix reuse, devices and threads.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from importlib import metadata
from types import FunctionType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..adapters import KINDS, foreign_hooks
from ..forward import Constants
from ..graph import Circuit
from ..metrics import METRICS, Metric
from ..request import Request
from ..tasks import PairedDataset
from .digest import tensor_digest
from .fingerprint import Reader, is_installed
from .weights import weight_digests

_CUTS = {"arch", "constants", "batch_size", "memory", "reuse_prefix"}
_PLAIN = (type(None), bool, int, float, str)
# Of a configuration, where it came from and how it was saved.
_ORIGIN = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "_commit_hash"}
# Of a module, what Hugging Face libraries note there, and what is compared elsewhere or restored after every run.
_NOTES = {
    "name_or_path",
    "warnings_issued",
    "hf_device_map",
    "gradient_checkpointing",
    "all_tied_weights_keys",
    "peft_config",
}
_PACKAGES = ("accelerate", "bitsandbytes", "peft", "transformers")
_TORCHS = {*vars(nn.Module()), "_compiled_call_impl"}
# Of a module whose weights and inputs accelerate moves.
_ACCELERATES = {"_hf_hook", "_old_forward", "forward", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa"}
_SHARDS = "torch.distributed.fsdp."
_DIVIDES = "transformers.distributed."
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def settings_of(request: Request, **more: Any) -> dict[str, Any]:
    """What was asked of the model.

    Raises:
        InputError: the code or the settings of a metric cannot be read.
    """
    asked = {field.name: getattr(request, field.name) for field in fields(request) if field.name not in _CUTS}
    known = _modules(request.arch.model)
    return {name: _setting(name, value, known) for name, value in {**asked, **more}.items()}


def _modules(model: nn.Module) -> dict[int, Any]:
    """The model's modules by id, which are compared as the model's wherever they are met."""
    return {id(module): ["module", name] for name, module in model.named_modules()}


def _setting(name: str, value: Any, known: dict[int, Any]) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, PairedDataset):
        return data_identity(value)
    if isinstance(value, Metric):
        named = METRICS.get(value.name) is value
        return value.name if named else f"{value.name} {Reader(name, known).digest(value.function)}"
    if isinstance(value, Constants):
        return [tensor_digest(x) for x in value.tensors]
    if isinstance(value, Circuit):  # where it came from, such as when, changes no number
        return Reader(name, known).digest([value.graph, value.mask])
    if isinstance(value, list):
        return [_setting(name, each, known) for each in value]
    if hasattr(value, "name") and hasattr(value, "description"):  # an entry of a registry
        return value.name
    return Reader(name, known).digest(value)


def data_identity(data: PairedDataset) -> dict[str, str]:
    """What tells prompt pairs apart: digests of their tokens, lengths, answers and alignment.

    Not of spans, which matter only to what is by span.
    """
    held = {field.name: getattr(data, field.name) for field in fields(data) if field.name != "spans"}
    if data.pictures is not None:
        held |= {"pictures": data.pictures.embeddings, "picture_shifts": data.pictures.shifts}
    return {name: tensor_digest(x) for name, x in held.items() if isinstance(x, Tensor)}


def model_identity(model: nn.Module) -> dict[str, Any]:
    """All that a model computes with.

    The same whatever devices and threads compute, so that a run can go on with others.

    Raises:
        InputError: the code or the settings of a hook or of something else of the user's cannot be read.
    """
    known = _modules(model)
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if hasattr(config, "to_diff_dict")}
    known |= {key: ["configuration"] for key in configs}
    hooks = {
        name: [Reader(f"hook on {name or 'the model'}", known).digest(hook) for hook in own]
        for name, module in model.named_modules()
        if (own := foreign_hooks(module))
    }
    everywhere = [hook for kind in KINDS for hook in getattr(torch_module, f"_global{kind}").values()]
    return {
        "versions": _versions(model),
        "configuration": [_configuration(each) for each in configs.values()],
        "weights": weight_digests(model),
        "modules": {name: _module(name, module, known) for name, module in model.named_modules()},
        "code": Reader("model", known).digest(list(_changed_code(model, configs.values()))),
        "hooks": {**hooks, **({"*": Reader("global hooks").digest(everywhere)} if everywhere else {})},
    }


def _versions(model: nn.Module) -> dict[str, str]:
    """Of Python and of the packages whose modules the model is made of."""
    used = {type(module).__module__.partition(".")[0] for module in model.modules()}
    names = sorted(used | {"torch", "transformers", "eap_kernels"})
    found = {"python": ".".join(platform.python_version_tuple()[:2]), **{name: _version(name) for name in names}}
    return {name: version for name, version in found.items() if version}


def _version(package: str) -> str:
    """What the package says itself and what is installed, which differ where it was replaced during the process."""
    # transformers puts another module in its place when one of its parts is first imported.
    modules = [sys.modules.get(package), *([transformers] if package == "transformers" else [])]
    found = {getattr(module, "__version__", None) for module in modules}
    with suppress(metadata.PackageNotFoundError):
        found.add(metadata.version(package))
    # Builds of one version for other devices count as the same.
    return " ".join(sorted({str(version).partition("+")[0] for version in found if version is not None}))


def _configuration(config: Any) -> Any:
    implementations = {name: getattr(config, name, None) for name in _IMPLEMENTATIONS}
    return _without_origin({**config.to_dict(), **implementations})


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_origin(each) for key, each in value.items() if key not in _ORIGIN}
    if isinstance(value, (list, tuple)):
        return [_without_origin(each) for each in value]
    return value if isinstance(value, _PLAIN) else str(value)


def _module(name: str, module: nn.Module, known: dict[int, Any]) -> str:
    """A module's class and what it holds besides weights and modules."""
    # `fully_shard` makes a class of its own of each module's.
    kind = next(each for each in type(module).__mro__ if not each.__module__.startswith(_SHARDS))
    package = kind.__module__.partition(".")[0]
    left_out = _TORCHS | _NOTES | (_ACCELERATES if "_hf_hook" in vars(module) else set())
    own = {} if package == "bitsandbytes" else {k: v for k, v in sorted(vars(module).items()) if k not in left_out}
    held = {k: v for k, v in own.items() if not _is_note(package, k) and not _is_packages(v)}
    return Reader(f"module {name}", known).digest([f"{kind.__module__}.{kind.__qualname__}", held])


def _is_note(package: str, name: str) -> bool:
    if name.startswith(("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")):
        return True
    return name == "_is_hf_initialized" or (package == "transformers" and name.startswith("_"))


def _is_packages(value: Any) -> bool:
    """Is it bookkeeping of a package that models are made with, such as a configuration, or divides what is run?"""
    if str(getattr(value, "__module__", "")).startswith(_DIVIDES):
        return True
    package = type(value).__module__.partition(".")[0]
    return package in _PACKAGES and not isinstance(value, Tensor) and not callable(value)


def _changed_code(model: nn.Module, configs: Iterable[Any]) -> Iterator[Any]:
    """Code of the user's that modules run: their own classes, and functions put in the place of a package's."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__)):
        if not is_installed(kind):
            yield kind
            continue
        for place in (kind, sys.modules[kind.__module__]):
            yield from _replaced(place)
    for module in (torch, nn.functional):
        yield from _replaced(module)
    for config in configs:
        attention = ALL_ATTENTION_FUNCTIONS.get(getattr(config, "_attn_implementation", None))
        if not isinstance(attention, FunctionType) or not is_installed(attention):
            yield attention


def _replaced(place: Any) -> Iterator[Any]:
    """The user's functions among those of a package's class or module."""
    for name, f in sorted(vars(place).items()):
        if isinstance(f, FunctionType) and not is_installed(f):
            yield [name, f]


def model_name(model: Any) -> str:
    """The hub name, or the folder's own name: results are passed on, and whole paths mean nothing elsewhere."""
    name = str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    return os.path.basename(os.path.normpath(name)) if os.path.isdir(name) else name
