"""`attention`: check the arguments, build the call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks
from .score import Score


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    kv_lengths: Tensor | None = None,
    q_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention: out = softmax(scale * q k^T) v, in memory linear in the sequence length.

    Args:
        q: (batch, heads, seq_q, head_dim); float32, bfloat16 or float16 (float64 on the reference backend).
        k: (batch, kv_heads, seq_k, head_dim); kv_heads divides heads, and query head h reads key/value head
            h // (heads // kv_heads).
        v: (batch, kv_heads, seq_k, head_dim_v).
        causal: query i sees keys j <= i + seq_k - seq_q (aligned bottom-right).
        kv_lengths: (batch,) integers: keys at or past the length are masked, and never read.
        q_lengths: (batch,) integers: queries at or past the length attend to nothing.
        scale: multiplies the scores; head_dim ** -0.5 by default.
        return_lse: also return the logarithm of each softmax denominator.

    Returns:
        out (batch, heads, seq_q, head_dim_v) in q's dtype; with `return_lse` (out, lse), lse (batch, heads, seq_q)
        float32, natural logarithm. Gradients flow through both. A query with nothing to attend to gives out 0,
        lse -inf and gradient 0.

    Strides are honoured: a transposed or sliced view is not copied (a last dimension that is not contiguous is, once).
    Lengths on the CPU are checked against the sequence; on a GPU they are clamped, to save a synchronisation.

    Raises:
        TypeError, ValueError: naming the argument, before anything runs.

    >>> import torch, flashattn
    >>> q = k = v = torch.ones(1, 8, 5, 64)
    >>> flashattn.attention(q, k, v, causal=True).shape
    torch.Size([1, 8, 5, 64])
    """
    _check(q, k, v)
    batch, _, seq_q, head_dim = q.shape
    score = Score(
        scale=head_dim**-0.5 if scale is None else _scale(scale),
        causal=bool(causal),
        q_lengths=_lengths("q_lengths", q_lengths, batch, seq_q, q.device),
        kv_lengths=_lengths("kv_lengths", kv_lengths, batch, k.shape[2], q.device),
    )
    backend = backends.choose(q.device, q.dtype, head_dim=max(head_dim, v.shape[-1]))
    out, lse = torch.ops.flashattn.attention_forward.default(q, k, v, *score.args, backend)
    return (out, lse) if return_lse else out


def _check(q, k, v) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, seq, head_dim), got shape {tuple(x.shape)}")
        checks.same_dtype(name, x, "q", q)
        checks.same_device(name, x, "q", q)
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch {q.shape[0]}, got {x.shape[0]}")
        if x.shape[1] == 0 or x.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one head and head_dim 1, got shape {tuple(x.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's head_dim {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[1:3] != k.shape[1:3]:
        raise ValueError(f"v must have k's (kv_heads, seq_k) {tuple(k.shape[1:3])}, got {tuple(v.shape[1:3])}")
    if q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"k must have a number of heads that divides q's {q.shape[1]}, got {k.shape[1]}")


def _scale(scale) -> float:
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise TypeError(f"scale must be a float, got {type(scale).__name__}")
    return float(scale)


def _lengths(name: str, lengths, batch: int, seq: int, device: torch.device) -> Tensor | None:
    """Lengths as the kernels read them: contiguous int32 on q's device."""
    if lengths is None:
        return None
    checks.tensor(name, lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {lengths.dtype}")
    if lengths.shape != (batch,):
        raise ValueError(f"{name} must be (batch,) = ({batch},), got shape {tuple(lengths.shape)}")
    if lengths.device.type == "cpu" and batch > 0 and not torch.compiler.is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > seq:
            raise ValueError(f"{name} must be between 0 and the sequence length {seq}, got {low if low < 0 else high}")
    return lengths.to(device=device, dtype=torch.int32).contiguous()
