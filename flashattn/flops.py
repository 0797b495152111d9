"""FLOPs of attention's operators for PyTorch's FlopCounterMode: as for its own operators, all pairs of a query and a
key, masked or not; in packed sequences, the pairs within each sequence."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from . import ops, tracing  # noqa: F401  (ops registers the operators)
from .score import SCORE_FIELDS, Score


@register_flop_formula(torch.ops.flashattn.attention_forward, get_raw=True)
def count_forward(q, k, v, *flat, out_val=None, **_) -> int:
    """q k^T and p v."""
    return 2 * count_pairs(q, k, flat) * (q.shape[3] + v.shape[3])


@register_flop_formula(torch.ops.flashattn.attention_backward, get_raw=True)
def count_backward(
    grad_out, grad_lse, q, k, v, out, lse, rest, with_grad_bias, with_grad_captured, *flat, out_val=None, **_
) -> int:
    """q k^T again, the gradients of q, k and v, and that of p."""
    return 2 * count_pairs(q, k, flat) * (3 * q.shape[3] + 2 * v.shape[3])


def count_pairs(q, k, flat: tuple) -> int:
    """Of all heads and sequences; packed ones whose lengths cannot be read count as if all were as long as the
    longest."""
    score = Score(*flat[:SCORE_FIELDS])
    heads = q.shape[1]
    if score.cu_seqlens is None:
        return q.shape[0] * heads * q.shape[2] * k.shape[2]
    if tracing.has_data(score.cu_seqlens):
        lengths_q, lengths_k = score.cu_seqlens.diff().tolist()
        return heads * sum(a * b for a, b in zip(lengths_q, lengths_k, strict=True))
    batch, seq_q, seq_k = score.sizes(q, k)
    return heads * batch * seq_q * seq_k
