"""Tensors inside a kernel: named tuples of pointer and strides, and tile loads and stores on them.

A tensor reaches a kernel as one argument. The last dimension is contiguous, so its stride is not passed:
the compiler then knows it is 1 and issues 16-byte loads.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Heads(NamedTuple):
    """A (batch, heads, seq, head_dim) tensor."""

    ptr: tl.tensor
    stride_batch: tl.tensor
    stride_head: tl.tensor
    stride_seq: tl.tensor


class Matrix(NamedTuple):
    """A (rows, cols) matrix: one batch row and head of a `Heads`."""

    ptr: tl.tensor
    stride: tl.tensor


@triton.jit
def rounded_product(a, b):
    """a * b, rounded on its own. A bare product in a sum may be contracted into the addition of another lane's value;
    then lanes that hold the same sum differ in its last bits, and which of them is stored is chance."""
    return tl.fma(a, b, 0.0)


@triton.jit
def head_view(x, batch, head, start):
    """The (seq, head_dim) matrix of one batch row and head, from row `start` on: where a packed sequence starts, or 0.
    The batch stride of packed tensors is 0. 64-bit: a tensor may pass 2**31 elements."""
    row = tl.cast(batch, tl.int64) * x.stride_batch + tl.cast(start, tl.int64) * x.stride_seq
    return Matrix(x.ptr + row + tl.cast(head, tl.int64) * x.stride_head, x.stride_seq)


@triton.jit
def tile_pointers(x, start, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Pointers to rows start .. start + BLOCK_ROWS: a 64-bit base and 32-bit offsets inside the tile."""
    base = x.ptr + tl.cast(start, tl.int64) * x.stride
    return base + tl.arange(0, BLOCK_ROWS)[:, None] * x.stride + tl.arange(0, BLOCK_COLS)[None, :]


@triton.jit
def tile_mask(start, end, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The elements of a tile that exist: rows before `end`, columns before COLS."""
    mask = (start + tl.arange(0, BLOCK_ROWS) < end)[:, None]
    if COLS != BLOCK_COLS:
        mask = mask & (tl.arange(0, BLOCK_COLS) < COLS)[None, :]
    return mask


@triton.jit
def load_tile(
    x, start, end, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, CHECK_ROWS: tl.constexpr
):
    """Rows start .. start + BLOCK_ROWS of `x`. Rows at or past `end` (compared only with CHECK_ROWS) and columns at or
    past COLS are 0, whatever memory holds there."""
    pointers = tile_pointers(x, start, BLOCK_ROWS, BLOCK_COLS)
    if CHECK_ROWS:
        tile = tl.load(pointers, mask=tile_mask(start, end, COLS, BLOCK_ROWS, BLOCK_COLS), other=0.0)
    elif COLS != BLOCK_COLS:
        tile = tl.load(pointers, mask=(tl.arange(0, BLOCK_COLS) < COLS)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)  # no compare is compiled
    return tile


@triton.jit
def store_tile(x, value, start, end, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Store a tile, rounded to the tensor's dtype, leaving rows at or past `end` untouched."""
    pointers = tile_pointers(x, start, BLOCK_ROWS, BLOCK_COLS)
    mask = tile_mask(start, end, COLS, BLOCK_ROWS, BLOCK_COLS)
    tl.store(pointers, value.to(x.ptr.dtype.element_ty), mask=mask)
