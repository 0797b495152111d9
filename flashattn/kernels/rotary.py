"""Rotary position embedding, and the writing of new keys and values into a cache: one kernel, since the rotation is
free where memory is moved.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), arXiv:2104.09864.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .compiler import kernel
from .decode import cached_rows


class RotaryArgs(NamedTuple):
    cos: tl.tensor  # (positions, n)
    sin: tl.tensor
    stride: tl.tensor  # from position to position, of both


@triton.jit
def rotated(row, x, cols, positions, mask, rotary, N: tl.constexpr, INTERLEAVED: tl.constexpr):
    """x, which was loaded from row + cols, with the pairs among its first 2 N columns rotated."""
    if INTERLEAVED:
        partner = cols ^ 1
        angle = cols // 2
        first = cols % 2 == 0
    else:
        first = cols < N
        partner = tl.where(first, cols + N, cols - N)
        angle = tl.where(first, cols, cols - N)
    turned = mask & (cols < 2 * N)[None, :]
    other = tl.load(row[:, None] + partner[None, :], mask=turned, other=0.0).to(tl.float32)
    at = positions.to(tl.int64)[:, None] * rotary.stride + angle[None, :]
    cos = tl.load(rotary.cos + at, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(rotary.sin + at, mask=turned, other=0.0).to(tl.float32)
    return x.to(tl.float32) * cos + other * tl.where(first[None, :], -sin, sin)


@kernel(do_not_specialize=["heads", "seq"])
def rotate_and_store(
    x, to, pages, starts, counts, rotary, heads, seq,
    APPEND: tl.constexpr, N: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Token t of a batch row, at position starts[batch] + t, rotated (or with rotary None as it is), goes to row t of
    `to`, or with APPEND to its position in a cache. Tokens at and past counts[batch], where given, are left out.

    Grid: (tiles of tokens * heads * batch,).
    """
    tiles = tl.cdiv(seq, BLOCK_ROWS)
    program = tl.program_id(0)
    tokens = program % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = program // tiles % heads
    batch = program // tiles // heads
    exists = tokens < seq
    if counts is not None:
        exists = exists & (tokens < tl.load(counts + batch))
    positions = tl.load(starts + batch) + tokens
    cols = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (cols < HEAD_DIM)[None, :]
    row = x.ptr + tl.cast(batch, tl.int64) * x.stride_batch + tl.cast(head, tl.int64) * x.stride_head
    row += tokens.to(tl.int64) * x.stride_seq
    value = tl.load(row[:, None] + cols[None, :], mask=mask, other=0.0)
    if rotary is not None:
        value = rotated(row, value, cols, positions, mask, rotary, N, INTERLEAVED)
    if APPEND:
        target = cached_rows(to, pages, batch, head, positions, exists)
    else:
        target = cached_rows(to, None, batch, head, tokens, exists)
    tl.store(target[:, None] + cols[None, :], value.to(to.ptr.dtype.element_ty), mask=mask)
