"""The dense calls of the `flash_attn` package (FlashAttention-2's names, order and defaults) on flashattn's backends.

Layout (batch, seq, heads, head_dim); `window_size` inclusive, -1 = unbounded; causal aligned bottom-right. Differences:
any dtype and head_dim that flashattn takes; always deterministic; `return_attn_probs` gives (out, softmax_lse, None),
without the weights, which the package itself returns for its own tests only; the lse of a row with nothing to attend to
is -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import attention


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """q (batch, seq_q, heads, head_dim), k and v (batch, seq_k, kv_heads, head_dim), kv_heads dividing heads.

    Returns:
        out (batch, seq_q, heads, head_dim); with return_attn_probs (out, softmax_lse, None), softmax_lse
        (batch, heads, seq_q) float32, natural logarithm.

    >>> import torch
    >>> from flashattn.compat.flash_attn import flash_attn_func
    >>> x = torch.ones(2, 5, 4, 8)
    >>> flash_attn_func(x, x, x, causal=True, window_size=(2, 0)).shape
    torch.Size([2, 5, 4, 8])
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor (batch, seq, heads, head_dim), got {got}")
    out, lse = attention(
        *(x.transpose(1, 2) for x in (q, k, v)), causal=causal, window=_window(window_size), alibi_slopes=alibi_slopes,
        softcap=_softcap(softcap), dropout_p=dropout_p, scale=softmax_scale, return_lse=True,
    )  # fmt: skip
    out = out.transpose(1, 2).contiguous()
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of kv (batch, seq_k, 2, kv_heads, head_dim)."""
    k, v = _unpack("kv", kv, 2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of qkv (batch, seq, 3, heads, head_dim)."""
    q, k, v = _unpack("qkv", qkv, 3)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def _unpack(name: str, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Views of what is packed in dimension 2."""
    if not isinstance(x, Tensor) or x.dim() != 5 or x.shape[2] != parts:
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor (batch, seq, {parts}, heads, head_dim), got {got}")
    return torch.unbind(x, 2)


def _window(window_size) -> tuple[int | None, int | None]:
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise TypeError(f"window_size must be (left, right), each an int, got {window_size!r}") from None
    if min(left, right) < -1:
        raise ValueError(
            f"window_size must be (left, right) with each at least 0, or -1 for no limit, got {window_size}"
        )
    return None if left == -1 else left, None if right == -1 else right


def _softcap(softcap: float) -> float | None:
    if softcap < 0:
        raise ValueError(f"softcap must be at least 0, 0 for no cap, got {softcap}")
    return None if softcap == 0 else float(softcap)
