"""Kernels given on the command line: file.py:function with its arguments as name=value."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from triton.runtime.jit import JITFunction, KernelInterface

from .usage import UsageError

TRITON_TYPES = {
    "fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64", "i1": "bool", "i8": "int8",
    "i16": "int16", "i32": "int32", "i64": "int64", "u8": "uint8", "fp8e5": "float8_e5m2", "fp8e4nv": "float8_e4m3fn",
}  # fmt: skip
HELP = (
    "an argument of a kernel file.py:function: a tensor as dtype[sizes] (x=float16[64,128], random numbers; a pointer "
    "whose size does not matter as x=*fp16), a number, True, False or None; and num_warps, num_stages"
)


def load_function(name: str):
    """The function of "file.py:function"; the file is imported as a module of its own.

    >>> load_function("attention.py")
    Traceback (most recent call last):
    bench.usage.UsageError: a kernel is named as file.py:function, got 'attention.py'
    """
    file, colon, function = name.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py":
        raise UsageError(f"a kernel is named as file.py:function, got {name!r}")
    if not path.is_file():
        raise UsageError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # for its imports from the same folder
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    found = getattr(module, function, None)
    if not callable(found) and not isinstance(found, KernelInterface):
        raise UsageError(f"{path} has no function {function}; it has {', '.join(list_kernels(module)) or 'none'}")
    return found


def list_kernels(module) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, KernelInterface)]


def parse_value(text: str):
    """
    >>> parse_value("3"), parse_value("0.5"), parse_value("None"), parse_value("int32[2,3]").shape
    (3, 0.5, None, torch.Size([2, 3]))
    """
    if text in ("None", "True", "False"):
        return {"None": None, "True": True, "False": False}[text]
    if match := re.fullmatch(r"\*(\w+)", text):
        return torch.zeros(4096, dtype=parse_dtype(TRITON_TYPES.get(match.group(1), match.group(1))))
    if match := re.fullmatch(r"(\w+)\[([\d,\s]*)\]", text):
        kind = parse_dtype(match.group(1))
        sizes = [int(x) for x in match.group(2).split(",") if x.strip()]
        if kind.is_floating_point:
            return torch.randn(sizes).to(kind)
        return torch.zeros(sizes, dtype=kind)
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    raise UsageError(f"{text!r} is not a tensor (float16[64,128], *fp16), a number, True, False or None")


def parse_dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UsageError(f"{name!r} is not a dtype of PyTorch")
    return found


def parse_arguments(words: list[str]) -> dict[str, object]:
    named = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"arguments are given as name=value, got {word!r}")
        try:
            named[name] = parse_value(text)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from None
    return named


def check_arguments(kernel: JITFunction, named: dict[str, object]) -> None:
    """Raise UsageError for parameters that are missing and for names that are not parameters."""
    params = {p.name: p.default is p._param.empty for p in kernel.params}
    missing = [name for name, needed in params.items() if needed and name not in named]
    options = {"num_warps", "num_stages", "num_ctas", "maxnreg"}
    unknown = [name for name in named if name not in params and name not in options]
    if missing or unknown:
        lines = [f"no value for {', '.join(missing)}"] * bool(missing) + [f"no parameter {', '.join(unknown)}"] * bool(
            unknown
        )
        raise UsageError(f"{'; '.join(lines)}. The kernel takes {', '.join(params)}")


def make_launch(name: str, words: list[str], grid: tuple[int, ...] = (1,)) -> Callable[[], object]:
    """A call of "file.py:function" with these arguments; a function that is not a kernel takes none."""
    function = load_function(name)
    if not hasattr(function, "warmup"):
        if words:
            raise UsageError(f"{name} is not a kernel: it takes no arguments")
        return function
    torch.manual_seed(0)
    named = parse_arguments(words)
    check_arguments(function, named)
    return lambda: function[grid](**named)
