"""The reference's derivatives beyond the first gradients: forward mode, and the product of a Hessian with tangents. In
blocks of queries, as `attention.py`. `kernels/README.md` derives the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import autocast
from ..protocol import Saved, Tangents
from ..score import Score
from ..tensors import cast_like, find_accumulation_dtype, new_lse, new_result
from .attention import PackedSequence, add_bias_gradient, dropout_multiplier, softmax, unpack_sequences
from .scores import (
    MAX_SCORES,
    Pieces,
    QueryBlock,
    add_pieces,
    attend_mask,
    select_bias,
    select_pieces,
    split_queries,
    zero_past_length,
)

BLOCK_SCORES = MAX_SCORES // 4  # at a time: a derivative keeps dozens of matrices of them


class Linearized(NamedTuple):
    """The scores of a block of queries, -inf where masked, and their tangent. All derivatives of what changes scores
    are PyTorch's own, of `add_pieces` and of the score_mod's graph."""

    scores: Tensor  # (batch, heads, queries, keys)
    tangent: Tensor  # 0 where masked
    # (ds, its tangent, totals) to the gradient of scale * q.k and the tangents of those of the bias, not summed, and of
    # scale * q.k; adds the tangents of the gradients of what a score_mod captured to `totals`.
    vjp: Callable[[Tensor, Tensor, list], tuple[Tensor, Tensor, Tensor]]


def linearize_scores(x: Tensor, tangent_x: Tensor, score: Score, tangents: Tangents, block: QueryBlock) -> Linearized:
    """The scores made of x = scale * q.k. A score_mod that captured tensors gets the pairs that attend alone: the
    indices of others may be outside of these, and a NaN there would be in the sums that are their gradients."""
    attends = attend_mask(score, block).expand_as(x)
    mod = score.score_mod
    everywhere = mod is None or not mod.captured or attends.all()
    pairs = None if everywhere else attends.nonzero(as_tuple=True)

    def gather(values: Tensor) -> Tensor:
        return values.expand_as(x) if pairs is None else values.expand_as(x)[pairs]

    def gather_if_given(values: Tensor | None) -> Tensor | None:
        return None if values is None else gather(values)

    def scatter(values: Tensor) -> Tensor:
        values = values.detach()
        return torch.where(attends, values if pairs is None else torch.zeros_like(x).index_put(pairs, values), 0)

    pieces = Pieces(*map(gather_if_given, select_pieces(score, block, x.dtype)))
    captured = () if mod is None else mod.captured
    moving = [n for n, c in enumerate(captured) if c.is_floating_point()]
    inputs = [gather(x), x.new_zeros(()) if pieces.bias is None else pieces.bias, *(captured[n] for n in moving)]
    directions = [gather(tangent_x), gather_if_given(select_bias(tangents.bias, block, x.dtype))]
    directions += [tangents.captured[n] for n in moving]
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in inputs]
        scores = add_pieces(leaves[0], score.softcap, pieces._replace(bias=leaves[1]))
        if mod is not None:
            own = dict(zip(moving, leaves[2:], strict=True))
            graph_inputs = (own.get(n, c) for n, c in enumerate(captured))
            changed = mod.graph.forward(scores, *map(gather, block.indices), *graph_inputs)
            changed = changed.to(x.dtype).broadcast_to(scores.shape)
            scores = torch.where(scores.isnan(), scores, changed)  # which depend on scores even where it is a constant
        # The vjp is linear in the gradient u that it takes; its derivative by u is the jvp.
        u = torch.zeros_like(scores, requires_grad=True)
        given = {n: direction for n, direction in enumerate(directions) if direction is not None}
        products = differentiate(scores, [leaves[n] for n in given], u)
        along = [direction.to(p.dtype) for direction, p in zip(given.values(), products, strict=True)]
        (tangent,) = differentiate(products, [u], along)

    def vjp(ds: Tensor, tangent_ds: Tensor, totals: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
        needed = {n: total for n, total in enumerate(totals) if total is not None}
        of = [*leaves[:2], *(leaves[2 + moving.index(n)] for n in needed)]
        ds, tangent_ds = gather(ds), gather(tangent_ds)
        (dx,) = differentiate(scores, leaves[:1], ds)
        # d(ds . tangent + tangent_ds . scores), of constant ds and tangent_ds, is the tangent of the vjp of ds. The
        # tangent of linear scores is a constant.
        of_tangent = ([tangent], [ds]) if tangent.requires_grad else ([], [])
        tangent_dx, of_bias, *of_captured = differentiate([*of_tangent[0], scores], of, [*of_tangent[1], tangent_ds])
        for total, gradient in zip(needed.values(), of_captured, strict=True):
            total.add_(gradient.detach())
        return scatter(dx), scatter(of_bias.expand_as(tangent_dx)), scatter(tangent_dx)

    return Linearized(scatter(scores).masked_fill(~attends, -math.inf), scatter(tangent), vjp)


def differentiate(results, by: list, gradients=None) -> tuple[Tensor, ...]:
    """`torch.autograd.grad`, which can be differentiated again, with 0 where there is no dependence."""
    return torch.autograd.grad(
        results, by, gradients, create_graph=True, retain_graph=True, allow_unused=True, materialize_grads=True
    )


class Inputs(NamedTuple):
    """q (batch, heads, seq, dim), k and v with as many heads, in the accumulation dtype, 0 past each length, and their
    tangents."""

    q: Tensor
    k: Tensor
    v: Tensor
    tangent_q: Tensor
    tangent_k: Tensor
    tangent_v: Tensor


def read_inputs(q: Tensor, k: Tensor, v: Tensor, score: Score, tangents: Tangents) -> Inputs:
    group = q.shape[1] // k.shape[1]

    def read(x: Tensor, tangent: Tensor | None, lengths: Tensor | None, repeats: int) -> tuple[Tensor, Tensor]:
        x = zero_past_length(x, lengths).repeat_interleave(repeats, dim=1)
        if tangent is None:
            return x, torch.zeros_like(x)
        return x, zero_past_length(tangent, lengths).repeat_interleave(repeats, dim=1)

    pairs = (
        read(q, tangents.q, score.q_lengths, 1),
        read(k, tangents.k, score.kv_lengths, group),
        read(v, tangents.v, score.kv_lengths, group),
    )
    return Inputs(*(x for x, _ in pairs), *(tangent for _, tangent in pairs))


class BlockWeights(NamedTuple):
    """The weights p of a block of queries, and what their derivatives need."""

    linear: Linearized
    p: Tensor
    lse: Tensor  # (batch, heads, queries, 1), as rest and tangent_lse
    rest: Tensor
    tangent_lse: Tensor
    kept: Tensor | float  # the dropout multipliers
    k: Tensor  # of the block's keys, as the others
    v: Tensor
    tangent_k: Tensor
    tangent_v: Tensor


def compute_block(
    inputs: Inputs, score: Score, tangents: Tangents, block: QueryBlock, first_batch: int
) -> BlockWeights:
    """tangent_lse = sum(p * tangent of s) + p_sink * tangent of the sink."""
    of_keys = k, _, tangent_k, _ = [
        block.keys.select(x, 2) for x in (inputs.k, inputs.v, inputs.tangent_k, inputs.tangent_v)
    ]
    q, tangent_q = inputs.q[:, :, block.queries], inputs.tangent_q[:, :, block.queries]
    x, tangent_x = q @ k.mT * score.scale, (tangent_q @ k.mT + q @ tangent_k.mT) * score.scale
    linear = linearize_scores(x, tangent_x, score, tangents, block)
    p, lse, rest = softmax(linear.scores, score.sinks)
    tangent_lse = (p * linear.tangent).sum(-1, keepdim=True)
    if score.sinks is not None and tangents.sinks is not None:
        sinks, moved = (s.to(x.dtype).view(-1, 1, 1) for s in (score.sinks, tangents.sinks))
        tangent_lse = torch.where(lse == -torch.inf, 0, tangent_lse + torch.exp(sinks - lse - rest) * moved)
    kept = dropout_multiplier(score, block, first_batch, x.dtype)
    return BlockWeights(linear, p, lse, rest, tangent_lse, kept, *of_keys)


def slice_tangents(tangents: Tangents, one: PackedSequence) -> Tangents:
    """Those of one packed sequence."""
    return tangents.select(one.queries, one.keys, one.slice_scores(tangents.bias))


# ------------------------------------------------------------------------------------------------ forward mode


def jvp(
    q: Tensor, k: Tensor, v: Tensor, score: Score, tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if score.cu_seqlens is None:
        return jvp_dense(q, k, v, score, tangents)
    out, tangent_out = (new_result(q, v.shape[-1], True) for _ in range(2))
    lse = new_lse(q, score, find_accumulation_dtype(q))
    results = out, lse, torch.zeros_like(lse), tangent_out, torch.zeros_like(lse)
    for one in unpack_sequences(score.cu_seqlens):
        i, j = one.queries, one.keys
        own = q[:, :, i], k[:, :, j], v[:, :, j], one.own_score(score), slice_tangents(tangents, one)
        for total, x in zip(results, jvp_dense(*own, one.batch), strict=True):
            total[:, :, i] = x
    return results


@torch.no_grad()
@autocast.disable
def jvp_dense(
    q: Tensor, k: Tensor, v: Tensor, score: Score, tangents: Tangents, first_batch: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """tangent_out = (dropout(p * (tangent of s - tangent_lse)) v + dropout(p) tangent_v."""
    dtype, inputs = q.dtype, read_inputs(q, k, v, score, tangents)
    out, tangent_out = (torch.empty(*q.shape[:3], v.shape[-1], dtype=dtype, device=q.device) for _ in range(2))
    lse, rest, tangent_lse = (torch.empty(q.shape[:3], dtype=inputs.q.dtype, device=q.device) for _ in range(3))
    for block in split_queries(score, (*q.shape[:3], k.shape[2]), q.device, BLOCK_SCORES):
        w, i = compute_block(inputs, score, tangents, block, first_batch), block.queries
        kept = w.p * w.kept
        out[:, :, i] = (kept @ w.v).to(dtype)
        tangent_out[:, :, i] = (kept * (w.linear.tangent - w.tangent_lse) @ w.v + kept @ w.tangent_v).to(dtype)
        for total, x in ((lse, w.lse), (rest, w.rest), (tangent_lse, w.tangent_lse)):
            total[:, :, i] = x.squeeze(-1)
    return out, lse, rest, tangent_out, tangent_lse


# ------------------------------------------------------------------------------------------------ second derivatives


def hvp(
    grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, tangents: Tangents, tangent_out: Tensor,
    tangent_lse: Tensor, with_grad_bias: bool, grad_captured: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    q, k, v = saved[:3]
    bias, grad_bias = score.bias if with_grad_bias else None, None
    if bias is not None:
        grad_bias = torch.zeros_like(bias, dtype=find_accumulation_dtype(q))
    if score.cu_seqlens is None:
        gradients = hvp_dense(grad_out, grad_lse, q, k, v, score, tangents, grad_bias, grad_captured)
        return *gradients, cast_like(grad_bias, bias)
    grad_q, grad_k, grad_v = (new_result(x, x.shape[-1], True) for x in (q, k, v))
    for one in unpack_sequences(score.cu_seqlens):
        i, j = one.queries, one.keys
        of_lse = None if grad_lse is None else grad_lse[:, :, i]
        own = grad_out[:, :, i], of_lse, q[:, :, i], k[:, :, j], v[:, :, j], one.own_score(score)
        totals = one.slice_scores(grad_bias), grad_captured
        results = hvp_dense(*own, slice_tangents(tangents, one), *totals, one.batch)
        for total, part, result in zip((grad_q, grad_k, grad_v), (i, j, j), results, strict=True):
            total[:, :, part] = result
    return grad_q, grad_k, grad_v, cast_like(grad_bias, bias)


@torch.no_grad()
@autocast.disable
def hvp_dense(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, score: Score, tangents: Tangents,
    grad_bias: Tensor | None, grad_captured: list[Tensor | None], first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The tangents of ds = p * (dp - delta) and of what backward makes of it, with those of p, p * (tangent of s -
    tangent_lse), of dp, grad_out tangent_v^T, and of delta. Those of the gradients of the bias and of captured tensors
    are added to those given."""
    dtype, group = q.dtype, q.shape[1] // k.shape[1]
    inputs = read_inputs(q, k, v, score, tangents)
    grad_out = zero_past_length(grad_out, score.q_lengths)
    if grad_lse is not None:
        grad_lse = zero_past_length(grad_lse[..., None], score.q_lengths)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in inputs[:3])
    for block in split_queries(score, (*q.shape[:3], k.shape[2]), q.device, BLOCK_SCORES):
        w, i = compute_block(inputs, score, tangents, block, first_batch), block.queries
        do = grad_out[:, :, i]
        dp, tangent_dp = (do @ x.mT * w.kept for x in (w.v, w.tangent_v))
        tangent_p = w.p * (w.linear.tangent - w.tangent_lse)
        delta = (w.p * dp).sum(-1, keepdim=True)
        tangent_delta = (tangent_p * dp + w.p * tangent_dp).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta = delta - grad_lse[:, :, i]
        ds = w.p * (dp - delta)
        tangent_ds = tangent_p * (dp - delta) + w.p * (tangent_dp - tangent_delta)
        dx, of_bias, tangent_dx = w.linear.vjp(ds, tangent_ds, grad_captured)
        if grad_bias is not None:
            add_bias_gradient(grad_bias, of_bias, block)
        dx, tangent_dx = dx * score.scale, tangent_dx * score.scale
        grad_q[:, :, i] = tangent_dx @ w.k + dx @ w.tangent_k
        of_keys = tangent_dx.mT @ inputs.q[:, :, i] + dx.mT @ inputs.tangent_q[:, :, i]
        block.keys.add_to(grad_k, of_keys, 2)
        block.keys.add_to(grad_v, (tangent_p * w.kept).mT @ do, 2)
    grad_k, grad_v = (g.unflatten(1, (-1, group)).sum(2) for g in (grad_k, grad_v))
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)
