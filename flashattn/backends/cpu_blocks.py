"""Block masks on the CPU engine: some hundred queries at a time, with the keys from the first to the last block that
one of them looks at, under a mask written out for these alone. Memory stays linear; the rest is the engine's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .reference import is_set, of_rows, positions

if TYPE_CHECKING:
    from ..score import Score

ROWS = 256  # queries at a time


class Part(NamedTuple):
    """Some queries, the keys they are compared with, and their Score."""

    rows: slice
    keys: slice
    score: Score


def takes(score: Score) -> bool:
    """Whether a part's Score can say what the whole one says: ALiBi and dropout count from places it does not know."""
    return score.score_mod is None and score.slopes is None and score.dropout_p == 0


def parts(score: Score, batch: int, heads: int, seq_q: int, seq_k: int) -> Iterator[Part]:
    """The queries in parts; one without keys has an empty slice of them."""
    for start in range(0, seq_q, ROWS):
        rows = slice(start, min(start + ROWS, seq_q))
        chosen = score.block_mask.keys_of(rows, seq_k)
        keys = slice(int(chosen[0]), int(chosen[-1]) + 1) if chosen.numel() else slice(0, 0)
        yield Part(rows, keys, part_of(score, batch, heads, seq_q, seq_k, rows, keys))


def part_of(score: Score, batch: int, heads: int, seq_q: int, seq_k: int, rows: slice, keys: slice) -> Score:
    device = score.block_mask.partial.device
    i, j = (
        torch.arange(rows.start, rows.stop, device=device)[:, None],
        torch.arange(keys.start, keys.stop, device=device),
    )
    mask = score.block_mask.visible(*positions(batch, heads, i, j))
    mask = mask.expand(*mask.shape[:2], i.shape[0], j.shape[0])
    if score.mask is not None:
        mask = mask & is_set(of_keys(of_rows(score.mask, rows), keys))
    # The diagonal of the whole, seen from the part, is so far from the part's own.
    moved = (rows.start + seq_k - seq_q - keys.start) - (j.shape[0] - i.shape[0])
    return score._replace(
        left=None if score.left is None else score.left - moved,
        right=None if score.right is None else score.right + moved,
        q_lengths=shifted(score.q_lengths, rows),
        kv_lengths=shifted(score.kv_lengths, keys),
        mask=mask.contiguous(),
        bias=None if score.bias is None else of_keys(of_rows(score.bias, rows), keys),
        block_mask=None,
    )


def of_keys(x: Tensor, keys: slice) -> Tensor:
    return x if x.shape[3] == 1 else x[..., keys]


def shifted(lengths: Tensor | None, part: slice) -> Tensor | None:
    return None if lengths is None else (lengths - part.start).clamp(0, part.stop - part.start).int()


def forward(run, q: Tensor, k: Tensor, v: Tensor, score: Score) -> tuple[Tensor, Tensor, Tensor]:
    """`run`: the engine's forward, of a Score without callables."""
    batch, heads, seq_q, _ = q.shape
    out = q.new_empty(batch, heads, seq_q, v.shape[3])
    lse, rest = (q.new_zeros(batch, heads, seq_q, dtype=torch.float32) for _ in range(2))
    for rows, keys, part in parts(score, batch, heads, seq_q, k.shape[2]):
        if keys.start == keys.stop:
            out[:, :, rows], lse[:, :, rows] = 0, -math.inf
        else:
            results = run(q[:, :, rows], k[:, :, keys], v[:, :, keys], part)
            out[:, :, rows], lse[:, :, rows], rest[:, :, rows] = results
    return out, lse, rest


def backward(
    run, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rest: Tensor, score: Score, with_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`run`: the engine's backward. In float32, since the gradients of the parts are added up."""
    dtypes = [x.dtype for x in (q, k, v)]
    q, k, v, grad_out, out = (x.float() for x in (q, k, v, grad_out, out))
    bias = score.bias
    if bias is not None:
        score = score._replace(bias=bias.float())
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
    grad_bias = q.new_zeros(bias.shape) if with_grad_bias else None
    batch, heads, seq_q, _ = q.shape
    for rows, keys, part in parts(score, batch, heads, seq_q, k.shape[2]):
        if keys.start == keys.stop:
            continue
        grad_lse_rows = None if grad_lse is None else grad_lse[:, :, rows]
        grad_q[:, :, rows], part_k, part_v, part_bias = run(
            grad_out[:, :, rows], grad_lse_rows, q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows],
            lse[:, :, rows].contiguous(), rest[:, :, rows].contiguous(), part, with_grad_bias,
        )  # fmt: skip
        grad_k[:, :, keys] += part_k
        grad_v[:, :, keys] += part_v
        if with_grad_bias:
            of_keys(of_rows(grad_bias, rows), keys).add_(part_bias)
    gradients = (x.to(dtype) for x, dtype in zip((grad_q, grad_k, grad_v), dtypes, strict=True))
    return *gradients, grad_bias.to(bias.dtype) if with_grad_bias else None
