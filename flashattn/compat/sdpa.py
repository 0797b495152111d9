"""`torch.nn.functional.scaled_dot_product_attention`, as PyTorch defines it, on flashattn's backends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..attention import attention
from ..backends.common import Setting
from . import layout, sdpa_provider  # noqa: F401  (makes its name known to PyTorch)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's call: softmax(scale * query key^T + attn_mask) value.

    Args:
        query: (..., heads, seq_q, head_dim); key, value: (..., heads, seq_k, head_dim), leading dimensions broadcast.
        attn_mask: broadcastable to (..., heads, seq_q, seq_k); bool, True = attend, or floating, added to the scores.
            It gets a gradient then.
        is_causal: query i sees keys j <= i, counted from the top left whatever the lengths; without attn_mask.
        enable_gqa: the heads of key and value may divide those of query.

    The result lies in memory in the order of query's dimensions. A query with nothing to attend to gives 0. Dropout
    draws from PyTorch's generator, but drops other weights than PyTorch's own would.

    >>> import torch
    >>> from flashattn.compat.sdpa import scaled_dot_product_attention
    >>> x = torch.ones(2, 4, 3, 8)
    >>> scaled_dot_product_attention(x, x, x, is_causal=True).shape
    torch.Size([2, 4, 3, 8])
    """
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None where is_causal is True, as PyTorch has it")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor) or x.dim() < 2:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor (..., seq, head_dim), got {got}")
    if not enable_gqa and query.dim() > 2 and query.shape[-3] != key.shape[-3] and 1 not in (
        query.shape[-3], key.shape[-3]
    ):  # fmt: skip
        raise ValueError(f"key must have query's {query.shape[-3]} heads without enable_gqa, got {key.shape[-3]}")
    leading, (q, k, v), mask = _four_dimensions(query, key, value, attn_mask, enable_gqa)
    seq_q, window = q.shape[2], None
    if is_causal:
        k, v = k[:, :, :seq_q], v[:, :, :seq_q]  # keys past the last query are seen by none
        window = (None, seq_q - k.shape[2])  # counted from our diagonal, which ends at the bottom right
    options = {} if mask is None else {"mask" if mask.dtype == torch.bool else "bias": mask}
    out = attention(q, k, v, window=window, dropout_p=dropout_p, scale=scale, **options)
    if query.dim() == 4:
        return layout.follow(out, query)
    return out.reshape(*leading, seq_q, v.shape[-1])


def _four_dimensions(query, key, value, mask, enable_gqa) -> tuple[torch.Size, list[Tensor], Tensor | None]:
    """(leading dimensions of the result, [q, k, v], mask), all of four dimensions."""
    tensors = [query, key, value]
    same = 1 if enable_gqa else 2  # leading dimensions that are the same where nothing broadcasts
    if all(x.dim() == 4 and x.shape[:same] == query.shape[:same] for x in tensors):
        return query.shape[:2], tensors, mask
    # With grouped heads these stay as they are, and only what stands before them broadcasts.
    kept = 3 if enable_gqa and query.dim() > 2 else 2
    tensors = [x[(None,) * (kept - x.dim())] for x in tensors]
    batch = torch.broadcast_shapes(*(x.shape[:-kept] for x in tensors))
    tensors = [x.expand(*batch, *x.shape[-kept:]) for x in tensors]
    leading = tensors[0].shape[:-2]
    if mask is not None and mask.dim() > 4:
        mask = mask.expand(*leading, *mask.shape[-2:]).flatten(0, len(leading) - 2)
    while tensors[0].dim() < 4:
        tensors = [x[None] for x in tensors]
    return leading, [x.flatten(0, -4) if x.dim() > 4 else x for x in tensors], mask


_patched = Setting(
    torch.nn.functional.scaled_dot_product_attention,
    lambda function: setattr(torch.nn.functional, "scaled_dot_product_attention", function),
)


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """Within the block `torch.nn.functional.scaled_dot_product_attention` is this module's, for the whole process:
    for `nn.MultiheadAttention`, and for all code that looks it up there when it calls it.

    >>> import torch, flashattn.compat.sdpa
    >>> with flashattn.compat.sdpa.patch():
    ...     y = torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 5, 8))
    """
    with _patched.during(scaled_dot_product_attention):
        yield
