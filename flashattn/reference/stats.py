"""The reference's statistics of attention: what `return_aux` asks for, without the matrix of weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..score import Score
from .attention import softmax
from .scores import compute_scores, split_queries, zero_past_length


def attention_stats(q: Tensor, k: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(max_scores, max_logit, entropy, column_sums), as in `AuxOutput`."""
    shape = (*q.shape[:3], k.shape[2])
    batch, heads, seq_q, seq_k = shape
    q = zero_past_length(q, score.q_lengths)
    k = zero_past_length(k, score.kv_lengths).repeat_interleave(heads // k.shape[1], dim=1)
    max_scores, entropy = (torch.empty(batch, heads, seq_q, dtype=q.dtype, device=q.device) for _ in range(2))
    column_sums = torch.zeros(batch, heads, seq_k, dtype=q.dtype, device=q.device)
    for block in split_queries(score, shape, q.device):
        scores, _ = compute_scores(q, block.keys.select(k, 2), score, block)
        p, *_ = softmax(scores, score.sinks)
        max_scores[:, :, block.queries] = scores.amax(-1) if scores.shape[-1] else -math.inf
        entropy[:, :, block.queries] = -torch.xlogy(p, p).sum(-1)
        block.keys.add_to(column_sums, p.sum(2), 2)
    max_logit = max_scores.amax((0, 2)) if batch * seq_q else max_scores.new_full((heads,), -math.inf)
    return max_scores, max_logit, entropy, column_sums
