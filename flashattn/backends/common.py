"""What the Python of the backends shares: how tensors of any strides are looked at, dropout, and the norm's heads.
The CPU engine does the same in `csrc/ops.cpp`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..score import Score


class Block:
    """One of those that set something: itself and no other, as `list.remove` compares them."""

    def __init__(self, value):
        self.value = value


class Setting:
    """What a block of code sets for the whole process while it lasts. Blocks of several threads may overlap: of those
    that have not ended, the one that began last counts."""

    def __init__(self, value):
        self._blocks = [Block(value)]

    @property
    def value(self):
        return self._blocks[-1].value

    @contextlib.contextmanager
    def during(self, value: Any) -> Iterator[None]:
        block = Block(value)
        self._blocks.append(block)
        try:
            yield
        finally:
            self._blocks.remove(block)


def last_dim_contiguous(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else one copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def rows(x: Tensor | None) -> Tensor | None:
    """x seen as (n0, n1, n2, width), its leading dimensions merged in row-major order; those not needed have size 1
    and come last. Copied once if three are not enough or its last dimension is not contiguous."""
    if x is None:
        return None
    if x.is_contiguous():
        return x.view(-1, 1, 1, x.shape[-1]) if x.numel() else x.reshape(0, 1, 1, x.shape[-1])
    x = last_dim_contiguous(x)
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
        return rows(x.contiguous())
    unused = 3 - len(sizes)
    return x.as_strided((*sizes, *[1] * unused, x.shape[-1]), (*strides, *[0] * unused, 1))


def result_like(x: Tensor, dim: int, packed: bool) -> Tensor:
    """Uninitialised (batch, heads, seq, dim) for a result. Of packed sequences it is 0, since the last of them may end
    before the tensor does, and token after token in memory, as the caller's q is."""
    batch, heads, seq, _ = x.shape
    if packed:
        return x.new_zeros(batch, seq, heads, dim).transpose(1, 2)
    return x.new_empty(batch, heads, seq, dim)


def new_lse(q: Tensor, score: Score, dtype: torch.dtype) -> Tensor:
    """Memory for lse (batch, heads, seq_q); -inf past the last of packed sequences."""
    lse = torch.empty(q.shape[:3], dtype=dtype, device=q.device)
    return lse if score.cu_seqlens is None else lse.fill_(-math.inf)


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def norm_heads(*parameters: Tensor | None) -> int:
    """Heads that have parameters of their own; 1 where all rows share them."""
    return next((p.shape[0] for p in parameters if p is not None and p.dim() == 2), 1)


def dropout_threshold(dropout_p: float) -> int:
    """An element is dropped where its 31 random bits are below this."""
    return min(int(dropout_p * 2**31), 2**31 - 1)
