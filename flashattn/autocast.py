"""PyTorch's autocast. Our calls bypass its lists of operators, so each casts here as its counterpart's list says:
attention runs in autocast's dtype, on the CPU too; norms in float32, but on the CPU, where they are on no list."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeGuard, TypeVar

import torch
from torch import Tensor

from .tracing import mark_constant

Inputs = ParamSpec("Inputs")
Result = TypeVar("Result")


def is_on(x) -> TypeGuard[Tensor]:
    """Whether autocast is enabled for x's device."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, Tensor):
        return False
    kind = x.device.type
    return _is_available(kind) and torch.is_autocast_enabled(kind)


@mark_constant  # Dynamo before 2.12 cannot trace it
def _is_available(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def cast_attention_inputs(q, *others) -> tuple:
    """q and the others, each a tensor or None, as PyTorch's attention takes them under autocast."""
    return cast(torch.get_autocast_dtype(q.device.type), q, *others) if is_on(q) else (q, *others)


def cast_norm_inputs(x, *others) -> tuple:
    """x and the others, each a tensor or None, as PyTorch's norms take them under autocast."""
    return cast(torch.float32, x, *others) if is_on(x) and x.device.type != "cpu" else (x, *others)


def cast(dtype: torch.dtype, first: Tensor, *others) -> tuple:
    """All in dtype, except tensors that are not floating, are float64 or on another device: autocast leaves these."""
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        and x.device.type == first.device.type else x
        for x in (first, *others)
    )  # fmt: skip


def disable(function: Callable[Inputs, Result]) -> Callable[Inputs, Result]:
    """Decorator: disable autocast on the device of the first tensor argument."""

    @functools.wraps(function)
    def without(*args: Inputs.args, **options: Inputs.kwargs) -> Result:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **options)
        first = next((x for x in (*args, *options.values()) if isinstance(x, Tensor)), None)
        if not is_on(first):
            return function(*args, **options)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **options)

    return without
