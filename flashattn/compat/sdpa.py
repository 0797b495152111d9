"""`torch.nn.functional.scaled_dot_product_attention`, as PyTorch defines it, on flashattn's backends."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from .. import arguments
from ..attention import attention
from ..errors import raise_as_torch
from . import layout, sdpa_provider  # noqa: F401  (the provider registers its name with PyTorch)

original = torch.nn.functional.scaled_dot_product_attention

# Whether 3-D results keep the memory layout of the query; 4-D results always do.
FOLLOWS_3D = torch.torch_version.TorchVersion(torch.__version__) >= "2.14"


@raise_as_torch
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
            Or nested (batch, heads, seq, head_dim), ragged in seq.
        attn_mask: broadcastable to (..., heads, seq_q, seq_k); bool, True = attend, or floating, added to the scores
            and then differentiable. Or a `torch.nn.attention.bias.CausalBias`, which is never materialised.
        is_causal: query i attends to keys j <= i, aligned top-left whatever the lengths; without attn_mask.
        enable_gqa: the heads of key and value may divide those of query.

    The result has the dimension order of query in memory where PyTorch's own does. A fully masked row gives 0. Dropout
    draws from PyTorch's generator, but drops other weights than PyTorch's own would. An export to ONNX contains
    PyTorch's own call.

    Raises:
        RuntimeError: as PyTorch does, naming the argument. It is a ValueError or a TypeError too.

    >>> import torch
    >>> from flashattn.compat.sdpa import scaled_dot_product_attention
    >>> x = torch.ones(2, 4, 3, 8)
    >>> scaled_dot_product_attention(x, x, x, is_causal=True).shape
    torch.Size([2, 4, 3, 8])
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() < 2:
            raise ValueError(f"{name} must be a tensor (..., seq, head_dim), got shape {tuple(x.shape)}")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None where is_causal is True, as PyTorch has it")
    if torch.onnx.is_in_onnx_export():  # ONNX has PyTorch's own call only
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    causal_bias = attn_mask if isinstance(attn_mask, CausalBias) else None  # a subclass that is handled here
    others = (query, key, value, attn_mask if causal_bias is None else None)
    subclasses = [x for x in others if _has_override(x)]
    if subclasses:
        return _call_override(
            subclasses, query, key, value, attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip
    lower_right = causal_bias is not None and causal_bias.variant == CausalVariant.LOWER_RIGHT
    if causal_bias is not None:
        is_causal, attn_mask = True, None
    if dropout_p == 1:  # nothing is left
        return scaled_dot_product_attention(query, key, value, attn_mask, 0.0, is_causal, scale, enable_gqa) * 0
    if query.is_nested or key.is_nested or value.is_nested:
        return _attend_nested(query, key, value, attn_mask, dropout_p, is_causal, lower_right, scale)
    if not enable_gqa and query.dim() > 2 and query.shape[-3] != key.shape[-3] and 1 not in (
        query.shape[-3], key.shape[-3]
    ):  # fmt: skip
        raise ValueError(f"key must have query's {query.shape[-3]} heads without enable_gqa, got {key.shape[-3]}")
    leading, (q, k, v), mask = _as_4d(query, key, value, attn_mask, enable_gqa)
    seq_q, window = q.shape[2], None
    if lower_right:
        window = (None, 0)
    elif is_causal:
        k, v = k[:, :, :seq_q], v[:, :, :seq_q]  # no query attends to keys past the last query
        window = (None, seq_q - k.shape[2])  # relative to our diagonal, which is aligned bottom-right
    mask, bias = _split_mask(mask)
    out = attention(q, k, v, window=window, mask=mask, bias=bias, dropout_p=dropout_p, scale=scale)
    dims = len(leading) + 2
    if query.dim() == dims == 4:
        return layout.lay_out_like(out, query)
    if query.dim() == dims == 3 and FOLLOWS_3D:
        out = layout.lay_out_like(out, query[None])
    return out.reshape(*leading, seq_q, v.shape[-1])


def _has_override(x) -> TypeGuard[Tensor]:
    """Whether x is a subclass whose __torch_function__ PyTorch would call."""
    if not isinstance(x, Tensor) or not arguments.overrides_functions(x) or x.is_nested:
        return False
    return torch._C._is_torch_function_enabled()


def _call_override(subclasses: list[Tensor], *args, **options) -> Tensor:
    """Dispatch to the subclasses. One with Tensor's own __torch_function__ gets this function to run, one that
    overrides it gets PyTorch's, which it may recognise."""
    function = original if any(map(arguments.has_own_operations, subclasses)) else scaled_dot_product_attention
    return torch.overrides.handle_torch_function(function, subclasses, *args, **options)


def _attend_nested(q, k, v, mask, dropout_p: float, is_causal: bool, lower_right: bool, scale) -> Tensor:
    """Attention of nested tensors (batch, heads, seq, head_dim)."""
    if is_causal and not lower_right and not _has_same_lengths(q, k):
        raise ValueError("key must have query's lengths where is_causal is True and they are nested")
    mask, bias = _split_mask(mask)
    return attention(q, k, v, causal=is_causal, mask=mask, bias=bias, dropout_p=dropout_p, scale=scale)


def _split_mask(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (attn_mask, None) if attn_mask is None or attn_mask.dtype == torch.bool else (None, attn_mask)


def _has_same_lengths(q: Tensor, k: Tensor) -> bool:
    if not (q.is_nested and k.is_nested):
        return True  # attention raises the error
    return [x.shape[1] for x in q.unbind()] == [x.shape[1] for x in k.unbind()]


def _as_4d(query, key, value, mask, enable_gqa) -> tuple[torch.Size, list[Tensor], Tensor | None]:
    """(leading dimensions of the result, [q, k, v], mask), all 4-D. Broadcast dimensions of the mask are not expanded
    unless merging them requires it."""
    tensors = [query, key, value]
    same = 1 if enable_gqa else 2  # leading dimensions that must be equal for nothing to broadcast
    if all(x.dim() == 4 and x.shape[:same] == query.shape[:same] for x in tensors):
        return query.shape[:2], tensors, mask
    # With grouped heads only the dimensions before the heads broadcast.
    kept = 3 if enable_gqa and query.dim() > 2 else 2
    tensors = [x[(None,) * (kept - x.dim())] for x in tensors]
    batch = torch.broadcast_shapes(*(x.shape[:-kept] for x in tensors))
    tensors = [x.expand(*batch, *x.shape[-kept:]) for x in tensors]
    leading = tensors[0].shape[:-2]
    if mask is not None and mask.dim() > len(leading) + 2:
        raise ValueError(
            f"attn_mask must be broadcastable to (..., seq_q, seq_k), of {len(leading) + 2} dimensions, "
            f"got shape {tuple(mask.shape)}"
        )
    while tensors[0].dim() < 4:
        tensors = [x[None] for x in tensors]
    if tensors[0].dim() > 4:
        if mask is not None:
            mask = mask[(None,) * (len(leading) + 2 - mask.dim())]
        split = _choose_split(leading, mask)
        tensors = [_merge_dims(_merge_dims(x, split, x.dim() - 2), 0, split) for x in tensors]
        if mask is not None:
            mask = _merge_dims(_merge_dims(mask, split, len(leading), leading), 0, split, leading)
    return leading, tensors, mask


def _choose_split(leading: torch.Size, mask: Tensor | None) -> int:
    """How many leading dimensions to merge into the batch (the others become the heads), so that the mask broadcasts
    along all or none of each group; all but the last if no number does."""
    last = len(leading) - 1
    if mask is None:
        return last
    for split in range(last, 0, -1):
        parts = (mask.shape[:split], leading[:split]), (mask.shape[split:-2], leading[split:])
        if all(of_mask == full or math.prod(of_mask) == 1 for of_mask, full in parts):
            return split
    return last


def _merge_dims(x: Tensor, start: int, stop: int, full: torch.Size | None = None) -> Tensor:
    """x with dimensions start to stop merged; those of a mask that broadcasts along some of them expanded to `full`."""
    if full is not None and math.prod(x.shape[start:stop]) != 1:
        x = x.expand(*x.shape[:start], *full[start:stop], *x.shape[stop:])
    return x.flatten(start, stop - 1)


_replaced: list[Callable] = []  # the functions that the open `patch` blocks have replaced


@contextlib.contextmanager
def patch() -> Iterator[None]:
    """Replace `torch.nn.functional.scaled_dot_product_attention` by this module's within the block, for the whole
    process: for `nn.MultiheadAttention` and all code that looks it up there when it calls it.

    >>> import torch, flashattn.compat.sdpa
    >>> with flashattn.compat.sdpa.patch():
    ...     y = torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 2, 5, 8))
    """
    functional = torch.nn.functional
    _replaced.append(functional.scaled_dot_product_attention)
    functional.scaled_dot_product_attention = scaled_dot_product_attention
    try:
        yield
    finally:  # blocks of several threads may end in any order
        functional.scaled_dot_product_attention = _replaced.pop()
