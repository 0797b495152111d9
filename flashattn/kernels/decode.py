"""Attention of a few new queries to a long cache. Reading the keys is all that costs time, so each is read once for all
query heads that share it, and the keys of a sequence are split among programs:

1. `attention_decode`: a program owns SPLIT keys of one key/value head and BLOCK_M rows, a row being a query of one of
   the head's query heads; it writes the softmax's maximum and sum and the unnormalised output.
2. `attention_merge`: puts the splits of a row together, exactly, by their maxima and sums.

Splits are by position, so a result depends neither on the batch nor on where the pages of a cache lie.

Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .compiler import kernel
from .forward import fold
from .scores import SIZES, Sequence, visible_keys
from .softmax import join_sink, logsumexp
from .tiles import one_head, tile_mask


class PageTable(NamedTuple):
    """Key j of a batch row is row j % size of page ptr[batch * stride + j // size]."""

    ptr: tl.tensor
    stride: tl.tensor
    size: tl.tensor


@triton.jit
def cached_rows(x, pages, batch, head, positions, exists):
    """Pointers to rows of a cache (batch or pages, heads, capacity or page size, dim)."""
    row = batch
    if pages is not None:
        row = tl.load(pages.ptr + batch * pages.stride + positions // pages.size, mask=exists, other=0)
        positions = positions % pages.size
    base = x.ptr + tl.cast(row, tl.int64) * x.stride_batch + tl.cast(head, tl.int64) * x.stride_head
    return base + positions.to(tl.int64) * x.stride_seq


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
def partial_at(batch, head, heads, query, seq_q, split, splits):
    """The number of a split of a row in the workspace."""
    row = (tl.cast(batch, tl.int64) * heads + head) * seq_q + query
    return row * splits + split


@kernel(do_not_specialize=[*SIZES, "splits"])
def attention_decode(
    q, k, v, pages, statistics, partial, score, heads, kv_heads, seq_q, splits,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """statistics (rows * splits, 2) and partial (rows * splits, HEAD_DIM_V), float32; rows are batch * heads * seq_q.

    Grid: (splits * tiles of rows * kv_heads * batch,).
    """
    group = heads // kv_heads
    tiles = tl.cdiv(group * seq_q, BLOCK_M)
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits % tiles
    kv_head = program // splits // tiles % kv_heads
    batch = program // splits // tiles // kv_heads

    key_end = tl.load(score.kv_lengths + batch)
    query_end = seq_q
    if score.q_lengths is not None:
        query_end = tl.load(score.q_lengths + batch)
    seq = Sequence(seq_q, key_end, query_end, key_end, 0, 0, key_end - query_end)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < group * seq_q
    head = tl.where(exists, kv_head * group + row // seq_q, 0)
    query = row % seq_q
    q_rows = q.ptr + tl.cast(batch, tl.int64) * q.stride_batch + head.to(tl.int64) * q.stride_head
    q_rows += query.to(tl.int64) * q.stride_seq
    cols = tl.arange(0, BLOCK_D)
    attends = exists & (query < query_end)
    q_tile = tl.load(q_rows[:, None] + cols[None, :], mask=attends[:, None] & (cols < HEAD_DIM)[None, :], other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    begin, end = visible_keys(score, seq, 0, query_end)
    begin = tl.maximum(begin // BLOCK_N * BLOCK_N, split * SPLIT)
    for start_n in range(begin, tl.minimum(end, (split + 1) * SPLIT), BLOCK_N):
        k_tile = load_cached(k, pages, batch, kv_head, start_n, key_end, HEAD_DIM, BLOCK_N, BLOCK_D)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=score.precision)
        keys = start_n + tl.arange(0, BLOCK_N)[None, :]
        p, alpha, m_i, l_i = fold(
            products, m_i, l_i, score, seq, batch, head[:, None], query[:, None], keys, 2, EDGE=True
        )
        v_tile = load_cached(v, pages, batch, kv_head, start_n, key_end, HEAD_DIM_V, BLOCK_N, BLOCK_DV)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=score.precision)

    to = partial_at(batch, head, heads, query, seq_q, split, splits)
    tl.store(statistics + to * 2, m_i, mask=exists)
    tl.store(statistics + to * 2 + 1, l_i, mask=exists)
    cols_v = tl.arange(0, BLOCK_DV)
    mask = exists[:, None] & (cols_v < HEAD_DIM_V)[None, :]
    tl.store(partial + to[:, None] * HEAD_DIM_V + cols_v[None, :], acc, mask=mask)


@kernel(do_not_specialize=[*SIZES, "splits"])
def attention_merge(
    statistics, partial, out, lse, sinks, heads, seq_q, splits, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """out = sum(2^(m_i - m) partial_i) / sum(2^(m_i - m) l_i) over the splits i of a row, m the largest m_i.

    Grid: (batch * heads * seq_q,), a program a row.
    """
    program = tl.program_id(0)
    query = program % seq_q
    head = program // seq_q % heads
    batch = program // seq_q // heads
    at = partial_at(batch, head, heads, query, seq_q, 0, splits)
    cols = tl.arange(0, BLOCK_DV)
    m_i = tl.load(statistics + at * 2)
    for split in range(1, splits):
        m_i = tl.maximum(m_i, tl.load(statistics + (at + split) * 2))
    base = tl.where(m_i == float("-inf"), 0.0, m_i)
    l_i = 0.0
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for split in range(0, splits):
        factor = tl.exp2(tl.load(statistics + (at + split) * 2) - base)
        l_i += tl.load(statistics + (at + split) * 2 + 1) * factor
        acc += tl.load(partial + (at + split) * HEAD_DIM_V + cols, mask=cols < HEAD_DIM_V, other=0.0) * factor
    if sinks is not None:
        m_i, l_i, alpha = join_sink(m_i, l_i, tl.load(sinks + head))
        acc *= alpha
    result = tl.where(l_i == 0.0, 0.0, acc / l_i)
    to = one_head(out, batch, head, query).ptr
    tl.store(to + cols, result.to(out.ptr.dtype.element_ty), mask=cols < HEAD_DIM_V)
    tl.store(lse + program, logsumexp(m_i, l_i))
