"""What a value of the user's computes: a function's code and all that it uses, an object's class and its state."""

from __future__ import annotations

import dis
import json
import site
import sys
import sysconfig
from enum import Enum
from functools import cache, cached_property
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import eap_kernels

from ..errors import expected
from .digest import tensor_digest, text_digest

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, type(...), type(NotImplemented))
_OURS = [str(Path(__file__).parents[1]), str(Path(eap_kernels.__file__).parent)]
# Of a class, what says nothing about what it computes, or only how Python stores it.
_BOOKKEEPING = {
    "__module__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__firstlineno__", "__static_attributes__",
    "__abstractmethods__", "_abc_impl", "__annotate_func__", "__annotations_cache__", "__dataclass_fields__",
}  # fmt: skip


class Reader:
    """Reads values into plain JSON values that are equal only if the values compute the same.

    Installed packages' functions and classes are known by their names and the package's version.

    Args:
        name: what is read, for the error.
        known: objects that are read elsewhere, by their id, and what stands for them.
    """

    def __init__(self, name: str, known: dict[int, Any] | None = None) -> None:
        self._name = name
        self._known = known or {}
        self._read: dict[int, Any] = {}  # by id
        self._alive: list[Any] = []  # so that no other object gets the id of one that was read

    def digest(self, value: Any) -> str:
        """Raises `InputError` for what cannot be read, such as a generator or a lock."""
        return text_digest(json.dumps(self.read(value), sort_keys=True))

    def read(self, x: Any) -> Any:
        if type(x) in _PLAIN:
            return [type(x).__name__, repr(x)]
        if isinstance(x, torch.device):
            return "device"  # a run may go on on another one
        if isinstance(x, (torch.dtype, torch.layout, torch.memory_format, np.dtype)):
            return str(x)
        if id(x) in self._known:
            return self._known[id(x)]
        if id(x) not in self._read:
            self._alive.append(x)
            self._read[id(x)] = ["again", type(x).__name__]  # met inside itself
            self._read[id(x)] = self._inside(x)
        return self._read[id(x)]

    def _inside(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return ["tensor", tensor_digest(x)]
        if isinstance(x, np.ndarray) and not x.dtype.hasobject:
            held = torch.from_numpy(np.frombuffer(x.tobytes(), np.uint8).copy())
            return ["array", str(x.dtype), list(x.shape), tensor_digest(held)]
        if type(x) in (list, tuple):
            return [type(x).__name__, *map(self.read, x)]
        if type(x) is dict:
            return ["dict", *_sorted([self.read(key), self.read(value)] for key, value in x.items())]
        if type(x) in (set, frozenset):
            return ["set", *_sorted(map(self.read, x))]
        if isinstance(x, ModuleType):
            return ["module", x.__name__]
        if isinstance(x, MethodType):
            return ["method", self.read(x.__func__), self.read(x.__self__)]
        if isinstance(x, BuiltinFunctionType):
            of = x.__self__
            return ["builtin", x.__qualname__, x.__module__ if isinstance(of, ModuleType) else self.read(of)]
        if isinstance(x, FunctionType):
            return self._function(x)
        if isinstance(x, CodeType):
            return self._code(x)
        if isinstance(x, (staticmethod, classmethod)):
            return [type(x).__name__, self.read(x.__func__)]
        if isinstance(x, property):
            return ["property", *map(self.read, (x.fget, x.fset, x.fdel))]
        if isinstance(x, Enum):
            return ["enum", type(x).__qualname__, x.name]
        if isinstance(x, type):
            return self._class(x)
        return self._object(x)

    def _function(self, f: FunctionType) -> Any:
        if is_installed(f):
            # What a package's function was given may still be the user's, as by a decorator.
            module = str(f.__globals__.get("__name__"))
            return ["function", *_version(module), f.__code__.co_name, *map(self._cell, f.__closure__ or ())]
        used = [[name, self._global(f, name, names)] for name, names in _globals(f.__code__) if name in f.__globals__]
        given = f.__defaults__, f.__kwdefaults__, vars(f)
        return ["code", self.read(f.__code__), used, *map(self.read, given), *map(self._cell, f.__closure__ or ())]

    def _cell(self, cell: Any) -> Any:
        try:
            value = cell.cell_contents
        except ValueError:
            return "empty"
        return self.read(value)

    def _code(self, code: CodeType) -> Any:
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        return [code.co_code.hex(), *map(self.read, code.co_consts), *map(list, names), code.co_flags]

    def _global(self, f: FunctionType, name: str, attributes: tuple[str, ...]) -> Any:
        value = f.__globals__[name]
        if not isinstance(value, ModuleType) or _installed_file(getattr(value, "__file__", None)):
            return self.read(value)
        # Of a module of the user's: what the function may take from it.
        taken = [each for each in attributes if each in vars(value)]
        return ["module", value.__name__, [[each, self.read(vars(value)[each])] for each in taken]]

    def _class(self, kind: type) -> Any:
        if is_installed(kind):
            return ["class", *_version(kind.__module__), kind.__qualname__]
        held = {name: value for name, value in vars(kind).items() if name not in _BOOKKEEPING}
        slots = ("member_descriptor", "getset_descriptor", "wrapper_descriptor", "method_descriptor")
        members = [[name, self.read(v)] for name, v in sorted(held.items()) if type(v).__name__ not in slots]
        return ["class", kind.__qualname__, [self.read(base) for base in kind.__bases__], members]

    def _object(self, x: Any) -> Any:
        """As it would be pickled: its class, what that was given, and its state."""
        try:
            parts = x.__reduce_ex__(4)
        except Exception as error:
            wanted = "only values whose code and settings can be read, where there is a checkpoint"
            raise expected(self._name, wanted, f"{type(x).__name__} ({error})") from error
        if isinstance(parts, str):
            return ["global", type(x).__module__, parts]
        made, given, *rest = parts
        if rest and isinstance(rest[0], dict):  # without what is only remembered
            rest[0] = {
                k: v for k, v in rest[0].items() if not isinstance(getattr(type(x), str(k), None), cached_property)
            }
        state, items, pairs = (*rest[:3], None, None, None)[:3]
        more = [None if each is None else list(each) for each in (items, pairs)]
        return ["object", self.read(type(x)), self.read(made), self.read(given), self.read(state), self.read(more)]


def is_installed(x: Any) -> bool:
    """Is it the code of an installed package, of Python itself, or ours?"""
    if isinstance(x, FunctionType):
        return _installed_file(x.__code__.co_filename)
    module = sys.modules.get(type(x).__module__ if not isinstance(x, type) else x.__module__)
    if module is None or module.__name__ == "__main__":
        return False
    return _installed_file(getattr(module, "__file__", None) or "<frozen builtins>")


def _version(module: str) -> list[Any]:
    """A module of a package, and the package's version, of whatever build."""
    package = sys.modules.get(module.partition(".")[0])
    return [module, str(getattr(package, "__version__", "")).partition("+")[0]]


@cache
def _installed_file(name: str | None) -> bool:
    if name is None or name.startswith("<frozen"):
        return name is not None
    if name.startswith("<"):
        return False  # an interactive session's, or made by a program
    paths = sysconfig.get_paths()
    folders = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [*site.getsitepackages(), site.getusersitepackages(), *_OURS]
    return any(Path(name).resolve().is_relative_to(Path(folder).resolve()) for folder in folders if folder)


def _globals(code: CodeType) -> list[tuple[str, tuple[str, ...]]]:
    """The global names that code and the functions inside it look up, each with all names that the code mentions."""
    found = {i.argval: code.co_names for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for name, names in _globals(inner):
                found[name] = (*found.get(name, ()), *names)
    return sorted((name, tuple(sorted(set(names)))) for name, names in found.items())


def _sorted(values: Any) -> list[Any]:
    return sorted(values, key=json.dumps)
