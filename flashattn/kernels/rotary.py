"""Rotary position embedding, and appending new keys and values to a cache: one kernel, since the rotation costs nothing
beside the memory traffic, and one launch for q, k and v, since a decode step is short.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), arXiv:2104.09864.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .compiler import kernel
from .pages import cache_row_pointers


class RotaryArgs(NamedTuple):
    cos: tl.tensor  # (positions, n)
    sin: tl.tensor
    stride: tl.tensor  # from position to position, of both


@triton.jit
def apply_rotary(row, x, cols, positions, mask, rotary, N: tl.constexpr, INTERLEAVED: tl.constexpr):
    """x, which was loaded from row + cols, with the pairs of its first 2 N columns rotated."""
    if INTERLEAVED:
        partner = cols ^ 1
        angle = cols // 2
        first = cols % 2 == 0
    else:
        first = cols < N
        partner = tl.where(first, cols + N, cols - N)
        angle = tl.where(first, cols, cols - N)
    rotated = mask & (cols < 2 * N)[None, :]
    other = tl.load(row[:, None] + partner[None, :], mask=rotated, other=0.0).to(tl.float32)
    at = positions.to(tl.int64)[:, None] * rotary.stride + angle[None, :]
    cos = tl.load(rotary.cos + at, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(rotary.sin + at, mask=rotated, other=0.0).to(tl.float32)
    return x.to(tl.float32) * cos + other * tl.where(first[None, :], -sin, sin)


@triton.jit
def token_pointers(x, batch, head, tokens):
    """Pointers to rows of a (batch, heads, seq, dim) tensor."""
    row = x.ptr + tl.cast(batch, tl.int64) * x.stride_batch + tl.cast(head, tl.int64) * x.stride_head
    return row + tokens.to(tl.int64) * x.stride_seq


@triton.jit
def copy_rows(
    row, to, exists, positions, rotary,
    N: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy rows of a tensor to another, rotated unless rotary is None."""
    cols = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (cols < HEAD_DIM)[None, :]
    value = tl.load(row[:, None] + cols[None, :], mask=mask, other=0.0)
    if rotary is not None:
        value = apply_rotary(row, value, cols, positions, mask, rotary, N, INTERLEAVED)
    tl.store(to[:, None] + cols[None, :], value.to(to.dtype.element_ty), mask=mask)


@kernel(do_not_specialize=["heads", "kv_heads", "seq_q", "seq_new"])
def rotate_and_store(
    q, rotated, k, v, k_cache, v_cache, pages, starts, counts, rotary, heads, kv_heads, seq_q, seq_new,
    N: tl.constexpr, INTERLEAVED: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Token t of a batch row is at position starts[batch] + t. Its q is rotated into row t of `rotated`; its k, rotated
    unless rotary is None, and its v are stored at its position in the caches. Either q or k and v may be None. Tokens
    at and past counts[batch], if given, are left out.

    Grid: (tiles of tokens * (heads + 2 * kv_heads) * batch,): each program owns tokens of one head of q, k or v.
    """
    tiles = tl.cdiv(tl.maximum(seq_q, seq_new), BLOCK_ROWS)
    program = tl.program_id(0)
    tokens = program % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head = program // tiles % (heads + 2 * kv_heads)
    batch = program // tiles // (heads + 2 * kv_heads)
    positions = tl.load(starts + batch) + tokens
    end = tl.where(head < heads, seq_q, seq_new)
    if counts is not None:
        end = tl.minimum(end, tl.load(counts + batch))
    exists = tokens < end
    if q is not None:
        row = token_pointers(q, batch, head, tokens)
        if head < heads:
            to = token_pointers(rotated, batch, head, tokens)
            copy_rows(row, to, exists, positions, rotary, N, INTERLEAVED, HEAD_DIM, BLOCK_D)
    if k is not None:
        head -= heads
        if (head >= 0) & (head < kv_heads):
            to = cache_row_pointers(k_cache, pages, batch, head, positions, exists)
            row = token_pointers(k, batch, head, tokens)
            copy_rows(row, to, exists, positions, rotary, N, INTERLEAVED, HEAD_DIM, BLOCK_D)
        head -= kv_heads
        if head >= 0:
            to = cache_row_pointers(v_cache, pages, batch, head, positions, exists)
            row = token_pointers(v, batch, head, tokens)
            copy_rows(row, to, exists, positions, None, N, INTERLEAVED, HEAD_DIM_V, BLOCK_DV)
