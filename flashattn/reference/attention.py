"""The reference's attention: eager PyTorch, in blocks of queries, so that memory is linear in the sequence length. It
computes in float32 for 16-bit inputs, and takes every call. `naive.py` has the formulas without blocks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast, tracing
from ..protocol import Saved
from ..score import Score
from ..tensors import cast_like, dropout_threshold, find_accumulation_dtype, new_lse, new_result
from .philox import philox
from .scores import QueryBlock, compute_scores, slice_queries, split_queries, zero_past_length


class PackedSequence(NamedTuple):
    """One of packed sequences."""

    batch: int
    queries: slice
    keys: slice

    def slice_scores(self, x: Tensor | None) -> Tensor | None:
        """The part of a mask or a bias (batch, heads, max_seqlen_q, max_seqlen_k) for this sequence."""
        if x is None:
            return None
        x = x if x.shape[0] == 1 else x[self.batch : self.batch + 1]
        x = x if x.shape[2] == 1 else x[:, :, : self.queries.stop - self.queries.start]
        return x if x.shape[3] == 1 else x[..., : self.keys.stop - self.keys.start]

    def own_score(self, score: Score) -> Score:
        """The Score of this sequence by itself."""
        slopes = score.alibi_slopes
        if slopes is not None and slopes.shape[0] > 1:
            slopes = slopes[self.batch : self.batch + 1]
        return score._replace(
            q_lengths=None, kv_lengths=None, cu_seqlens=None, alibi_slopes=slopes,
            mask=self.slice_scores(score.mask), bias=self.slice_scores(score.bias),
        )  # fmt: skip


def unpack_sequences(cu_seqlens: Tensor) -> Iterator[PackedSequence]:
    tracing.refuse_capture("cu_seqlens", "without the triton backend it is read back")
    starts_q, starts_k = cu_seqlens.tolist()
    ranges = zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True)
    for batch, (queries, keys) in enumerate(ranges):
        yield PackedSequence(batch, slice(*queries), slice(*keys))


def dropout_multiplier(score: Score, block: QueryBlock, first_batch: int, dtype: torch.dtype) -> Tensor | float:
    """The dropout multipliers of the weights (batch, heads, queries, keys): 0 or 1 / (1 - p). The four words of Philox,
    of 7 rounds, at (j // 4, i, batch * heads + head, 0) serve four keys."""
    if score.dropout_p == 0:
        return 1.0
    assert score.seed is not None
    (batch, heads, seq_q, seq_k), device = block.shape, block.keys.positions.device
    head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1) + first_batch * heads
    i = torch.arange(seq_q, device=device)[block.queries].view(-1, 1)
    quarter = torch.arange((seq_k + 3) // 4, device=device)
    words = torch.stack(philox(score.seed.view(()), quarter, i, head, rounds=7), -1).flatten(-2)[..., :seq_k]
    keep = block.keys.select(words) >> 1 >= dropout_threshold(score.dropout_p)
    return keep.to(dtype) / (1 - score.dropout_p)


def softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(p, lse, rest): p = exp(s) / (sum(exp(s)) + exp(sink)), lse the logarithm of that sum, rest its rounding error;
    0, -inf and 0 for a fully masked row. Not p = exp(s - lse): beside scores of -1e9 the logarithm of a sum of a
    thousand is rounded away, and such weights would sum to a thousand."""
    if scores.shape[-1] == 0:
        lse = scores.new_full((*scores.shape[:-1], 1), -math.inf)
        return scores, lse, torch.zeros_like(lse)
    largest = scores.amax(-1, keepdim=True)
    masked = largest == -math.inf
    largest = torch.where(masked, 0, largest)
    if sinks is not None:
        sinks = sinks.to(scores.dtype).view(-1, 1, 1)
        largest = torch.maximum(largest, sinks)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - largest)
    log = total.log()
    lse = largest + log
    rest = log - (lse - largest)
    return torch.where(masked, 0, weights / total), torch.where(masked, -math.inf, lse), torch.where(masked, 0, rest)


# ------------------------------------------------------------------------------------------------ forward


def forward(q: Tensor, k: Tensor, v: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor]:
    """out = softmax(s) v, lse = log(sum(exp(s)) + exp(sink)), and the rest of lse."""
    if score.cu_seqlens is None:
        return forward_dense(q, k, v, score)
    out, lse = new_result(q, v.shape[-1], True), new_lse(q, score, find_accumulation_dtype(q))
    rest = torch.zeros_like(lse)
    for one in unpack_sequences(score.cu_seqlens):
        own = (q[:, :, one.queries], k[:, :, one.keys], v[:, :, one.keys], one.own_score(score))
        results = forward_dense(*own, one.batch)
        out[:, :, one.queries], lse[:, :, one.queries], rest[:, :, one.queries] = results
    return out, lse, rest


@autocast.disable
def forward_dense(q: Tensor, k: Tensor, v: Tensor, score: Score, first_batch: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` without packed sequences. `first_batch`: which batch row the first is for dropout."""
    dtype, group = q.dtype, q.shape[1] // k.shape[1]
    q = zero_past_length(q, score.q_lengths)
    k, v = (zero_past_length(x, score.kv_lengths).repeat_interleave(group, dim=1) for x in (k, v))
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=dtype, device=q.device)
    lse, rest = (torch.empty(q.shape[:3], dtype=q.dtype, device=q.device) for _ in range(2))
    for block in split_queries(score, (*q.shape[:3], k.shape[2]), q.device):
        scores, _ = compute_scores(q, block.keys.select(k, 2), score, block)
        p, *logarithms = softmax(scores, score.sinks)
        p = p * dropout_multiplier(score, block, first_batch, q.dtype)
        out[:, :, block.queries] = (p @ block.keys.select(v, 2)).to(dtype)
        lse[:, :, block.queries], rest[:, :, block.queries] = (x.squeeze(-1) for x in logarithms)
    return out, lse, rest


# ------------------------------------------------------------------------------------------------ backward


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, with_grad_bias: bool,
    grad_captured: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """With the weights p, dropped to p', and dp' = grad_out v^T: ds = p * (dp - rowsum(p * dp) + grad_lse)."""
    q, k, v = saved[:3]
    bias, grad_bias = score.bias if with_grad_bias else None, None
    if bias is not None:
        grad_bias = torch.zeros_like(bias, dtype=find_accumulation_dtype(q))
    if score.cu_seqlens is None:
        gradients = backward_dense(grad_out, grad_lse, q, k, v, score, grad_bias, grad_captured)
    else:
        grad_q, grad_k, grad_v = (new_result(x, x.shape[-1], True) for x in (q, k, v))
        gradients = grad_q, grad_k, grad_v
        for one in unpack_sequences(score.cu_seqlens):
            i, j = one.queries, one.keys
            of_lse = None if grad_lse is None else grad_lse[:, :, i]
            own = (grad_out[:, :, i], of_lse, q[:, :, i], k[:, :, j], v[:, :, j], one.own_score(score))
            results = backward_dense(*own, one.slice_scores(grad_bias), grad_captured, one.batch)
            for total, part, result in zip(gradients, (i, j, j), results, strict=True):
                total[:, :, part] = result
    return *gradients, cast_like(grad_bias, bias)


def add_bias_gradient(grad_bias: Tensor, of_scores: Tensor, block: QueryBlock) -> None:
    """Add that of a block's scores, summed where the bias is broadcast."""
    total = slice_queries(grad_bias, block.queries)
    sizes = [*total.shape[:3], min(total.shape[3], of_scores.shape[3])]
    block.keys.add_to(total, of_scores.sum_to_size(sizes), 3)


@autocast.disable
def backward_dense(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, score: Score,
    grad_bias: Tensor | None, grad_captured: list[Tensor | None], first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v; those of the bias and of captured tensors are added to those given."""
    dtype, group = q.dtype, q.shape[1] // k.shape[1]
    q, grad_out = (zero_past_length(x, score.q_lengths) for x in (q, grad_out))
    if grad_lse is not None:
        grad_lse = zero_past_length(grad_lse[..., None], score.q_lengths)
    k, v = (zero_past_length(x, score.kv_lengths).repeat_interleave(group, dim=1) for x in (k, v))
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for block in split_queries(score, (*q.shape[:3], k.shape[2]), q.device):
        k_block, v_block = block.keys.select(k, 2), block.keys.select(v, 2)
        scores, vjp = compute_scores(q, k_block, score, block)
        p, *_ = softmax(scores, score.sinks)
        kept = dropout_multiplier(score, block, first_batch, q.dtype)
        do = grad_out[:, :, block.queries]
        dp = do @ v_block.mT * kept
        delta = (p * dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[:, :, block.queries]
        of_bias, ds = vjp(p * (dp - delta), grad_captured)
        if grad_bias is not None:
            add_bias_gradient(grad_bias, of_bias, block)
        ds = ds * score.scale
        grad_q[:, :, block.queries] = ds @ k_block
        block.keys.add_to(grad_k, ds.mT @ q[:, :, block.queries], 2)
        block.keys.add_to(grad_v, (p * kept).mT @ do, 2)
    grad_k, grad_v = (g.unflatten(1, (-1, group)).sum(2) for g in (grad_k, grad_v))
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)
