"""`torch.nn.attention.flex_attention.flex_attention` on flashattn's backends: without torch.compile, with memory linear
in the sequence, and with gradients on the CPU too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ..attention import attention
from ..auxiliary import AuxOutput, read_request
from ..errors import raise_as_torch
from .layout import lay_out_like

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import AuxRequest as FlexAuxRequest
    from torch.nn.attention.flex_attention import BlockMask

    from ..auxiliary import AuxRequest


@raise_as_torch
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict | None = None,
    *,
    return_aux: AuxRequest | FlexAuxRequest | None = None,
) -> Tensor | tuple[Tensor, Tensor | AuxOutput]:
    """PyTorch's call: softmax(score_mod(scale * query key^T)) value, where block_mask attends.

    Args:
        query: (batch, heads, seq_q, head_dim); key, value: (batch or 1, kv_heads, seq_k, head_dim).
        score_mod: (score, batch, head, q_idx, kv_idx) -> score. Tensors that it captures get gradients.
        block_mask: of `create_block_mask`. Empty blocks are masked and skipped, as in PyTorch's compiled kernels.
        enable_gqa: the heads of key and value may divide those of query.
        kernel_options: ignored; they tune PyTorch's own kernels.
        return_aux: an `AuxRequest` of FlexAttention or of flashattn, which has more fields.

    Returns:
        out, in memory in the order of query's dimensions; with return_lse (out, lse); with return_aux (out,
        flashattn.AuxOutput).

    >>> import torch
    >>> from flashattn.compat.flex import flex_attention
    >>> q = k = v = torch.ones(1, 2, 5, 8)
    >>> flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score - (i - j).abs()).shape
    torch.Size([1, 2, 5, 8])
    """
    if getattr(getattr(block_mask, "mask_mod", None), "__name__", None) == "_sliced_mask_mod_error":
        raise ValueError("block_mask must not be a part of another, got one that was sliced: its mask_mod is lost")
    if not enable_gqa and query.dim() == key.dim() == 4 and query.shape[1] != key.shape[1]:
        raise ValueError(f"key must have query's {query.shape[1]} heads without enable_gqa, got {key.shape[1]}")
    if key.dim() == value.dim() == query.dim() == 4 and key.shape[0] == 1 < query.shape[0]:
        key, value = (x.expand(query.shape[0], -1, -1, -1) for x in (key, value))
    request = None if return_aux is None else read_request(return_aux, return_lse)
    result = attention(
        query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scale, return_lse=return_lse,
        return_aux=request,
    )  # fmt: skip
    if isinstance(result, tuple):
        return lay_out_like(result[0], query), result[1]
    return lay_out_like(result, query)
