"""The memory layout of results: PyTorch's attention keeps the dimension order of the query, and callers rely on it, as
in `out.transpose(1, 2).view(batch, seq, -1)`."""

from __future__ import annotations

from torch import Tensor


def lay_out_like(out: Tensor, query: Tensor) -> Tensor:
    """out (batch, heads, seq, dim) in the dimension order of query's memory, copied if it has another. A query whose
    last dimension is not contiguous, or whose strides define no order, leaves out as it is."""
    strides = query.stride()
    if strides[3] != 1 or 0 in strides:
        return out
    order: list[int] = []
    for d in range(3):  # Dynamo can compare symbolic strides, but not sort them
        order.insert(sum(strides[d] <= strides[other] for other in order), d)
    if order == [0, 1, 2]:
        return out.contiguous()
    back = sorted(range(3), key=lambda d: order[d])
    return out.permute(*order, 3).contiguous().permute(*back, 3)


def lay_out_by_token(x: Tensor) -> Tensor:
    """x (batch, heads, seq, ...), copied to memory as (batch, seq, heads, ...)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
