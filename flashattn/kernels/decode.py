"""Attention of a few new queries to a long cache. Only reading the keys takes time, so each is read once for all query
heads that share it, and the keys of a sequence are split among programs:

1. `attention_decode`: a program owns one split of the keys of one key/value head and BLOCK_M rows, a row being a query
   of one of the head's query heads; it writes the softmax's maximum and sum and the unnormalised output.
2. `attention_merge`: combines the splits of a row, exactly, by their maxima and sums.

The splits of a sequence depend on the keys of its own queries (`split_range`): SPLIT_KEYS for each new token, or the
least multiple of that with which SPLITS of them suffice. So one new token against 4,096 keys of 8 heads is 128
programs, one for each multiprocessor, and no sequence has more than one tile of splits to merge. A result depends
neither on the batch nor on the capacity of a cache nor on where its pages lie: the grid has room for the longest row,
or for the capacity while a CUDA graph is captured, and programs past the end of their own row return at once.

Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

import triton
import triton.language as tl

from .compiler import kernel
from .configs import cdiv
from .forward import finalize_softmax, fold_tile
from .pages import load_cache_tile
from .scores import BLOCK_FULL, key_range
from .softmax import exp_or_exp2
from .state import HeadInfo, SeqInfo, Shape, TilePositions
from .tiles import rounded_product

SPLIT_KEYS = tl.constexpr(256)  # for each new token: a split then writes little beside what it reads


@triton.jit
def load_cached_seq_info(score, batch, seq_q):
    """The SeqInfo of a batch row (or of several, as a tensor): its queries are the last of its keys' positions."""
    key_end = tl.load(score.kv_lengths + batch)
    query_end = seq_q
    if score.q_lengths is not None:
        query_end = tl.load(score.q_lengths + batch)
    return SeqInfo(seq_q, key_end, query_end, key_end, 0, 0, key_end - query_end)


@triton.jit
def split_range(score, seq, SPLITS: tl.constexpr):
    """(begin, end, keys, splits) of a batch row: its queries attend to keys begin .. end, in `splits` splits, at most
    SPLITS, of `keys` keys each. `count_max_splits` bounds their number for all rows."""
    begin, end = key_range(score, seq, 0, seq.query_end)
    least = SPLIT_KEYS * seq.seq_q
    keys = tl.maximum(tl.cdiv(end - begin, SPLITS * least), 1) * least
    return begin, end, keys, tl.cdiv(end - begin, keys)


def count_max_splits(longest: int, seq_q: int, limit: int) -> int:
    """The most splits of a row, where none has more than `longest` keys and SPLITS is `limit`."""
    return max(1, min(limit, cdiv(longest, SPLIT_KEYS.value * seq_q)))


@kernel(do_not_specialize=["score", "heads", "kv_heads", "seq_q", "splits"])
def attention_decode(
    q, k, v, pages, statistics, partial, score, heads, kv_heads, seq_q, splits,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """statistics (rows, 2, splits), maxima and sums, and partial (rows, splits, HEAD_DIM_V), float32; rows are batch *
    heads * seq_q. Elements past a row's own splits are not written.

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
    seq = load_cached_seq_info(score, batch, seq_q)
    begin, end, keys_of_split, own_splits = split_range(score, seq, SPLITS)
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
        k_tile = load_cache_tile(
            k, pages, batch, kv_head, start_n, seq.key_end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D
        )
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision=score.precision)
        keys = start_n + tl.arange(0, shape.BLOCK_N)[None, :]
        positions = TilePositions(query[:, None], keys, BLOCK_FULL)
        p, alpha, m_i, l_i = fold_tile(products, m_i, l_i, score, at, positions, PARTIAL=True)
        v_tile = load_cache_tile(
            v, pages, batch, kv_head, start_n, seq.key_end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV
        )
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision=score.precision)

    row_index = (tl.cast(batch, tl.int64) * heads + head) * seq_q + query
    tl.store(statistics + row_index * 2 * splits + split, m_i, mask=exists)
    tl.store(statistics + row_index * 2 * splits + splits + split, l_i, mask=exists)
    cols_v = tl.arange(0, shape.BLOCK_DV)
    mask = exists[:, None] & (cols_v < shape.HEAD_DIM_V)[None, :]
    tl.store(partial + (row_index * splits + split)[:, None] * shape.HEAD_DIM_V + cols_v[None, :], acc, mask=mask)


@kernel(do_not_specialize=["score", "heads", "seq_q", "rows", "splits"])
def attention_merge(
    statistics, partial, out, lse, score, heads, seq_q, rows, splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_ROWS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out = sum(e^(m_i - m) partial_i) / sum(e^(m_i - m) l_i) over the splits i of a row, m the largest m_i.

    One tile of SPLITS splits, however many the first kernel's grid had room for: the order of the sums, and so their
    bits, stay the same. Grid: (tiles of BLOCK_ROWS rows,).
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    query = row % seq_q
    head = row // seq_q % heads
    batch = tl.where(exists, row // seq_q // heads, 0)
    _, _, _, own_splits = split_range(score, load_cached_seq_info(score, batch, seq_q), SPLITS)

    split = tl.arange(0, SPLITS)[None, :]
    in_row = exists[:, None] & (split < own_splits[:, None])
    row_index = row.to(tl.int64)[:, None]
    maxima = tl.load(statistics + row_index * 2 * splits + split, mask=in_row, other=float("-inf"))
    sums = tl.load(statistics + row_index * 2 * splits + splits + split, mask=in_row, other=0.0)
    m_i = tl.max(maxima, 1)
    factors = exp_or_exp2(maxima - tl.where(m_i == float("-inf"), 0.0, m_i)[:, None], score.raw)
    l_i = tl.sum(rounded_product(sums, factors), 1)
    cols = tl.arange(0, BLOCK_DV)
    parts = partial + (row_index * splits + split)[:, :, None] * HEAD_DIM_V + cols[None, None, :]
    parts = tl.load(parts, mask=in_row[:, :, None] & (cols < HEAD_DIM_V)[None, None, :], other=0.0)
    acc = tl.sum(rounded_product(parts, factors[:, :, None]), 1)
    l_i, alpha, lse_row, _ = finalize_softmax(m_i, l_i, score, head)
    if score.sinks is not None:
        acc *= alpha[:, None]
    result = tl.where(l_i[:, None] == 0.0, 0.0, acc / l_i[:, None])
    row_out = out.ptr + batch.to(tl.int64) * out.stride_batch + head.to(tl.int64) * out.stride_head
    row_out += query.to(tl.int64) * out.stride_seq
    mask = exists[:, None] & (cols < HEAD_DIM_V)[None, :]
    tl.store(row_out[:, None] + cols[None, :], result.to(out.ptr.dtype.element_ty), mask=mask)
    tl.store(lse + row, lse_row, mask=exists)
