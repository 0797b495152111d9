"""Attention backward, recomputing the weights from lse. Two passes, so that nothing is atomic:

1. `attention_backward_q`: a program owns BLOCK_M queries, visits the keys, and writes grad_q and the queries'
   statistics.
2. `attention_backward_kv`: a program owns BLOCK_N keys of one key/value head, visits the queries of every head in the
   group, and writes grad_k and grad_v.

With s = q k^T * scale, p = exp(s - lse), do = grad_out (p = exp(s - lse - rest) where forward kept the rounding error
of lse):

    delta = rowsum(do * out) - grad_lse
    ds    = p * (do v^T - delta)
    grad_q = scale * ds k,   grad_k = scale * ds^T q,   grad_v = p^T do

Dao, "FlashAttention-2" (2023), arXiv:2307.08691, Algorithm 2. The gradient of lse
adds p * grad_lse to ds, which delta includes. Dropout multiplies p in p^T do, and do v^T, by the same factors; a
softcap multiplies ds by its derivative before grad_q and grad_k.

A third pass, `attention_backward_bias`, sums ds over the positions that share an element of the bias, times the
derivative of a score_mod, which comes after the bias.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .compiler import kernel
from .dropout import dropout_multipliers
from .scores import (
    NO_SPECIALIZE,
    apply_score_mods,
    apply_softcap,
    block_is_active,
    block_state,
    in_window_and_bounds,
    key_range,
    key_tile_of_program,
    key_tiles,
    load_seq_info,
    lse_offset,
    partial_start,
    query_tile_of_program,
    query_tiles,
    scale_products,
    scores_backward,
)
from .softmax import LARGEST_RAW_LSE, LOG2E
from .state import HeadInfo, KeyGradients, KeyTile, QueryTile, RowStats, Shape, Sizes, TilePositions
from .tiles import head_view, load_tile, rounded_product, store_tile


class StatsPointers(NamedTuple):
    """The statistics of each query that pass 1 writes for the others, float32, (batch * heads, stride), packed (heads,
    stride): lse and rest as `load_lse` returns them, and delta. Rows and packed sequences start at multiples of 16
    bytes: an H200 copies numbers in bulk from nowhere else."""

    lse: tl.tensor
    delta: tl.tensor
    rest: tl.tensor  # raw scores have none: neither written nor read
    stride: tl.tensor


class BiasSizes(NamedTuple):
    """The sizes of a bias, each that of the scores or 1."""

    size_batch: tl.tensor
    size_head: tl.tensor
    size_q: tl.tensor
    size_k: tl.tensor


class BiasTile(NamedTuple):
    """The elements of the bias that a program owns: its batch row and head, which tile of queries and of keys; and the
    batch rows, heads, queries and keys to sum over."""

    batch: tl.tensor
    head: tl.tensor
    tile_m: tl.tensor
    tile_n: tl.tensor
    first_batch: tl.tensor
    last_batch: tl.tensor
    first_head: tl.tensor
    last_head: tl.tensor
    first_m: tl.tensor
    last_m: tl.tensor
    first_n: tl.tensor
    last_n: tl.tensor


@triton.jit
def load_lse(lse, rest, score, offsets, exists):
    """(lse, rest) of queries for `recompute_weights`. lse is +inf of a fully masked row, whose weights are then 0; that
    of raw scores is in base 2. rest is in base 2; raw scores have none."""
    lse_row = tl.load(lse + offsets, mask=exists, other=float("-inf"))
    rest_row = lse_row
    if score.raw:
        lse_row *= LOG2E
        too_large = (tl.abs(lse_row) >= LARGEST_RAW_LSE) & (lse_row > float("-inf"))
        lse_row = tl.where(too_large, float("nan"), lse_row)  # gradients that are NaN, not wrong
    elif rest is not None:
        rest_row = tl.load(rest + offsets, mask=exists, other=0.0) * LOG2E
    else:
        rest_row = tl.where(exists, 0.0, 0.0)  # zeros without a layout, which Gluon would ask for
    return tl.where(lse_row == float("-inf"), float("inf"), lse_row), rest_row


@triton.jit
def locate_stats(score, at):
    """(row, column) at which the statistics of a head's queries start."""
    line = at.batch * at.heads + at.head
    start = 0
    if score.cu_seqlens is not None:
        line = at.head
        start = (at.seq.q_start + 4 * at.batch) // 4 * 4  # 1 to 4 unused numbers between sequences
    return line, start


@triton.jit
def head_stats_pointers(score, rows, at):
    """Pointers to the statistics of one head's queries."""
    line, start = locate_stats(score, at)
    offset = tl.cast(line, tl.int64) * rows.stride + start
    return StatsPointers(rows.lse + offset, rows.delta + offset, rows.rest + offset, rows.stride)


@triton.jit
def store_stats(rows, stats, queries, end, RAW: tl.constexpr):
    """Store the RowStats of queries before `end`."""
    tl.store(rows.lse + queries, stats.lse, mask=queries < end)
    tl.store(rows.delta + queries, stats.delta, mask=queries < end)
    if not RAW:
        tl.store(rows.rest + queries, stats.rest, mask=queries < end)


@triton.jit
def load_stats(rows, queries, query_end, RAW: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """The RowStats of queries; +inf, 0 and 0 of those at or past `query_end` (compared only with CHECK_ROWS)."""
    if CHECK_ROWS:
        lse = tl.load(rows.lse + queries, mask=queries < query_end, other=float("inf"))
        delta = tl.load(rows.delta + queries, mask=queries < query_end, other=0.0)
    else:
        lse = tl.load(rows.lse + queries)
        delta = tl.load(rows.delta + queries)
    rest = lse
    if not RAW and CHECK_ROWS:
        rest = tl.load(rows.rest + queries, mask=queries < query_end, other=0.0)
    elif not RAW:
        rest = tl.load(rows.rest + queries)
    return RowStats(lse, delta, rest)


@triton.jit
def weigh_scores(scores, lse, rest, score):
    """The weights of a tile of scores. `lse` and `rest` broadcast to its shape."""
    if score.raw:
        p = tl.exp2(scores * (score.scale * LOG2E) - lse)
    else:
        p = tl.exp2((scores - lse) * LOG2E - rest)
    return p


@triton.jit
def recompute_weights(products, lse, rest, score, at, tile, PARTIAL: tl.constexpr, OF_BIAS: tl.constexpr = False):
    """(p, dscore) of a tile of q k^T: the weights, and the derivative of the scores by scale * q.k, or by the bias."""
    scores, dscore = apply_softcap(score, scale_products(score, products))
    if OF_BIAS:
        dscore = 1.0
    scores, dscore = apply_score_mods(score, at, scores, dscore, tile)
    p = weigh_scores(scores, lse, rest, score)
    if PARTIAL:
        p = tl.where(in_window_and_bounds(score, at.seq, tile), p, 0.0)
    return p, dscore


@triton.jit
def compute_score_gradients(
    own, k_tile, v, score, at, start_n, shape: tl.constexpr, PARTIAL: tl.constexpr, OF_BIAS: tl.constexpr
):
    """The gradient of scale * q.k, or of the bias, in a tile (queries, keys). own: the QueryTile."""
    products = tl.dot(own.q, tl.trans(k_tile), input_precision=score.precision)
    queries = own.start + tl.arange(0, shape.BLOCK_M)
    keys = start_n + tl.arange(0, shape.BLOCK_N)[None, :]
    tile = TilePositions(queries[:, None], keys, block_state(score, at, own.start, start_n))
    lse = own.stats.lse[:, None]
    p, dscore = recompute_weights(products, lse, own.stats.rest[:, None], score, at, tile, PARTIAL, OF_BIAS)
    v_tile = load_tile(v, start_n, at.seq.key_end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV, PARTIAL)
    dp = tl.dot(own.grad_out, tl.trans(v_tile), input_precision=score.precision)
    if score.dropout is not None:
        head = at.batch * at.heads + at.head
        dp *= dropout_multipliers(score, head, queries, start_n, shape.BLOCK_N, shape.BLOCK_N)
    return scores_backward(score, p * (dp - own.stats.delta[:, None]), dscore)


@triton.jit
def accumulate_dq(acc, own, k, v, score, at, start_n, shape: tl.constexpr, PARTIAL: tl.constexpr):
    """One key tile of pass 1: acc += ds k."""
    k_tile = load_tile(k, start_n, at.seq.key_end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, PARTIAL)
    ds = compute_score_gradients(own, k_tile, v, score, at, start_n, shape, PARTIAL, False)
    return tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=score.precision)


@triton.jit
def row_dot(a, b):
    """The products of the rows of two tiles, in float32."""
    return tl.sum(rounded_product(a.to(tl.float32), b.to(tl.float32)), 1)


@triton.jit
def load_query_tile(x, start_m, at, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The rows of q, out or grad_out for a tile of a head's queries."""
    head = head_view(x, at.batch, at.head, at.seq.q_start)
    return load_tile(head, start_m, at.seq.query_end, COLS, BLOCK_M, BLOCK_COLS, True)


@kernel(do_not_specialize=NO_SPECIALIZE)
def attention_backward_q(
    q, k, v, out, grad_out, lse, rest, grad_lse, grad_q, rows, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pass 1: grad_q, and the statistics of the queries for the other passes.

    Grid: (query tiles * heads * batch,), the longest causal tiles first. A program owns BLOCK_M queries of one head.
    """
    shape: tl.constexpr = Shape(HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N)
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    start_m, kv_head, at = query_tile_of_program(tl.program_id(0), score, sizes, shape.BLOCK_M)
    seq = at.seq
    k = head_view(k, at.batch, kv_head, seq.k_start)
    v = head_view(v, at.batch, kv_head, seq.k_start)
    queries = start_m + tl.arange(0, shape.BLOCK_M)
    row = lse_offset(score, at)
    do_tile = load_query_tile(grad_out, start_m, at, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
    out_tile = load_query_tile(out, start_m, at, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
    exists = queries < seq.query_end
    delta = row_dot(do_tile, out_tile)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + row + queries, mask=exists, other=0.0)
    lse_row, rest_row = load_lse(lse, rest, score, row + queries, exists)
    stats = RowStats(lse_row, delta, rest_row)
    store_stats(head_stats_pointers(score, rows, at), stats, queries, seq.seq_q, score.raw)

    q_tile = load_query_tile(q, start_m, at, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D)
    own = QueryTile(start_m, q_tile, do_tile, stats)
    acc = tl.zeros((shape.BLOCK_M, shape.BLOCK_D), tl.float32)
    tiles = key_tiles(score, seq, start_m, shape.BLOCK_M, shape.BLOCK_N)
    for start_n in range(tiles.full_begin, tiles.full_end, shape.BLOCK_N):
        if block_is_active(score, at, start_m, start_n):
            acc = accumulate_dq(acc, own, k, v, score, at, start_n, shape, False)
    for index in tl.range(0, tiles.partial_count, num_stages=1):
        start_n = partial_start(tiles, index, shape.BLOCK_N)
        if block_is_active(score, at, start_m, start_n):
            acc = accumulate_dq(acc, own, k, v, score, at, start_n, shape, True)
    grad_q_head = head_view(grad_q, at.batch, at.head, seq.q_start)
    store_tile(grad_q_head, acc * score.scale, start_m, seq.seq_q, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D)


@triton.jit
def accumulate_dkv(grads, own, q, grad_out, rows, score, at, start_m, shape: tl.constexpr, PARTIAL: tl.constexpr):
    """One query tile of pass 2, transposed (keys down, queries across): grad_v += p^T do, grad_k += ds^T q. own: the
    KeyTile; q, grad_out and rows are those of the head."""
    query_end = at.seq.query_end
    queries = start_m + tl.arange(0, shape.BLOCK_M)
    q_tile = load_tile(q, start_m, query_end, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D, PARTIAL)
    products = tl.dot(own.k, tl.trans(q_tile), input_precision=score.precision)
    keys = own.start + tl.arange(0, shape.BLOCK_N)[:, None]
    state = block_state(score, at, start_m, own.start)
    stats = load_stats(rows, queries, query_end, score.raw, PARTIAL)
    tile = TilePositions(queries[None, :], keys, state)
    p, dscore = recompute_weights(products, stats.lse[None, :], stats.rest[None, :], score, at, tile, PARTIAL)
    do_tile = load_tile(grad_out, start_m, query_end, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV, PARTIAL)
    dropped = p
    if score.dropout is not None:
        head = at.batch * at.heads + at.head
        kept = tl.trans(dropout_multipliers(score, head, queries, own.start, shape.BLOCK_N, shape.BLOCK_M))
        dropped = p * kept
    grad_v = tl.dot(dropped.to(do_tile.dtype), do_tile, grads.v, input_precision=score.precision)
    dp = tl.dot(own.v, tl.trans(do_tile), input_precision=score.precision)
    if score.dropout is not None:
        dp *= kept
    ds = p * (dp - stats.delta[None, :])
    ds = scores_backward(score, ds, dscore)
    grad_k = tl.dot(ds.to(q_tile.dtype), q_tile, grads.k, input_precision=score.precision)
    return KeyGradients(grad_k, grad_v)


@triton.jit
def store_key_gradients(grads, grad_k, grad_v, score, seq, batch, kv_head, start_n, shape: tl.constexpr):
    """Store the sums of a program's keys. Keys past the end were read as 0, but exp2(0 - lse) is not 0: their rows are
    cleared here, once, and not in the loop over full tiles."""
    exists = (start_n + tl.arange(0, shape.BLOCK_N) < seq.key_end)[:, None]
    acc_k = tl.where(exists, grads.k * score.scale, 0.0)
    acc_v = tl.where(exists, grads.v, 0.0)
    k_head = head_view(grad_k, batch, kv_head, seq.k_start)
    store_tile(k_head, acc_k, start_n, seq.seq_k, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D)
    v_head = head_view(grad_v, batch, kv_head, seq.k_start)
    store_tile(v_head, acc_v, start_n, seq.seq_k, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV)


@kernel(do_not_specialize=NO_SPECIALIZE)
def attention_backward_kv(
    q, k, v, grad_out, rows, grad_k, grad_v, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pass 2: grad_k and grad_v, summed over the query heads that share this key/value head.

    Grid: (key tiles * kv_heads * batch,), the longest causal tiles first. A program owns BLOCK_N keys of one kv_head.
    """
    shape: tl.constexpr = Shape(HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N)
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    start_n, kv_head, batch = key_tile_of_program(sizes, shape.BLOCK_N)
    group = sizes.heads // sizes.kv_heads
    seq = load_seq_info(score, batch, sizes)

    k_head = head_view(k, batch, kv_head, seq.k_start)
    k_tile = load_tile(k_head, start_n, seq.key_end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, True)
    v_head = head_view(v, batch, kv_head, seq.k_start)
    v_tile = load_tile(v_head, start_n, seq.key_end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV, True)
    own = KeyTile(start_n, k_tile, v_tile)
    acc_k = tl.zeros((shape.BLOCK_N, shape.BLOCK_D), tl.float32)
    grads = KeyGradients(acc_k, tl.zeros((shape.BLOCK_N, shape.BLOCK_DV), tl.float32))
    tiles = query_tiles(score, seq, start_n, shape.BLOCK_M, shape.BLOCK_N)
    for head in range(kv_head * group, kv_head * group + group):
        at = HeadInfo(batch, head, sizes.heads, seq)
        q_head = head_view(q, batch, head, seq.q_start)
        do_head = head_view(grad_out, batch, head, seq.q_start)
        rows_head = head_stats_pointers(score, rows, at)
        for start_m in range(tiles.full_begin, tiles.full_end, shape.BLOCK_M):
            if block_is_active(score, at, start_m, start_n):
                grads = accumulate_dkv(grads, own, q_head, do_head, rows_head, score, at, start_m, shape, False)
        for index in tl.range(0, tiles.partial_count, num_stages=1):
            start_m = partial_start(tiles, index, shape.BLOCK_M)
            if block_is_active(score, at, start_m, start_n):
                grads = accumulate_dkv(grads, own, q_head, do_head, rows_head, score, at, start_m, shape, True)

    store_key_gradients(grads, grad_k, grad_v, score, seq, batch, kv_head, start_n, shape)


@triton.jit
def reduction_range(size, index, count, BLOCK: tl.constexpr):
    """(begin, end) of the positions to sum for tile `index` of a dimension of the bias: all where it is broadcast."""
    begin = tl.where(size == 1, 0, index * BLOCK)
    return begin, tl.where(size == 1, count, tl.minimum(begin + BLOCK, count))


@triton.jit
def bias_tile_of_program(bias, sizes, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The BiasTile of this program. bias: the BiasSizes."""
    program = tl.program_id(0)
    tiles_n = tl.cdiv(bias.size_k, BLOCK_N)
    tiles_m = tl.cdiv(bias.size_q, BLOCK_M)
    tile_n = program % tiles_n
    tile_m = program // tiles_n % tiles_m
    head = program // tiles_n // tiles_m % bias.size_head
    batch = program // tiles_n // tiles_m // bias.size_head
    first_batch, last_batch = reduction_range(bias.size_batch, batch, sizes.batches, 1)
    first_head, last_head = reduction_range(bias.size_head, head, sizes.heads, 1)
    first_m, last_m = reduction_range(bias.size_q, tile_m, sizes.seq_q, BLOCK_M)
    first_n, last_n = reduction_range(bias.size_k, tile_n, sizes.seq_k, BLOCK_N)
    return BiasTile(
        batch, head, tile_m, tile_n,
        first_batch, last_batch, first_head, last_head, first_m, last_m, first_n, last_n,
    )  # fmt: skip


@triton.jit
def store_bias_tile(grad_bias, acc, bias, own, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store the sums of a BiasTile. Where queries or keys are broadcast, all rows or columns are summed into the
    first."""
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    if bias.size_q == 1:
        acc = tl.where(i[:, None] == 0, tl.sum(acc, 0)[None, :], 0.0)
    if bias.size_k == 1:
        acc = tl.where(j[None, :] == 0, tl.sum(acc, 1)[:, None], 0.0)
    i += own.tile_m * BLOCK_M
    j += own.tile_n * BLOCK_N
    rows = tl.cast(own.batch * bias.size_head + own.head, tl.int64) * bias.size_q
    pointers = grad_bias + (rows + i[:, None]) * bias.size_k + j[None, :]
    tl.store(pointers, acc, mask=(i[:, None] < bias.size_q) & (j[None, :] < bias.size_k))


@kernel(do_not_specialize=[*NO_SPECIALIZE, "size_batch", "size_head", "size_q", "size_k"])
def attention_backward_bias(
    q, k, v, grad_out, rows, grad_bias, score, batches, heads, kv_heads, seq_q, seq_k,
    size_batch, size_head, size_q, size_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_bias (size_batch, size_head, size_q, size_k), float32: ds summed over the batch rows, heads, queries and
    keys that share an element.

    Grid: (tiles of keys * tiles of queries * size_head * size_batch,). A program owns BLOCK_M x BLOCK_N elements of the
    bias, or all queries or keys where those are broadcast. It computes S and dP once more.
    """
    shape: tl.constexpr = Shape(HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N)
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    bias = BiasSizes(size_batch, size_head, size_q, size_k)
    sums = bias_tile_of_program(bias, sizes, shape.BLOCK_M, shape.BLOCK_N)
    acc = tl.zeros((shape.BLOCK_M, shape.BLOCK_N), tl.float32)
    for batch in range(sums.first_batch, sums.last_batch):
        seq = load_seq_info(score, batch, sizes)
        for head in range(sums.first_head, sums.last_head):
            at = HeadInfo(batch, head, sizes.heads, seq)
            kv_head = head // (sizes.heads // sizes.kv_heads)
            k_head = head_view(k, batch, kv_head, seq.k_start)
            v_head = head_view(v, batch, kv_head, seq.k_start)
            rows_head = head_stats_pointers(score, rows, at)
            for start_m in range(sums.first_m, tl.minimum(sums.last_m, seq.query_end), shape.BLOCK_M):
                queries = start_m + tl.arange(0, shape.BLOCK_M)
                q_tile = load_query_tile(q, start_m, at, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D)
                do_tile = load_query_tile(grad_out, start_m, at, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
                stats = load_stats(rows_head, queries, seq.query_end, score.raw, True)
                own = QueryTile(start_m, q_tile, do_tile, stats)
                begin, end = key_range(score, seq, start_m, shape.BLOCK_M)
                begin = tl.maximum(sums.first_n, begin // shape.BLOCK_N * shape.BLOCK_N)
                for start_n in range(begin, tl.minimum(sums.last_n, end), shape.BLOCK_N):
                    k_tile = load_tile(k_head, start_n, seq.key_end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, True)
                    acc += compute_score_gradients(own, k_tile, v_head, score, at, start_n, shape, True, True)
    store_bias_tile(grad_bias, acc, bias, sums, shape.BLOCK_M, shape.BLOCK_N)
