"""The values that a function's result depends on besides its arguments: the key under which its trace is reused."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor

CONSTANT_MODULES = frozenset({"torch", "math", "operator"})  # whose contents nobody changes


class Identity:
    """An object in a key, compared by identity and kept alive, so that its id is not reused."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other) -> bool:
        return isinstance(other, Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class UnknownError(Exception):
    """A value may depend on things that cannot be compared: a module, a list or an object can change in place."""


class Closure:
    """`key` is equal for two calls of a function, or of another with the same code, in which it reads the same values;
    None where that cannot be determined. `tensors`: those it reads."""

    def __init__(self, function: Callable):
        self.tensors: list[Tensor] = []
        self._entered: list[Callable] = []
        self.key: tuple | None
        try:
            self.key = self._make_function_key(function)
        except UnknownError:
            self.key = None

    def _make_function_key(self, function) -> tuple:
        if not isinstance(function, types.FunctionType):
            raise UnknownError
        if _has_other_lookups(function.__code__):
            raise UnknownError
        if function in self._entered:  # recursion, direct or through others
            return ("function", self._entered.index(function))
        self._entered.append(function)
        try:
            cells = [cell.cell_contents for cell in function.__closure__ or ()]
        except ValueError:  # a cell is still empty
            raise UnknownError from None
        names = sorted(_list_names(function.__code__) & function.__globals__.keys())
        values = [
            *cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items(), *vars(function).items(),
            *((name, function.__globals__[name]) for name in names),
        ]  # fmt: skip
        return (function.__code__, *map(self._make_key, values))

    def _make_key(self, value) -> tuple:
        if isinstance(value, Tensor):
            self.tensors.append(value)
            settings = value.shape, value.dtype, value.device, value.requires_grad
            return "tensor", Identity(value), *settings, *map(self._make_key, vars(value).items())
        if value is None or type(value) in (bool, int, str, torch.dtype, torch.device):
            return type(value), value
        if type(value) is float:
            return float, value.hex()  # 0.0 == -0.0
        if type(value) is tuple:
            return (tuple, *map(self._make_key, value))
        if is_constant(value):
            return "object", Identity(value)
        return self._make_function_key(value)


@functools.lru_cache  # of each code object once: a call of attention asks, and takes microseconds
def _list_names(code: types.CodeType) -> set[str]:
    """The names of globals that code may look up, in functions inside it too."""
    inner = (_list_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


@functools.lru_cache
def _has_other_lookups(code: types.CodeType) -> bool:
    """Whether code, or a function inside it, reads more than its names say: imports, and globals through a call."""
    if {"globals", "vars", "eval", "exec", "__import__"} & set(code.co_names):
        return True
    if any(instruction.opname.startswith("IMPORT_") for instruction in dis.get_instructions(code)):
        return True
    return any(_has_other_lookups(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))


def is_constant(value) -> bool:
    """Whether nobody changes it: one of CONSTANT_MODULES, a function of one without a closure, or a builtin."""
    if isinstance(value, types.ModuleType):
        return value.__name__.split(".")[0] in CONSTANT_MODULES
    if isinstance(value, types.BuiltinFunctionType):  # as `torch.where`, not a method as `table.get`
        return value.__self__ is None or isinstance(value.__self__, (types.ModuleType, type))
    if isinstance(value, types.FunctionType) and not value.__closure__:
        return value.__globals__.get("__name__", "").split(".")[0] in CONSTANT_MODULES  # `wraps` copies __module__
    return False
