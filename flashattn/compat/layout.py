"""Where results lie in memory: PyTorch's attention leaves them in the order of the query's dimensions, and callers rely
on it, as in `out.transpose(1, 2).view(batch, seq, -1)`."""

from __future__ import annotations

from torch import Tensor


def follow(out: Tensor, query: Tensor) -> Tensor:
    """out (batch, heads, seq, dim), copied where it does not lie in the order of query's dimensions. A query whose last
    dimension is not contiguous, or whose memory says no order, asks for nothing."""
    strides = query.stride()
    if strides[3] != 1 or 0 in strides:
        return out
    order: list[int] = []
    for d in range(3):  # of strides that are symbols Dynamo can compare two, and not sort
        order.insert(sum(strides[d] <= strides[other] for other in order), d)
    if order == [0, 1, 2]:
        return out.contiguous()
    back = sorted(range(3), key=lambda d: order[d])
    return out.permute(*order, 3).contiguous().permute(*back, 3)


def by_token(x: Tensor) -> Tensor:
    """(batch, heads, seq, ...), token after token in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
