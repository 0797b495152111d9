"""What attention can tell besides its result, without its matrix ever being formed: for monitors of training and for
cache eviction. It is computed by blocks of queries, in PyTorch's own operations, and has no gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import autocast, checks, flex, ops
from .backends.reference import existing, keys_of, masked_scores, query_blocks, softmax_weights
from .score import SCHEMA, Score

torch.library.define(
    "flashattn::auxiliary",
    f"(Tensor q, Tensor k, Tensor? bias, Tensor? sinks, {SCHEMA}, str backend, {flex.BLOCKS}, {flex.MODS}) "
    "-> (Tensor max_scores, Tensor max_logit, Tensor entropy, Tensor column_sums)",
)


class AuxRequest(NamedTuple):
    """Which of `AuxOutput` to compute; the first two are those of FlexAttention's AuxRequest."""

    lse: bool = False
    max_scores: bool = False
    max_logit: bool = False
    entropy: bool = False
    column_sums: bool = False


class AuxOutput(NamedTuple):
    """None where not asked for. Scores are those that softmax takes; a row with nothing to attend to has no weights."""

    lse: Tensor | None = None  # (batch, heads, seq_q) float32, natural logarithm; differentiable
    max_scores: Tensor | None = None  # (batch, heads, seq_q) float32: the largest score of each row
    max_logit: Tensor | None = None  # (heads,) float32: the largest of each head
    entropy: Tensor | None = None  # (batch, heads, seq_q) float32, in nats: -sum(p log p) over the keys
    column_sums: Tensor | None = None  # (batch, heads, seq_k) float32: how much weight each key gets, over the queries


def read_request(request, return_lse: bool) -> AuxRequest:
    """Ours, or FlexAttention's with its two fields."""
    if return_lse:
        raise ValueError("return_lse must be False with return_aux, which can ask for lse")
    if isinstance(request, AuxRequest):
        return request
    if not {"lse", "max_scores"} <= set(getattr(request, "_fields", ())):
        raise TypeError(f"return_aux must be a flashattn.AuxRequest, got {type(request).__name__}")
    return AuxRequest(request.lse, request.max_scores)


@torch.no_grad()
@autocast.off
def auxiliary(request: AuxRequest, q: Tensor, k: Tensor, lse: Tensor, score: Score) -> AuxOutput:
    """What is asked for of a call that gave lse; weights are those before dropout."""
    if not any(request[1:]):
        return AuxOutput(lse if request.lse else None)
    if score.score_mod is not None or score.block_mask is not None:
        checks.refuse_capture("return_aux", "with a score_mod or a block_mask it copies from the CPU")
    if ops.is_watched() or q.is_meta:
        computed = flex.call("auxiliary", (q, k, score.bias, score.sinks), score, "reference")
    else:
        computed = compute(q, k, score)
    return AuxOutput(*(x if asked else None for x, asked in zip((lse, *computed), request, strict=True)))


def compute(q: Tensor, k: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(max_scores, max_logit, entropy, column_sums)"""
    shape = (*q.shape[:3], k.shape[2])
    batch, heads, seq_q, seq_k = shape
    q, k = existing(q, score.q_lengths), existing(k, score.kv_lengths).repeat_interleave(heads // k.shape[1], dim=1)
    largest, entropy = (torch.empty(batch, heads, seq_q, dtype=q.dtype, device=q.device) for _ in range(2))
    column_sums = torch.zeros(batch, heads, seq_k, dtype=q.dtype, device=q.device)
    for rows in query_blocks(shape):
        keys = keys_of(score, rows, seq_k, q.device)
        scores, _ = masked_scores(q, keys.of(k, 2), score, shape, rows, keys)
        p, *_ = softmax_weights(scores, score.sinks)
        some = scores.shape[-1] > 0
        largest[:, :, rows] = scores.amax(-1) if some else -math.inf
        entropy[:, :, rows] = -torch.xlogy(p, p).sum(-1)
        keys.add_to(column_sums[..., None], p.sum(2)[..., None])
    max_logit = largest.amax((0, 2)) if batch * seq_q else largest.new_full((heads,), -math.inf)
    return largest, max_logit, entropy, column_sums


@flex.implement_with_autograd("auxiliary")
@torch.no_grad()
def _(q, k, bias, sinks, *settings):
    score, _ = flex.unflat(bias, sinks, settings)
    return compute(q, k, score)


@torch.library.register_fake("flashattn::auxiliary")
def _(q, k, bias, sinks, *_):
    batch, heads, seq_q, _ = q.shape
    shapes = (batch, heads, seq_q), (heads,), (batch, heads, seq_q), (batch, heads, k.shape[2])
    return tuple(q.new_empty(shape, dtype=ops.lse_dtype(q)) for shape in shapes)
