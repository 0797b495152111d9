"""Keys and values in a cache, inside a kernel: rows of a batch row's own memory, or of pages that its page table names
(Kwon et al., "Efficient memory management for large language model serving with PagedAttention", 2023,
arXiv:2309.06180)."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tiles import tile_mask


class PageTable(NamedTuple):
    """Key j of a batch row is row j % size of page ptr[batch * stride + j // size]. Each row of a tile is divided by
    size, which takes a GPU 20 instructions, or a multiplication by constants computed beforehand: factor and shift."""

    ptr: tl.tensor
    stride: tl.tensor
    size: tl.tensor
    factor: tl.tensor
    shift: tl.tensor


def page_table_arg(table: Tensor | None, size: int) -> PageTable | None:
    """A page table (batch, n) as an argument of a kernel.

    Granlund and Montgomery, "Division by invariant integers using multiplication" (PLDI 1994), for integers of 31 bits.
    """
    if table is None:
        return None
    shift = (size - 1).bit_length()
    return PageTable(table, table.stride(0), size, 2 ** (31 + shift) // size + 1, shift)


@triton.jit
def page_index(pages, positions):
    """positions // pages.size."""
    high = tl.umulhi((positions * 2).to(tl.uint32), pages.factor.to(tl.uint32))
    return (high >> pages.shift).to(tl.int32)


@triton.jit
def cache_row_pointers(x, pages, batch, head, positions, exists):
    """Pointers to rows of a cache (batch or pages, heads, capacity or page size, dim)."""
    row = batch
    if pages is not None:
        number = page_index(pages, positions)
        row = tl.load(pages.ptr + batch * pages.stride + number, mask=exists, other=0)
        positions -= number * pages.size
    base = x.ptr + tl.cast(head, tl.int64) * x.stride_head
    # Neither is negative, and a GPU multiplies unsigned 32-bit integers by 64-bit strides in fewer instructions.
    base += tl.cast(tl.cast(row, tl.uint32), tl.int64) * x.stride_batch
    return base + positions.to(tl.uint32).to(tl.int64) * x.stride_seq


@triton.jit
def load_cache_tile(
    x, pages, batch, head, start, end, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """Rows start .. start + BLOCK_ROWS of a batch row's keys or values; 0 at and past `end`."""
    positions = start + tl.arange(0, BLOCK_ROWS)
    rows = cache_row_pointers(x, pages, batch, head, positions, positions < end)
    mask = tile_mask(start, end, COLS, BLOCK_ROWS, BLOCK_COLS)
    return tl.load(rows[:, None] + tl.arange(0, BLOCK_COLS)[None, :], mask=mask, other=0.0)
