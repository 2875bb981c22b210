"""What a value of the user's computes: a function's code and all that it uses, an object's class and its state."""

from __future__ import annotations

import dis
import json
import site
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from enum import Enum
from functools import cache, cached_property
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import eap_kernels

from ..errors import InputError, expected
from .digest import tensor_digest, text_digest

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, type(...), type(NotImplemented))
_OURS = [str(Path(__file__).parents[1]), str(Path(eap_kernels.__file__).parent)]
# Where code gets other code by name, out of sight.
_BY_NAME = {"eval", "exec", "globals", "__import__"}
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
            return ["dict", *([self.read(key), self.read(value)] for key, value in x.items())]
        if type(x) in (set, frozenset):
            return ["set", *_sorted(map(self.read, x))]
        if isinstance(x, ModuleType):
            return self._module(x, None)
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
            held = [self._cell(cell, None) for cell in f.__closure__ or ()]
            return ["function", *_version(module), f.__code__.co_name, *held]
        names, looked_up = _names(f.__code__), _looked_up(f.__code__, "LOAD_GLOBAL", "LOAD_NAME")
        by_name = (looked_up & _BY_NAME) | (names & {"import_module"})
        if {"sys", "modules"} <= names:
            by_name.add("sys.modules")
        if by_name:
            raise self._unreadable(f"{f.__name__}, which finds code by {min(by_name)}")
        used = [[name, self._taken(f.__globals__[name], names)] for name in sorted(looked_up) if name in f.__globals__]
        imported = [[module.__name__, self._taken(module, names)] for module in _imported(f)]
        given = f.__defaults__, f.__kwdefaults__, _attributes(vars(f))
        cells = [self._cell(cell, names) for cell in f.__closure__ or ()]
        return ["code", self.read(f.__code__), used, imported, *map(self.read, given), *cells]

    def _cell(self, cell: Any, names: frozenset[str] | None) -> Any:
        try:
            value = cell.cell_contents
        except ValueError:
            return "empty"
        return self._taken(value, names)

    def _code(self, code: CodeType) -> Any:
        names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
        return [code.co_code.hex(), *map(self.read, code.co_consts), *map(list, names), code.co_flags]

    def _taken(self, value: Any, names: frozenset[str] | None) -> Any:
        """What code that mentions these names uses of a value that it looks up."""
        return self._module(value, names) if isinstance(value, ModuleType) else self.read(value)

    def _module(self, module: ModuleType, names: frozenset[str] | None, inside: tuple[ModuleType, ...] = ()) -> Any:
        """A module; of the user's, what may be taken from it by these names, and from the modules inside it."""
        if module in inside or _is_installed_module(module):
            return ["module", module.__name__]
        if names is None:
            raise self._unreadable(f"the module {module.__name__}, of which anything may be used")
        taken = []
        for name in sorted(names & vars(module).keys()):
            value = vars(module)[name]
            within = isinstance(value, ModuleType)
            taken.append([name, self._module(value, names, (*inside, module)) if within else self.read(value)])
        return ["module", module.__name__, taken]

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
            raise self._unreadable(f"{type(x).__name__} ({error})") from error
        if isinstance(parts, str):  # a function in a wrapper of C's, such as functools.lru_cache, is the user's
            return ["global", type(x).__module__, parts, self.read(getattr(x, "__wrapped__", None))]
        made, given, *rest = parts
        state, items, pairs = (*rest[:3], None, None, None)[:3]
        # The user's own pickling may leave out what counts.
        held = {} if is_installed(type(x)) else getattr(x, "__dict__", {})
        read = [_attributes(_without_remembered(x, each)) for each in (state, held)]
        more = [None if each is None else list(each) for each in (items, pairs)]
        return ["object", *map(self.read, (type(x), made, given, *read, more))]

    def _unreadable(self, found: str) -> InputError:
        wanted = "only values whose code and settings can be read, where there is a checkpoint"
        return expected(self._name, wanted, found)


def is_installed(x: Any) -> bool:
    """Is it the code of an installed package, of Python itself, or ours?"""
    if isinstance(x, FunctionType):
        return _installed_file(x.__code__.co_filename)
    module = sys.modules.get(type(x).__module__ if not isinstance(x, type) else x.__module__)
    if module is None or module.__name__ == "__main__":
        return False
    return _installed_file(getattr(module, "__file__", None) or "<frozen builtins>")


def _is_installed_module(module: ModuleType) -> bool:
    # Some modules inside packages, such as torch.ops, name no file that there is.
    package = sys.modules.get(module.__name__.partition(".")[0], module)
    files = (getattr(each, "__file__", None) for each in (module, package))
    return module.__name__ in sys.builtin_module_names or any(map(_installed_file, files))


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


def _without_remembered(x: Any, state: Any) -> Any:
    """An object's state without its cached properties."""
    if not isinstance(state, dict):
        return state
    return {k: v for k, v in state.items() if not isinstance(getattr(type(x), str(k), None), cached_property)}


def _attributes(state: Any) -> Any:
    """An object's attributes in an order of their own, as that in which they were set means nothing."""
    return dict(sorted(state.items(), key=str)) if isinstance(state, dict) else state


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _names(code: CodeType) -> frozenset[str]:
    """All names that code mentions."""
    return frozenset(name for each in _codes(code) for name in each.co_names)


def _looked_up(code: CodeType, *operations: str) -> set[str]:
    return {i.argval for each in _codes(code) for i in dis.get_instructions(each) if i.opname in operations}


def _imported(f: FunctionType) -> list[ModuleType]:
    """The modules that a function imports as it runs, and those that contain them; it would fail without them."""
    found = {}
    for each in _codes(f.__code__):
        instructions = list(dis.get_instructions(each))
        for level, _, i in zip(instructions, instructions[1:], instructions[2:], strict=False):
            if i.opname != "IMPORT_NAME":
                continue
            names = {"__package__": f.__globals__.get("__package__"), "__name__": f.__globals__.get("__name__")}
            with suppress(ImportError):
                module = __import__(i.argval, names, None, ["*none*"], level.argval)
                found[module.__name__] = module
                top = module.__name__.partition(".")[0]
                found[top] = sys.modules[top]
    return [found[name] for name in sorted(found)]


def _sorted(values: Any) -> list[Any]:
    return sorted(values, key=json.dumps)
