"""Attention as the formulas say it, without a fused kernel or a saved byte: the page to read first, and the truth that
the tests hold every backend to, in float64. It forms the whole matrix of scores and computes in q's dtype, by PyTorch's
own differentiable operations.

    s = scale * q k^T;  s = softcap * tanh(s / softcap);  s += bias - slope * distance;  s = -inf where masked
    p = exp(s) / (sum(exp(s)) + exp(sink));  out = dropout(p) v;  lse = log(sum(exp(s)) + exp(sink))
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False,
    window: tuple[int | None, int | None] | None = None, mask: Tensor | None = None, bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    q_lengths: Tensor | None = None, kv_lengths: Tensor | None = None, dropout: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse). Arguments as in `flashattn.attention`; `dropout` multiplies the weights."""
    batch, heads, seq_q, head_dim = q.shape
    seq_k, group = k.shape[2], heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    distance = diagonal_distance(seq_q, seq_k, q.device)
    attends = attend_mask(distance, causal, window, mask, q_lengths, kv_lengths).expand(batch, -1, -1, -1)
    some = attends.any(-1, keepdim=True)

    s = q @ k.mT * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - (alibi_slopes.to(s.dtype)[..., None, None] * distance.abs()).to(s.dtype)
    if bias is not None:
        s = s + bias
    s = s.masked_fill(~attends, -torch.inf).masked_fill(~some, 0)  # 0 keeps NaN out of the gradient
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype).view(-1, 1, 1).expand(batch, heads, seq_q, 1)], -1)

    p = torch.where(some & attends, s.softmax(-1)[..., :seq_k], 0)
    wide = s if s.dtype == torch.float64 else s.float()
    lse = torch.logsumexp(wide, -1) if s.shape[-1] else wide.sum(-1)
    return (p * torch.as_tensor(dropout).to(p)) @ v, torch.where(some[..., 0], lse, -torch.inf)


def diagonal_distance(seq_q: int, seq_k: int, device: torch.device) -> Tensor:
    """(seq_q, seq_k): how far each key is past its query, both counted from the end (bottom-right alignment)."""
    i, j = torch.arange(seq_q, device=device), torch.arange(seq_k, device=device)
    return j - i[:, None] - (seq_k - seq_q)


def attend_mask(distance, causal, window, mask, q_lengths, kv_lengths) -> Tensor:
    """(batch or 1, heads or 1, seq_q, seq_k): which pairs attend."""
    left, right = window or (None, None)
    i, j = (torch.arange(size, device=distance.device) for size in distance.shape)
    attends = torch.ones_like(distance, dtype=torch.bool)[None, None]
    if causal:
        attends = attends & (distance <= 0)
    if left is not None:
        attends = attends & (distance >= -left)
    if right is not None:
        attends = attends & (distance <= right)
    if q_lengths is not None:
        attends = attends & (i < q_lengths[:, None])[:, None, :, None]
    if kv_lengths is not None:
        attends = attends & (j < kv_lengths[:, None])[:, None, None]
    return attends if mask is None else attends & mask
