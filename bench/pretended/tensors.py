"""Tensors that say cuda:0 and compute on the CPU, or have a shape and no values.

Numbers (0-d tensors) and indices may come from the CPU; any other tensor on another device raises RuntimeError, as on a
GPU. Attention is one operator, as there. Of the operators in `torch.ops.eap_kernels`, `.select` runs the package's own
choice and the operator that it picks. A plain one counts as one fused kernel and is computed by what the package
registered for the CPU.

Observers: `observers.append(f)`; f(event, func, args, kwargs, out) with event "op" for each operator that touches the
device, or "wait" for each moment in which the host waits for it (func is then a word for why).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
# Builds for CPUs index no tensor that truly says cuda: torch itself sees this device, Python code sees cuda:0.
_STANDS_FOR_CUDA = torch.device("meta", 0)
observers: list[Callable[..., None]] = []
_SMALL = 4096  # elements: floating tensors made on the device up to this size keep values under `shapes`
_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default)
_QUESTIONS = ("isnan", "isinf", "eq", "ne", "lt", "le", "gt", "ge")  # answered where there are no values
_WIDENED = ("mm", "bmm", "addmm", "baddbmm")
# Functions of the library's that are one kernel each, and what computes them (library.py).
LIBRARY: dict[Any, Callable[..., Tensor]] = {}
# What the device is at: without values, under which stream (None: its own), capturing into which tape, and whether
# torch warns where the host waits; what graphs.py does before an operator, or before a wait.
state: dict[str, Any] = {"shapes": False, "stream": None, "tape": None, "told of waits": False, "guard": None}
_addresses = itertools.count(1 << 40, 1 << 36)
bases: dict[int, int] = {}


def tell(event: str, func: Any, args: Any = (), kwargs: Any = None, out: Any = None) -> None:
    if event == "wait" and state["guard"] is not None:
        state["guard"](func, args, {})
    if state["tape"] is not None:  # nothing is launched
        return
    for observer in observers:
        observer(event, func, args, kwargs or {}, out)


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """Observers are told of nothing inside, where several operators stand for one kernel."""
    before, observers[:] = observers[:], []
    try:
        yield
    finally:
        observers[:] = before


def expanded(*_: Any) -> None:
    """Stands for Triton's expansion of rows when observers are told of it."""


def replayed(*_: Any) -> None:
    """Stands for a CUDA graph."""


class _Plain(type(Tensor)):  # type: ignore[misc]
    """`type(x) in (Tensor, Parameter)` holds, as it does of a GPU's tensors; `type(x) is Tensor` cannot."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is Tensor or other is torch.nn.Parameter

    __hash__ = type.__hash__


class Pretend(Tensor, metaclass=_Plain):
    """A tensor that says cuda:0; `held` is on the CPU, or on meta where it has no values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretend:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=_STANDS_FOR_CUDA,
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def __repr__(self, **_: Any) -> str:
        return f"pretended({list(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = Pretend(self.held.clone())
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def data_ptr(self) -> int:
        if not self.held.is_meta:
            return self.held.data_ptr()
        storage = self.held.untyped_storage()._cdata
        if storage not in bases:
            bases[storage] = next(_addresses)
        return bases[storage] + self.storage_offset() * self.element_size()

    def untyped_storage(self) -> Any:
        """The storage that views share, as they do on a GPU: what counts memory tells tensors apart by it."""
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        tell("wait", "tolist")
        return _known(self.held).tolist()

    def numpy(self, **_: Any) -> Any:
        tell("wait", "numpy")
        return _known(self.held).numpy(force=True)

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError("cannot pin a CUDA tensor")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What torch would refuse or do differently before it dispatches any operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = CUDA
        if func is Tensor.to:
            args = tuple(CUDA if isinstance(x, (str, torch.device)) and is_cuda(x) else x for x in args)
            if isinstance(args[0], Pretend):  # it is there already
                args = tuple(x for x in args if not isinstance(x, torch.device) or x != CUDA)
                if kwargs.get("device") == CUDA:
                    kwargs.pop("device")
                if not any(
                    isinstance(x, (Tensor, torch.dtype, torch.device, str)) for x in (*args[1:], *kwargs.values())
                ):
                    return args[0]
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and is_cuda(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": CPU}).to(CUDA)
        if func is Tensor.cuda:
            return args[0].to(CUDA, **{k: v for k, v in kwargs.items() if k == "non_blocking"})
        if func is Tensor.pin_memory and not isinstance(args[0], Pretend):
            return args[0]
        if func in LIBRARY and isinstance(args[0], Pretend):
            return LIBRARY[func](*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return func(args[0], index_of(args[1]), *args[2:])
        if kwargs.get("pin_memory"):
            kwargs.pop("pin_memory")
        return func(*args, **kwargs)


def index_of(given: Any) -> tuple[Any, ...]:
    """What a tensor is indexed with, lists as tensors of the CPU: torch would make them on the tensor's device."""
    return tuple(
        torch.tensor(part, dtype=None if part else torch.int64, device=CPU) if isinstance(part, list) else part
        for part in (given if isinstance(given, tuple) else (given,))
    )


# --- one operator


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    kwargs = dict(kwargs)
    tensors = tensors_of([*args, *kwargs.values()])
    if is_cuda(kwargs.get("device")):
        kwargs["device"] = CUDA
    device = kwargs.get("device") or _common(func, tensors)
    if func.namespace == "eap_kernels" and func._overloadname == "select" and device == CUDA:
        from eap_kernels import _dispatch

        # The package's own function behind `.select` of a public operator.
        with Functions(), Dispatch():
            return _dispatch.SELECT[func._schema.name.split("::")[1]](*args, **kwargs)
    if func.namespace == "aten" and func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        with torch._C.DisableTorchFunction(), Dispatch():  # made of other operators
            made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
    if state["guard"] is not None and (device == CUDA or any(isinstance(x, Pretend) for x in tensors)):
        state["guard"](func, args, kwargs)
    held, back = _held(tensors)
    give = lambda x: held.get(id(x), x) if isinstance(x, Tensor) else x  # noqa: E731
    valueless = any(h.is_meta for h in held.values())
    name = func._schema.name.split("::")[-1]
    if valueless and name in ("_local_scalar_dense", "is_nonzero", "equal"):
        out: Any = True if name != "_local_scalar_dense" or tensors[0].dtype == torch.bool else 1
    elif valueless and name == "nonzero":
        out = Pretend(torch.ones(tensors[0].shape, dtype=torch.bool).nonzero())
    elif valueless and device == CUDA and name in _QUESTIONS and "out" not in kwargs:
        no = name in ("isnan", "isinf") or (name == "ne" and args[0] is args[1])
        shape = torch.broadcast_shapes(*(x.shape for x in tensors))
        out = Pretend(torch.full((), not no).expand(shape).clone(memory_format=torch.contiguous_format))
    elif func.namespace == "aten" and func._overloadname == "dtype" and name in _WIDENED and device == CUDA:
        # Low precision in, wide sums out: CUDA's alone.
        wide = lambda: getattr(torch, name)(*(held[id(x)].to(args[-1]) for x in tensors))  # noqa: E731
        out = Pretend(recorded(wide, held.values()))
    elif valueless and name == "copy_" and not isinstance(args[0], Pretend):
        out = args[0].fill_(1)
    elif valueless and name == "_to_copy" and device == CPU:
        out = torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
    else:
        given = tree_map(give, kwargs)
        if "device" in given:
            without = device == CUDA and not tensors and _forgotten(args, kwargs)
            given["device"] = META if valueless or without or device == META else CPU
        given.pop("pin_memory", None)
        taken = list(args)
        if valueless and func in _INDEXING:
            taken[1] = [n for x in args[1] for n in _numbers(x)]
        call = partial(func, *tree_map(give, taken), **given)
        made = recorded(call, held.values()) if device == CUDA and not valueless else call()
        out = tree_map(lambda y: _on(y, device, back), made)
    if any(isinstance(x, Pretend) for x in (*tensors, *tensors_of([out]))):
        tell("op", func, args, kwargs, out)
    return out


def recorded(call: Callable[[], Any], given: Iterable[Tensor]) -> Any:
    """What a call gives of tensors of the CPU; where it is captured, replays make it again."""
    made = call()
    if state["tape"] is not None:
        state["tape"].record(call, given, made)
    return made


def _held(tensors: list[Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """id of each tensor -> what stands for it; and id of that -> the tensor, for operators in place."""
    plain = {id(x): x.held if isinstance(x, Pretend) else x for x in tensors}
    if any(x.is_meta for x in plain.values()):
        plain = {
            key: x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=META)
            for key, x in plain.items()
        }
    return plain, {id(plain[id(x)]): x for x in tensors}


def _numbers(index: Any) -> list[Any]:
    """A mask as the numbers of its places, without values: meta cannot count them."""
    if not isinstance(index, Tensor) or index.dtype != torch.bool:
        return [index]
    held = index.held if isinstance(index, Pretend) else index
    return [x.to(META) for x in _known(held).nonzero().unbind(1)]


def _forgotten(args: Any, kwargs: Any) -> bool:
    """Under `shapes`: is this a floating tensor made without values?"""
    sizes = [a for a in args if isinstance(a, (list, tuple, torch.Size))]
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return state["shapes"] and dtype.is_floating_point and bool(sizes) and math.prod(sizes[0]) > _SMALL


def _on(y: Any, device: torch.device, back: dict[int, Tensor]) -> Any:
    if not isinstance(y, Tensor):
        return y
    if id(y) in back:
        return back[id(y)]
    if device != CUDA:
        return y
    return Pretend(y)


def tensors_of(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator writes into."""
    arguments = func._schema.arguments
    given = {**dict(zip((each.name for each in arguments), args, strict=False)), **kwargs}
    return tensors_of(given.get(each.name) for each in arguments if each.alias_info and each.alias_info.is_write)


def _known(held: Tensor) -> Tensor:
    return torch.ones(held.shape, dtype=held.dtype) if held.is_meta else held


def is_cuda(device: Any) -> bool:
    if device is None:
        return False
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return device.type == "cuda" or device == _STANDS_FOR_CUDA


def _common(func: Any, tensors: list[Tensor]) -> torch.device:
    """The device of all of them; raises if there are several."""
    if tensors and func is _aten.copy_.default:
        return CUDA if isinstance(tensors[0], Pretend) else CPU
    here = [CUDA if isinstance(x, Pretend) else x.device for x in tensors]
    return one_device(func, tensors, here) or (here[0] if here else CPU)


def one_device(func: Any, tensors: list[Tensor], devices: list[torch.device]) -> torch.device | None:
    """The device of those that may not be on the CPU by themselves, if there are any; raises if there are several."""
    both = enumerate(zip(devices, tensors, strict=True))
    bound = {device for place, (device, x) in both if device not in (CPU, META) or not _free(func, place, x)}
    if len(bound) > 1:
        raise RuntimeError(f"{func}: expected all tensors on one device, found {', '.join(sorted(map(str, bound)))}")
    return bound.pop() if bound else None


def _free(func: Any, place: int, x: Tensor) -> bool:
    """May it be on the CPU when others are not?"""
    if func.namespace == "eap_kernels":
        return x.dtype == torch.int64  # how far receivers see
    return x.dim() == 0 or (place > 0 and func in _INDEXING and x.dtype in (torch.int64, torch.bool))
