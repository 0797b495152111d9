"""The reference's scores: scale * q.k through every piece of a `Score`, for a block of queries, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..score import Score
from ..score_mod import Traced
from ..tensors import find_accumulation_dtype

MAX_SCORES = 1 << 20  # at a time: some 100 MiB in a backward pass, as fast on a CPU as more
Vjp = Callable[[Tensor, list], Tensor]
ScoreGradients = Callable[[Tensor, list], tuple[Tensor, Tensor]]


class Keys(NamedTuple):
    """The keys that a block of queries is compared with: all, or those of a block mask's active blocks."""

    positions: Tensor  # (keys,)
    selected: Tensor | None = None  # the same where they are not all

    def select(self, x: Tensor, dim: int = -1) -> Tensor:
        """The part of x for these keys; x may be broadcast along them."""
        return x if self.selected is None or x.shape[dim] == 1 else x.index_select(dim, self.selected)

    def add_to(self, total: Tensor, x: Tensor, dim: int) -> None:
        """total += x, which has only these keys."""
        total.add_(x) if self.selected is None or total.shape[dim] == 1 else total.index_add_(dim, self.selected, x)


class QueryBlock(NamedTuple):
    """Some of the queries of a call, and their keys."""

    shape: tuple[int, int, int, int]  # (batch, heads, seq_q, seq_k) of the call
    queries: slice
    keys: Keys

    @property
    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Batch rows, heads, queries and keys as a score_mod takes them: int32, and they broadcast."""
        batch, heads, seq_q, _ = self.shape
        device = self.keys.positions.device
        b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(heads, device=device).view(-1, 1, 1)
        i = torch.arange(seq_q, device=device)[self.queries].view(-1, 1)
        return b.int(), h.int(), i.int(), self.keys.positions.int()


def slice_queries(x: Tensor, queries: slice) -> Tensor:
    """The part of a mask or a bias for these queries."""
    return x if x.shape[2] == 1 else x[:, :, queries]


def split_queries(
    score: Score, shape: tuple[int, int, int, int], device: torch.device, max_scores: int = MAX_SCORES
) -> Iterator[QueryBlock]:
    """The queries of a call in blocks of some `max_scores` scores."""
    batch, heads, seq_q, seq_k = shape
    size = max(16 * max_scores // MAX_SCORES, 1, min(256, max_scores // max(1, batch * heads * seq_k)))
    keys = Keys(torch.arange(seq_k, device=device))
    for start in range(0, seq_q, size):
        queries = slice(start, min(start + size, seq_q))
        if score.block_mask is not None:
            selected = score.block_mask.select_keys(queries, seq_k)
            keys = Keys(selected, selected)
        yield QueryBlock(shape, queries, keys)


def attend_mask(score: Score, block: QueryBlock) -> Tensor:
    """(batch, 1 or heads, queries, keys) bool: which keys each query attends to."""
    batch, _, seq_q, seq_k = block.shape
    _, _, i, j = block.indices
    attends = torch.ones(batch, 1, i.shape[0], j.shape[0], dtype=torch.bool, device=j.device)
    first, last = score.bounds(seq_q, seq_k)
    if first is not None:
        attends = attends & (j >= i + first)
    if last is not None:
        attends = attends & (j <= i + last)
    if score.q_lengths is not None:
        attends = attends & (i < score.q_lengths.view(-1, 1, 1, 1))
    if score.kv_lengths is not None:
        attends = attends & (j < score.kv_lengths.view(-1, 1, 1, 1))
    if score.mask is not None:
        attends = attends & is_set(block.keys.select(slice_queries(score.mask, block.queries)))
    if score.block_mask is not None:
        attends = attends & score.block_mask.attend_mask(*block.indices)
    return attends


def is_set(mask: Tensor) -> Tensor:
    """The mask in bytes of 0 and 1: a bool view of other bytes has others, and & takes them bit by bit."""
    return mask.view(torch.uint8) != 0


def zero_past_length(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (batch, heads, seq, dim) in the accumulation dtype, with 0 at and past each length: memory there may hold NaN,
    and 0 * NaN is NaN."""
    x = x.to(find_accumulation_dtype(x))
    if lengths is None:
        return x
    exists = torch.arange(x.shape[2], device=x.device) < lengths.view(-1, 1)
    return torch.where(exists[:, None, :, None], x, 0)


class Pieces(NamedTuple):
    """What is added to the scores of a block of queries; they broadcast."""

    alibi: Tensor | None
    bias: Tensor | None


def select_pieces(score: Score, block: QueryBlock, dtype: torch.dtype) -> Pieces:
    _, _, seq_q, seq_k = block.shape
    _, _, i, j = block.indices
    alibi = None
    if score.alibi_slopes is not None:
        alibi = -score.alibi_slopes[:, :, None, None].to(dtype) * (i + seq_k - seq_q - j).abs()
    return Pieces(alibi, select_bias(score.bias, block, dtype))


def select_bias(bias: Tensor | None, block: QueryBlock, dtype: torch.dtype) -> Tensor | None:
    """The part of a bias, or of its tangent, for a block."""
    return None if bias is None else block.keys.select(slice_queries(bias, block.queries)).to(dtype)


def add_pieces(x: Tensor, softcap: float | None, pieces: Pieces) -> Tensor:
    """Scores from x = scale * q.k, without score_mod and masks: softcap * tanh(x / softcap) + alibi + bias. In
    differentiable operations, of which `derivatives.py` takes all derivatives."""
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    for piece in pieces:
        x = x if piece is None else x + piece
    return x


def compute_scores(q: Tensor, k: Tensor, score: Score, block: QueryBlock) -> tuple[Tensor, ScoreGradients]:
    """(scores, vjp): scores with -inf where masked, (batch, heads, queries, keys), from all queries and the block's
    keys. vjp(gradient, totals) takes their gradient back to those of the bias, not summed, and of scale * q.k, and adds
    those of the tensors that a score_mod captured to `totals`."""
    x = q[:, :, block.queries] @ k.mT * score.scale
    scores = add_pieces(x, score.softcap, select_pieces(score, block, x.dtype))
    attends = attend_mask(score, block)
    vjp_of_mod: Vjp | None = None
    if score.score_mod is not None:
        scores, vjp_of_mod = apply_score_mod(score.score_mod, scores, block.indices, attends)

    def vjp(gradient: Tensor, totals: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        of_bias = gradient if vjp_of_mod is None else vjp_of_mod(gradient, totals)
        if score.softcap is None:
            return of_bias, of_bias
        return of_bias, of_bias * (1 - torch.tanh(x / score.softcap).square())

    return scores.masked_fill(~attends, -math.inf), vjp


# ------------------------------------------------------------------------------------------------ score_mod


def apply_score_mod(mod: Traced, scores: Tensor, indices: tuple[Tensor, ...], attends: Tensor) -> tuple[Tensor, Vjp]:
    """Scores through a score_mod, and `vjp` as above. Only pairs that attend count: the indices of others may be
    outside of the tensors that it captured, and its derivative may be infinite there."""
    try:
        # (On a GPU an index outside of a tensor ends the process.)
        only_attending = scores.is_cuda and mod.has_indexing
        apply = apply_where(attends) if only_attending else apply_everywhere
        result, gradients = apply(mod, scores, indices)
    except IndexError:
        result, gradients = apply_where(attends)(mod, scores, indices)

    def vjp(gradient: Tensor, totals: list[Tensor | None]) -> Tensor:
        needed = {n: total for n, total in enumerate(totals) if total is not None}
        of_scores, *of_captured = gradients(gradient, list(needed))
        if not all(x.isfinite().all() for x in of_captured):  # 0 * inf
            _, *of_captured = apply_where(attends)(mod, scores, indices)[1](gradient, list(needed))
        for total, x in zip(needed.values(), of_captured, strict=True):
            total.add_(x)
        return torch.where(gradient == 0, 0, of_scores)

    return result, vjp


Gradients = Callable[[Tensor, list[int]], Sequence[Tensor]]


def apply_everywhere(mod: Traced, scores: Tensor, indices: tuple[Tensor, ...]) -> tuple[Tensor, Gradients]:
    """(scores through a score_mod, gradients): gradients(gradient, needed) are those of the scores and of the captured
    tensors with these numbers."""
    with torch.enable_grad():
        inputs = [scores.detach().requires_grad_()]
        inputs += [x.detach().requires_grad_(x.is_floating_point()) for x in mod.captured]
        result = mod.graph.forward(inputs[0], *indices, *inputs[1:]).to(scores.dtype).broadcast_to(scores.shape)

    def gradients(gradient: Tensor, needed: list[int]) -> Sequence[Tensor]:
        of = [inputs[0], *(inputs[n + 1] for n in needed)]
        if not result.requires_grad:
            return [torch.zeros_like(x) for x in of]
        return torch.autograd.grad(result, of, gradient, allow_unused=True, materialize_grads=True)

    return result.detach(), gradients


def apply_where(attends: Tensor) -> Callable[[Traced, Tensor, tuple[Tensor, ...]], tuple[Tensor, Gradients]]:
    """`apply_everywhere` for the pairs that attend alone; other scores are 0, and so are their gradients."""

    def apply(mod, scores, indices):
        pairs = attends.expand_as(scores).nonzero(as_tuple=True)
        of_pairs = (x.expand_as(scores)[pairs] for x in indices)
        values, gradients_of_pairs = apply_everywhere(mod, scores[pairs], tuple(of_pairs))

        def scatter(values: Tensor) -> Tensor:
            return torch.zeros_like(scores).index_put(pairs, values)

        def gradients(gradient: Tensor, needed: list[int]) -> list[Tensor]:
            of_scores, *of_captured = gradients_of_pairs(gradient[pairs], needed)
            return [scatter(of_scores), *of_captured]

        return scatter(values), gradients

    return apply
