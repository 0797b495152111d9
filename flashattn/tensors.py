"""Strided views and result allocation, shared by operators and backends. The CPU engine does the same in `csrc/`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .score import Score


def make_last_dim_contiguous(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else one copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """A view of x as (n0, n1, n2, width), its leading dimensions merged in row-major order; unused ones have size 1
    and come last. Copied once if three are not enough or its last dimension is not contiguous."""
    if x.is_contiguous():
        return x.view(-1, 1, 1, x.shape[-1]) if x.numel() else x.reshape(0, 1, 1, x.shape[-1])
    x = make_last_dim_contiguous(x)
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if strides and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 3:
        return as_rows(x.contiguous())
    unused = 3 - len(sizes)
    return x.as_strided((*sizes, *[1] * unused, x.shape[-1]), (*strides, *[0] * unused, 1))


def new_result(x: Tensor, dim: int, packed: bool) -> Tensor:
    """Uninitialised (batch, heads, seq, dim) for a result. Of packed sequences it is 0, since the last of them may end
    before the tensor does, and in memory (seq, heads, dim), as the caller's q is."""
    batch, heads, seq, _ = x.shape
    if packed:
        return x.new_zeros(batch, seq, heads, dim).transpose(1, 2)
    return x.new_empty(batch, heads, seq, dim)


def new_lse(q: Tensor, score: Score, dtype: torch.dtype) -> Tensor:
    """Memory for lse (batch, heads, seq_q); -inf past the last of packed sequences."""
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    return lse if score.cu_seqlens is None else lse.fill_(-math.inf)


def replace_none(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def plus(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """x + y; None is 0."""
    return x if y is None else y if x is None else x + y


def cast_like(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    """x in the dtype of `like`, a gradient in that of its tensor; None without either."""
    return None if x is None or like is None else x.to(like.dtype)


def find_accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and accumulators: float32, for float64 tensors float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def make_contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def count_norm_heads(*parameters: Tensor | None) -> int:
    """Heads that have parameters of their own; 1 where all rows share them."""
    return next((p.shape[0] for p in parameters if p is not None and p.dim() == 2), 1)


def dropout_threshold(dropout_p: float) -> int:
    """An element is dropped where its 31 random bits are below this."""
    return min(int(dropout_p * 2**31), 2**31 - 1)
