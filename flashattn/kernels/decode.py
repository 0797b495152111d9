"""Attention of a few new queries to a long cache. Reading the keys is all that costs time, so each is read once for all
query heads that share it, and the keys of a sequence are split among programs:

1. `attention_decode`: a program owns one split of the keys of one key/value head and BLOCK_M rows, a row being a query
   of one of the head's query heads; it writes the softmax's maximum and sum and the unnormalised output.
2. `attention_merge`: puts the splits of a row together, exactly, by their maxima and sums.

A sequence chooses its splits by the keys that its own queries see (`splits_of`): SPLIT_KEYS for each new token, or the
next multiple of that with which SPLITS of them suffice. So one new token against 4,096 keys of 8 heads is 128 programs,
one for each multiprocessor, and no sequence has more than one tile of splits to merge. A result depends neither on the
batch nor on the capacity of a cache nor on where its pages lie: the grid has room for the longest row, or for the
capacity where a CUDA graph is captured, and programs past the end of their own row leave at once.

Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .compiler import kernel
from .configs import cdiv
from .forward import close, fold
from .scores import visible_keys
from .softmax import power
from .state import HeadInfo, SeqInfo, Shape, TilePositions
from .tiles import rounded_product, tile_mask

SPLIT_KEYS = tl.constexpr(256)  # for each new token: so what a split writes stays little beside what it reads


class PageTable(NamedTuple):
    """Key j of a batch row is row j % size of page ptr[batch * stride + j // size]. Each row of a tile is divided by
    size, which takes a GPU 20 instructions or a multiplication by what is known before: factor and shift."""

    ptr: tl.tensor
    stride: tl.tensor
    size: tl.tensor
    factor: tl.tensor
    shift: tl.tensor


def pages_arg(table: Tensor | None, size: int) -> PageTable | None:
    """A page table (batch, n) as kernels take it.

    Granlund and Montgomery, "Division by invariant integers using multiplication" (PLDI 1994), for numbers of 31 bits.
    """
    if table is None:
        return None
    shift = (size - 1).bit_length()
    return PageTable(table, table.stride(0), size, 2 ** (31 + shift) // size + 1, shift)


@triton.jit
def page_number(pages, positions):
    """positions // pages.size."""
    high = tl.umulhi((positions * 2).to(tl.uint32), pages.factor.to(tl.uint32))
    return (high >> pages.shift).to(tl.int32)


@triton.jit
def cached_rows(x, pages, batch, head, positions, exists):
    """Pointers to rows of a cache (batch or pages, heads, capacity or page size, dim)."""
    row = batch
    if pages is not None:
        number = page_number(pages, positions)
        row = tl.load(pages.ptr + batch * pages.stride + number, mask=exists, other=0)
        positions -= number * pages.size
    base = x.ptr + tl.cast(head, tl.int64) * x.stride_head
    # Neither is negative, and a GPU multiplies unsigned numbers of 32 bits by strides of 64 in fewer instructions.
    base += tl.cast(tl.cast(row, tl.uint32), tl.int64) * x.stride_batch
    return base + positions.to(tl.uint32).to(tl.int64) * x.stride_seq


@triton.jit
def load_cached(
    x, pages, batch, head, start, end, COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """Rows start .. start + BLOCK_ROWS of a batch row's keys or values; 0 at and past `end`."""
    positions = start + tl.arange(0, BLOCK_ROWS)
    rows = cached_rows(x, pages, batch, head, positions, positions < end)
    mask = tile_mask(start, end, COLS, BLOCK_ROWS, BLOCK_COLS)
    return tl.load(rows[:, None] + tl.arange(0, BLOCK_COLS)[None, :], mask=mask, other=0.0)


@triton.jit
def cached_sequence(score, batch, seq_q):
    """The SeqInfo of a batch row (or of several, as a tensor): its queries are the last of its keys' positions."""
    key_end = tl.load(score.kv_lengths + batch)
    query_end = seq_q
    if score.q_lengths is not None:
        query_end = tl.load(score.q_lengths + batch)
    return SeqInfo(seq_q, key_end, query_end, key_end, 0, 0, key_end - query_end)


@triton.jit
def splits_of(score, seq, SPLITS: tl.constexpr):
    """(begin, end, keys, splits) of a batch row: its queries see keys begin .. end, in `splits` splits, at most SPLITS,
    of `keys` keys each. `most_splits` bounds them for all rows."""
    begin, end = visible_keys(score, seq, 0, seq.query_end)
    least = SPLIT_KEYS * seq.seq_q
    keys = tl.maximum(tl.cdiv(end - begin, SPLITS * least), 1) * least
    return begin, end, keys, tl.cdiv(end - begin, keys)


def most_splits(longest: int, seq_q: int, limit: int) -> int:
    """How many splits a row has at most, where none has more than `longest` keys and SPLITS is `limit`."""
    return max(1, min(limit, cdiv(longest, SPLIT_KEYS.value * seq_q)))


@kernel(do_not_specialize=["score", "heads", "kv_heads", "seq_q", "splits"])
def attention_decode(
    q, k, v, pages, statistics, partial, score, heads, kv_heads, seq_q, splits,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """statistics (rows, 2, splits), maxima and sums, and partial (rows, splits, HEAD_DIM_V), float32; rows are batch *
    heads * seq_q. What is past a row's own splits is left as it is.

    Grid: (splits * tiles of rows * kv_heads * batch,).
    """
    shape: tl.constexpr = Shape(HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N)
    group = heads // kv_heads
    tiles = tl.cdiv(group * seq_q, shape.BLOCK_M)
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits % tiles
    kv_head = program // splits // tiles % kv_heads
    batch = program // splits // tiles // kv_heads
    seq = cached_sequence(score, batch, seq_q)
    begin, end, keys_of_split, own_splits = splits_of(score, seq, SPLITS)
    if split >= own_splits:
        return

    row = tile * shape.BLOCK_M + tl.arange(0, shape.BLOCK_M)
    exists = row < group * seq_q
    head = tl.where(exists, kv_head * group + row // seq_q, 0)
    query = row % seq_q
    q_rows = q.ptr + tl.cast(batch, tl.int64) * q.stride_batch + head.to(tl.int64) * q.stride_head
    q_rows += query.to(tl.int64) * q.stride_seq
    cols = tl.arange(0, shape.BLOCK_D)
    attends = exists & (query < seq.query_end)
    mask = attends[:, None] & (cols < shape.HEAD_DIM)[None, :]
    q_tile = tl.load(q_rows[:, None] + cols[None, :], mask=mask, other=0.0)

    acc = tl.zeros((shape.BLOCK_M, shape.BLOCK_DV), tl.float32)
    m_i = tl.full((shape.BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((shape.BLOCK_M,), tl.float32)
    at = HeadInfo(batch, head[:, None], heads, seq)
    begin += split * keys_of_split
    for start_n in range(begin, tl.minimum(end, begin + keys_of_split), shape.BLOCK_N):
        k_tile = load_cached(
            k, pages, batch, kv_head, start_n, seq.key_end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D
        )
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=score.precision)
        keys = start_n + tl.arange(0, shape.BLOCK_N)[None, :]
        positions = TilePositions(query[:, None], keys, 2)
        p, alpha, m_i, l_i = fold(products, m_i, l_i, score, at, positions, EDGE=True)
        v_tile = load_cached(
            v, pages, batch, kv_head, start_n, seq.key_end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV
        )
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=score.precision)

    number = (tl.cast(batch, tl.int64) * heads + head) * seq_q + query
    tl.store(statistics + number * 2 * splits + split, m_i, mask=exists)
    tl.store(statistics + number * 2 * splits + splits + split, l_i, mask=exists)
    cols_v = tl.arange(0, shape.BLOCK_DV)
    mask = exists[:, None] & (cols_v < shape.HEAD_DIM_V)[None, :]
    tl.store(partial + (number * splits + split)[:, None] * shape.HEAD_DIM_V + cols_v[None, :], acc, mask=mask)


@kernel(do_not_specialize=["score", "heads", "seq_q", "rows", "splits"])
def attention_merge(
    statistics, partial, out, lse, score, heads, seq_q, rows, splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out = sum(e^(m_i - m) partial_i) / sum(e^(m_i - m) l_i) over the splits i of a row, m the largest m_i.

    One tile of SPLITS splits, whatever the grid of the first kernel had room for: the order of the sums, and so their
    bits, are the same. Grid: (tiles of BLOCK_ROWS rows,).
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    query = row % seq_q
    head = row // seq_q % heads
    batch = tl.where(exists, row // seq_q // heads, 0)
    _, _, _, own_splits = splits_of(score, cached_sequence(score, batch, seq_q), SPLITS)

    split = tl.arange(0, SPLITS)[None, :]
    there = exists[:, None] & (split < own_splits[:, None])
    number = row.to(tl.int64)[:, None]
    maxima = tl.load(statistics + number * 2 * splits + split, mask=there, other=float("-inf"))
    sums = tl.load(statistics + number * 2 * splits + splits + split, mask=there, other=0.0)
    m_i = tl.max(maxima, 1)
    factors = power(maxima - tl.where(m_i == float("-inf"), 0.0, m_i)[:, None], score.raw)
    l_i = tl.sum(rounded_product(sums, factors), 1)
    cols = tl.arange(0, BLOCK_DV)
    parts = partial + (number * splits + split)[:, :, None] * HEAD_DIM_V + cols[None, None, :]
    parts = tl.load(parts, mask=there[:, :, None] & (cols < HEAD_DIM_V)[None, None, :], other=0.0)
    acc = tl.sum(rounded_product(parts, factors[:, :, None]), 1)
    l_i, alpha, lse_row, _ = close(m_i, l_i, score, head)
    if score.sinks is not None:
        acc *= alpha[:, None]
    result = tl.where(l_i[:, None] == 0.0, 0.0, acc / l_i[:, None])
    to = out.ptr + batch.to(tl.int64) * out.stride_batch + head.to(tl.int64) * out.stride_head
    to += query.to(tl.int64) * out.stride_seq
    mask = exists[:, None] & (cols < HEAD_DIM_V)[None, :]
    tl.store(to[:, None] + cols[None, :], result.to(out.ptr.dtype.element_ty), mask=mask)
    tl.store(lse + row, lse_row, mask=exists)
