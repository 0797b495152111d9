"""`linear`: the product of a linear layer, with the few rows of a decode step at the speed of memory on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import backends, tracing


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, as `torch.nn.functional.linear`, which does it in all but one case.

    A decode step multiplies one row, or one of each sequence, by every weight of a model, so it lasts as long as
    reading them. On a CPU PyTorch's product packs weights anew in each call; where no gradient is needed, up to 32 rows
    go through the native engine instead (`python -m bench cpu linear`).

    Args:
        x: (..., in); weight: (out, in); bias: (out,) or None; float32, bfloat16 or float16, all of one dtype.

    Returns:
        (..., out), in x's dtype, summed in float32.

    >>> import torch, flashattn
    >>> flashattn.linear(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]))
    tensor([11., 17.])
    """
    if _is_plain_inference(x, weight, bias):
        selected = backends.find(x.device, x.dtype)
        if selected is not None:
            return backends.BACKENDS[selected].linear(x, weight, bias)
    return functional.linear(x, weight, bias)


def _is_plain_inference(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if tracing.must_dispatch() or torch._C._is_any_autocast_enabled() or not x.is_cpu:
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return False
    return tracing.has_no_subclass(x, weight, bias)
