"""`linear`: the product of a linear layer, with the few rows of a generation step at the speed of memory on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import backends, ops

FEW = 32  # rows; more of them are PyTorch's


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as `torch.nn.functional.linear`, which does it in all but one case.

    A step of generation multiplies one row, or one of each sequence, by every weight of a model, so it lasts as long as
    reading them does. On a CPU PyTorch's product packs weights anew in each call; there, where no gradient is needed,
    up to 32 rows go through the native engine (`python -m bench cpu linear`).

    Args:
        x: (..., in); weight: (out, in); bias: (out,) or None; float32, bfloat16 or float16, all of one dtype.

    Returns:
        (..., out), in x's dtype, summed in float32.

    >>> import torch, flashattn
    >>> flashattn.linear(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([11., 17.])
    """
    if not _is_few_rows_on_the_engine(x, weight, bias):
        return functional.linear(x, weight, bias)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    backends.cpu.ops.linear.default(x.contiguous(), weight, None if bias is None else bias.float(), y)
    return y


def _is_few_rows_on_the_engine(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    # Counted in microseconds: a step of generation asks it hundreds of times. What is cheap and often false goes first,
    # but for what a compiler would make guards of.
    if ops.is_watched() or torch._C._is_any_autocast_enabled():
        return False
    count, shape = x.numel(), weight.shape
    if not x.is_cpu or len(shape) != 2 or not 0 < count <= FEW * shape[1] or x.shape[-1:] != shape[1:]:
        return False
    if weight.dtype != x.dtype or weight.stride(1) != 1:
        return False
    if torch.is_grad_enabled() and _needs_gradient(x, weight, bias):
        return False
    if bias is not None and (bias.dtype != x.dtype or bias.shape != shape[:1]):
        return False
    return ops.are_plain(x, weight, bias) and backends.serves("cpu", "cpu", x.dtype)


def _needs_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
