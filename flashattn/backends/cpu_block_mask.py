"""Block masks on the CPU engine: some hundred queries at a time, with the keys from the first to the last of their
active blocks, under a mask written out for these alone. Memory stays linear; the engine does the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..protocol import Saved, Tangents
from ..reference.scores import Keys, QueryBlock, is_set, slice_queries
from ..score import Score
from ..score_mod import BlockMask
from ..tensors import cast_like

QUERIES = 256  # at a time


class Part(NamedTuple):
    """Some queries, the keys they are compared with, and their Score."""

    queries: slice
    keys: slice
    score: Score


def supports(score: Score) -> bool:
    """Whether the call can be split: ALiBi and dropout depend on positions that a part's Score lacks."""
    return score.score_mod is None and score.alibi_slopes is None and score.dropout_p == 0


def split_queries(score: Score, shape: tuple[int, int, int, int]) -> Iterator[Part]:
    """The queries of a call of this (batch, heads, seq_q, seq_k) in parts; one without keys has an empty slice."""
    (seq_q, seq_k), blocks = shape[2:], score.block_mask
    assert blocks is not None
    for start in range(0, seq_q, QUERIES):
        queries = slice(start, min(start + QUERIES, seq_q))
        active = blocks.select_keys(queries, seq_k)
        keys = slice(int(active[0]), int(active[-1]) + 1) if active.numel() else slice(0, 0)
        yield Part(queries, keys, make_part_score(score, blocks, shape, queries, keys))


def make_part_score(
    score: Score, blocks: BlockMask, shape: tuple[int, int, int, int], queries: slice, keys: slice
) -> Score:
    seq_q, seq_k = shape[2:]
    positions = torch.arange(keys.start, keys.stop, device=blocks.partial.device)
    block = QueryBlock(shape, queries, Keys(positions, positions))
    mask = blocks.attend_mask(*block.indices)
    mask = mask.expand(*mask.shape[:2], queries.stop - queries.start, keys.stop - keys.start)
    if score.mask is not None:
        mask = mask & is_set(slice_keys(slice_queries(score.mask, queries), keys))
    # The call's diagonal minus the part's, in the part's positions.
    moved = (queries.start + seq_k - seq_q - keys.start) - (mask.shape[3] - mask.shape[2])
    return score._replace(
        left=None if score.left is None else score.left - moved,
        right=None if score.right is None else score.right + moved,
        q_lengths=shift_lengths(score.q_lengths, queries),
        kv_lengths=shift_lengths(score.kv_lengths, keys),
        mask=mask.contiguous(),
        bias=None if score.bias is None else slice_keys(slice_queries(score.bias, queries), keys),
        block_mask=None,
    )


def slice_keys(x: Tensor, keys: slice) -> Tensor:
    """The part of a mask or a bias for these keys."""
    return x if x.shape[3] == 1 else x[..., keys]


def slice_tangents(tangents: Tangents, queries: slice, keys: slice) -> Tangents:
    bias = None if tangents.bias is None else slice_keys(slice_queries(tangents.bias, queries), keys)
    return tangents.select(queries, keys, bias)


def shift_lengths(lengths: Tensor | None, part: slice) -> Tensor | None:
    return None if lengths is None else (lengths - part.start).clamp(0, part.stop - part.start).int()


# ------------------------------------------------------------------------------------------------ rows of queries


def forward(run: Callable, q: Tensor, k: Tensor, v: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor]:
    """`run`: the engine's forward, of a Score without callables."""

    def call(i: slice, j: slice, part: Score) -> tuple:
        return run(q[:, :, i], k[:, :, j], v[:, :, j], part)

    rows = new_rows(q, v)
    fill_rows(rows, call, score, (*q.shape[:3], k.shape[2]))
    return rows


def jvp(
    run: Callable, q: Tensor, k: Tensor, v: Tensor, score: Score, tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`run`: the engine's jvp."""

    def call(i: slice, j: slice, part: Score) -> tuple:
        return run(q[:, :, i], k[:, :, j], v[:, :, j], part, slice_tangents(tangents, i, j))

    out, lse, rest = new_rows(q, v)
    rows = out, lse, rest, torch.zeros_like(out), torch.zeros_like(lse)
    fill_rows(rows, call, score, (*q.shape[:3], k.shape[2]))
    return rows


def new_rows(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, rest) of queries that attend to nothing."""
    rest = q.new_zeros(q.shape[:3], dtype=torch.float32)
    return q.new_zeros(*q.shape[:3], v.shape[3]), torch.full_like(rest, -math.inf), rest


def fill_rows(rows: tuple[Tensor, ...], call: Callable, score: Score, shape: tuple[int, int, int, int]) -> None:
    """Write the results of `call` for each part that has keys."""
    for i, j, part in split_queries(score, shape):
        if j.start < j.stop:
            for total, x in zip(rows, call(i, j, part), strict=True):
                total[:, :, i] = x


# ------------------------------------------------------------------------------------------------ sums over queries


def backward(
    run: Callable, grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, with_grad_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`run`: the engine's backward."""
    grad_out = grad_out.float()

    def call(i: slice, _: slice, part: Score, own: Saved) -> tuple:
        return run(grad_out[:, :, i], slice_rows(grad_lse, i), own, part, with_grad_bias)

    return sum_parts(call, saved, score, with_grad_bias)


def hvp(
    run: Callable, grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, score: Score, tangents: Tangents,
    tangent_out: Tensor, tangent_lse: Tensor, with_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`run`: the engine's hvp."""
    grad_out, tangent_out = grad_out.float(), tangent_out.float()
    tangents = Tangents._make((*(None if x is None else x.float() for x in tangents[:5]), ()))

    def call(i: slice, j: slice, part: Score, own: Saved) -> tuple:
        moved = slice_tangents(tangents, i, j), tangent_out[:, :, i], tangent_lse[:, :, i]
        return run(grad_out[:, :, i], slice_rows(grad_lse, i), own, part, *moved, with_grad_bias)

    return sum_parts(call, saved, score, with_grad_bias)


def slice_rows(x: Tensor | None, queries: slice) -> Tensor | None:
    return None if x is None else x[:, :, queries].contiguous()


def sum_parts(
    call: Callable, saved: Saved, score: Score, with_grad_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of q, k, v and the bias that `call` computes for each part. In float32, since they are summed."""
    q, k, v, out = (x.float() for x in saved[:4])
    bias, grad_bias = score.bias, None
    if bias is not None:
        score = score._replace(bias=bias.float())
        grad_bias = q.new_zeros(bias.shape) if with_grad_bias else None
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
    for i, j, part in split_queries(score, (*q.shape[:3], k.shape[2])):
        if j.start == j.stop:
            continue
        lse, rest = saved.lse[:, :, i].contiguous(), slice_rows(saved.rest, i)
        own = Saved(q[:, :, i], k[:, :, j], v[:, :, j], out[:, :, i], lse, rest)
        grad_q[:, :, i], part_k, part_v, part_bias = call(i, j, part, own)
        grad_k[:, :, j] += part_k
        grad_v[:, :, j] += part_v
        if grad_bias is not None:
            slice_keys(slice_queries(grad_bias, i), j).add_(part_bias)
    dtype = saved.q.dtype
    return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype), cast_like(grad_bias, bias)
