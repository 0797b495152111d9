"""Statistics of the attention weights, for training monitors and cache eviction. They are computed by blocks of
queries, never from the whole matrix, in PyTorch's own operations, and have no gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import autocast, ops, tracing
from .backends import BACKENDS
from .score import Score


class AuxRequest(NamedTuple):
    """Which of `AuxOutput` to compute; the first two are those of FlexAttention's AuxRequest."""

    lse: bool = False
    max_scores: bool = False
    max_logit: bool = False
    entropy: bool = False
    column_sums: bool = False


class AuxOutput(NamedTuple):
    """None where not requested. Scores are those that softmax takes; a fully masked row has no weights."""

    lse: Tensor | None = None  # (batch, heads, seq_q) float32, natural logarithm; differentiable
    max_scores: Tensor | None = None  # (batch, heads, seq_q) float32: the largest score of each row
    max_logit: Tensor | None = None  # (heads,) float32: the largest of each head
    entropy: Tensor | None = None  # (batch, heads, seq_q) float32, in nats: -sum(p log p) over the keys
    column_sums: Tensor | None = None  # (batch, heads, seq_k) float32: the weight of each key, summed over the queries


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
@autocast.disable
def compute(request: AuxRequest, q: Tensor, k: Tensor, lse: Tensor, score: Score, backend: str) -> AuxOutput:
    """The requested statistics of a call with this lse. Weights are those before dropout."""
    if not any(request[1:]):
        return AuxOutput(lse if request.lse else None)
    tracing.refuse_tangents("return_aux", q, k, score.bias)
    if score.score_mod is not None or score.block_mask is not None:
        tracing.refuse_capture("return_aux", "with a score_mod or a block_mask it copies from the CPU")
    if tracing.must_dispatch() or q.is_meta:
        stats = ops.attention.dispatch("attention_stats", (q, k), score, backend)
    else:
        stats = BACKENDS[backend].attention_stats(q, k, score)
    return AuxOutput(*(x if asked else None for x, asked in zip((lse, *stats), request, strict=True)))
