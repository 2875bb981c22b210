"""Models without weights, on the device "meta": their passes run without numbers, so that their memory can be counted.

Floating-point tensors are only shapes. Integers (tokens, positions, masks) keep their values, because shapes depend on
them. Shapes do not depend on unknown floating-point values, except in mixtures of experts that run expert by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import expected
from .loans import Changes

if TYPE_CHECKING:
    from typing_extensions import Self

_META = torch.device("meta")
_aten = torch.ops.aten
# Indices of these keep their values, as the shape depends on those that are bool.
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default)
# What operators have made, by what they were asked.
_MADE: dict[Any, list[tuple[torch.Size, tuple[int, ...], torch.dtype]]] = {}


class Shape(Tensor):
    """A tensor without numbers that claims to be on the CPU; `held` is its twin on the device "meta"."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Shape:
        made: Shape = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Shape({list(self.shape)}, {self.dtype})"

    def untyped_storage(self) -> Any:
        """The storage that views share, as they would with numbers."""
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class _WithoutNumbers(TorchDispatchMode):
    """Inside, new floating-point tensors are shapes too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [x for value in (*args, *kwargs.values()) for x in (value if isinstance(value, list) else [value])]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    changed = {id(x.held): x for x in tensors if isinstance(x, Shape)}  # an operator may change these in place
    if not changed and (tensors or not _makes_tensor(func, kwargs)):
        return func(*args, **kwargs)
    if func is _aten._local_scalar_dense.default:
        return False if tensors[0].dtype == torch.bool else 0  # unknown values read as 0
    asked = _asked(func, args, kwargs)
    if (made := _MADE.get(asked)) is not None:  # looked up once, as another thread may forget it meanwhile
        again = [Shape(torch.empty_strided(*layout, dtype=dtype, device=_META)) for *layout, dtype in made]
        return again[0] if len(again) == 1 else tuple(again)
    change = _held if func in _INDEXING else _meta
    given = {name: _each(change, value) for name, value in kwargs.items()}
    if not tensors or "device" in given:
        given["device"] = _META
    try:
        out = func(*_each(change, args), **given)
    except RuntimeError as error:
        raise expected("model", f"weights, without which {func} does not run", "none") from error
    if not tensors and not out.is_floating_point():
        return func(*args, **kwargs)
    results = [out] if isinstance(out, Tensor) else out
    if asked is not None and all(isinstance(x, Tensor) for x in results):  # an output that is not wanted is None
        _remember(asked, tensors, results)
    return _each(lambda y: _shape(y, changed), out)


def _asked(func: Any, args: Any, kwargs: Any) -> Any:
    """All that the result depends on where it is nothing but new tensors' shapes; else None."""
    if func in _INDEXING or not _makes_new(func):
        return None
    asked = func, _each(_told, args), tuple((name, _each(_told, value)) for name, value in kwargs.items())
    try:
        hash(asked)
    except TypeError:
        return None
    return asked


def _told(x: Any) -> Any:
    # With its type: results for 1, 1.0 and True may have other dtypes.
    return (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x)


@cache
def _makes_new(func: Any) -> bool:
    schema = func._schema
    new = [str(made.type) == "Tensor" and made.alias_info is None for made in schema.returns]
    return bool(new) and all(new) and not schema.is_mutable


def _remember(asked: Any, given: list[Tensor], made: Sequence[Tensor]) -> None:
    """Layers are alike, and an operator without numbers takes longer to look up its shapes than all else here."""
    layouts = [(x.shape, x.stride(), x.dtype) for x in made]
    storages = {x.untyped_storage()._cdata for x in map(_held, given)}
    for x, (shape, stride, dtype) in zip(made, layouts, strict=True):
        whole = torch.empty_strided(shape, stride, dtype=dtype, device=_META).untyped_storage().nbytes()
        # Some share memory, whatever they declare.
        if x.untyped_storage()._cdata in storages or x.untyped_storage().nbytes() != whole:
            return
        storages.add(x.untyped_storage()._cdata)
    _MADE[asked] = layouts


def _each(change: Any, value: Any) -> Any:
    """Of an operator's arguments or results every one changed, also those inside lists."""
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return tuple(_each(change, x) for x in value)
    return change(value)


def _makes_tensor(func: Any, kwargs: Any) -> bool:
    """Does the operator make a tensor from nothing? A generator draws the real inputs that modules are tried with."""
    return kwargs.get("generator") is None and any(argument.name == "device" for argument in func._schema.arguments)


def _shape(y: Any, changed: dict[int, Shape]) -> Any:
    if not isinstance(y, Tensor):
        return y
    return changed[id(y)] if id(y) in changed else Shape(y)


def _held(x: Any) -> Any:
    return x.held if isinstance(x, Shape) else x


def _meta(x: Any) -> Any:
    return torch.empty_like(x, device=_META) if isinstance(x, Tensor) and not isinstance(x, Shape) else _held(x)


class Weightless(Changes):
    """Inside, the weights of a model that has none are shapes; a model with weights is left as it is.

    Args:
        model: the model; anything else is left for others to refuse.

    Attributes:
        mode: in which passes of the model have to run; it does nothing for a model with weights.
    """

    def __init__(self, model: object) -> None:
        super().__init__()
        self._model = model
        self.mode: AbstractContextManager[Any] = nullcontext()

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._replace()
        except BaseException:
            self.close()
            raise
        return self

    def _replace(self) -> None:
        model = self._model
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        places: list[dict[str, Any]] = [
            places for module in modules for places in (module._parameters, module._buffers)
        ]
        absent = [(each, name, x) for each in places for name, x in each.items() if x is not None and x.is_meta]
        if not absent or any(hasattr(module, "_hf_hook") for module in modules):  # offloaded
            return
        assert isinstance(model, nn.Module)
        self.claim(model)
        self.note(_MADE.clear)
        shapes = {id(x): Shape(x.detach()) for _, _, x in absent}  # tied weights stay one
        for each, name, x in absent:
            self.note(partial(each.__setitem__, name, x))
            each[name] = shapes[id(x)]
        self.mode = _WithoutNumbers()
