"""How the native backends look at tensors of any strides."""

from __future__ import annotations

from torch import Tensor


def last_dim_contiguous(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else one copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def row_view(x: Tensor) -> tuple[Tensor, tuple[int, int, int], tuple[int, int, int]]:
    """x's leading dimensions merged into three: (tensor, sizes, strides), in row-major order. The unused ones have
    size 1 and come last. x is copied once if it needs more than three or its last dimension is not contiguous."""
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
        return row_view(x.contiguous())
    unused = 3 - len(sizes)
    return x, (*sizes, *[1] * unused), (*strides, *[0] * unused)
