"""Attention backward, recomputing the weights from lse. Two passes, so that nothing is atomic:

1. `attention_backward_q`: a program owns BLOCK_M queries, visits the keys, writes grad_q and the query's statistics.
2. `attention_backward_kv`: a program owns BLOCK_N keys of one key/value head, visits the queries of every head in
   the group, writes grad_k and grad_v.

With s = q k^T * scale, p = exp(s - lse), do = grad_out (p = exp(s - lse - rest) where forward kept what rounding took
from lse):

    delta = rowsum(do * out) - grad_lse
    ds    = p * (do v^T - delta)
    grad_q = scale * ds k,   grad_k = scale * ds^T q,   grad_v = p^T do

Dao, "FlashAttention-2" (2023), arXiv:2307.08691, Algorithm 2. That lse may have a gradient of its own adds
p * grad_lse to ds, which delta takes in. With dropout, p is dropped where it meets do, and do v^T likewise; a softcap
multiplies ds by its derivative on its way to grad_q and grad_k.

A third pass, `attention_backward_bias`, sums ds over what shares an element of the bias.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .compiler import kernel
from .dropout import kept_weights
from .scores import (
    SIZES,
    block_state,
    cap,
    edge_start,
    gradient_through,
    key_tiles,
    looks,
    query_tiles,
    scaled,
    sequence,
    shift,
    statistics_at,
    visible,
    visible_keys,
)
from .softmax import LARGEST_RAW_LSE, LOG2E
from .tiles import load_tile, one_head, owned_queries, rounded_product, store_tile


class Statistics(NamedTuple):
    """What pass 1 leaves the others of each query, float32, (batch * heads, stride), packed (heads, stride): what
    `exponents` returned, and its delta. Rows and packed sequences start at multiples of 16 bytes: an H200 takes no bulk
    copy of numbers from elsewhere."""

    lse: tl.tensor
    delta: tl.tensor
    rest: tl.tensor  # raw scores have none: not written or read
    stride: tl.tensor


@triton.jit
def exponents(lse, rest, score, at, exists):
    """(lse, rest) of queries as `weights` takes them. lse is +inf where a query attends to nothing, so that its weights
    are 0; that of raw scores is in base 2, as rest is, which raw scores do not have."""
    lse_row = tl.load(lse + at, mask=exists, other=float("-inf"))
    rest_row = lse_row
    if score.raw:
        lse_row *= LOG2E
        too_large = (tl.abs(lse_row) >= LARGEST_RAW_LSE) & (lse_row > float("-inf"))
        lse_row = tl.where(too_large, float("nan"), lse_row)  # gradients that are NaN, not wrong
    elif rest is not None:
        rest_row = tl.load(rest + at, mask=exists, other=0.0) * LOG2E
    else:
        rest_row = tl.where(exists, 0.0, 0.0)  # without naming a layout, which Gluon asks for
    return tl.where(lse_row == float("-inf"), float("inf"), lse_row), rest_row


@triton.jit
def statistics_place(score, seq, batch, head, heads):
    """(row, column) where the statistics of a head's queries start."""
    line = batch * heads + head
    start = 0
    if score.cu_seqlens is not None:
        line = head
        start = (seq.q_start + 4 * batch) // 4 * 4  # a gap of 1 to 4 between sequences
    return line, start


@triton.jit
def of_head(score, rows, seq, batch, head, heads):
    """The statistics of one head's queries."""
    line, start = statistics_place(score, seq, batch, head, heads)
    at = tl.cast(line, tl.int64) * rows.stride + start
    return Statistics(rows.lse + at, rows.delta + at, rows.rest + at, rows.stride)


@triton.jit
def store_statistics(rows, lse, delta, rest, queries, end, RAW: tl.constexpr):
    """Of queries before `end`."""
    tl.store(rows.lse + queries, lse, mask=queries < end)
    tl.store(rows.delta + queries, delta, mask=queries < end)
    if not RAW:
        tl.store(rows.rest + queries, rest, mask=queries < end)


@triton.jit
def load_statistics(rows, queries, query_end, RAW: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """(lse, delta, rest) of queries; of those at or past `query_end` (looked at only with CHECK_ROWS) +inf, 0 and 0."""
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
    return lse, delta, rest


@triton.jit
def weights(products, lse, rest, score, seq, batch, head, queries, keys, state, EDGE: tl.constexpr):
    """(p, slope) of a tile of q k^T: the weights, and the derivative of the scores by scale * q.k. `lse`, `rest`,
    `queries` and `keys` broadcast to its shape; `state`: its `block_state`."""
    scores, slope = cap(score, scaled(score, products))
    scores, slope = shift(score, seq, scores, slope, batch, head, queries, keys, state)
    if score.raw:
        p = tl.exp2(scores * (score.scale * LOG2E) - lse)
    else:
        p = tl.exp2((scores - lse) * LOG2E - rest)
    if EDGE:
        p = tl.where(visible(score, seq, queries, keys), p, 0.0)
    return p, slope


@triton.jit
def score_gradients(
    q, grad_out, lse, delta, rest, k_tile, v, score, seq, batch, head, heads, start_m, start_n,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(ds, slope) of a tile (queries, keys): the gradient of the scores as softmax takes them, and the softcap's
    derivative."""
    products = tl.dot(q, tl.trans(k_tile), input_precision=score.precision)
    queries = start_m + tl.arange(0, BLOCK_M)
    keys = start_n + tl.arange(0, BLOCK_N)[None, :]
    state = block_state(score, batch, head, start_m, start_n)
    p, slope = weights(
        products, lse[:, None], rest[:, None], score, seq, batch, head, queries[:, None], keys, state, EDGE
    )
    v_tile = load_tile(v, start_n, seq.key_end, HEAD_DIM_V, BLOCK_N, BLOCK_DV, EDGE)
    dp = tl.dot(grad_out, tl.trans(v_tile), input_precision=score.precision)
    if score.dropout is not None:
        dp *= kept_weights(score.dropout, batch * heads + head, queries, start_n, BLOCK_N)
    return p * (dp - delta[:, None]), slope


@triton.jit
def visit_keys(
    acc, q, grad_out, lse, delta, rest, k, v, score, seq, batch, head, heads, start_m, start_n,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One key tile of pass 1: acc += ds k."""
    k_tile = load_tile(k, start_n, seq.key_end, HEAD_DIM, BLOCK_N, BLOCK_D, EDGE)
    ds, slope = score_gradients(
        q, grad_out, lse, delta, rest, k_tile, v, score, seq, batch, head, heads, start_m, start_n,
        HEAD_DIM_V, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE,
    )  # fmt: skip
    ds = gradient_through(score, ds, slope)
    return tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=score.precision)


@kernel(do_not_specialize=SIZES)
def attention_backward_q(
    q, k, v, out, grad_out, lse, rest, grad_lse, grad_q, rows, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pass 1: grad_q, and the statistics of the queries for the other passes.

    Grid: (query tiles * heads * batch,), the longest causal tiles first. A program owns BLOCK_M queries of one head.
    """
    start_m, head, kv_head, batch = owned_queries(tl.program_id(0), heads, kv_heads, seq_q, BLOCK_M)
    seq = sequence(score, batch, batches, seq_q, seq_k)

    k = one_head(k, batch, kv_head, seq.k_start)
    v = one_head(v, batch, kv_head, seq.k_start)
    queries = start_m + tl.arange(0, BLOCK_M)
    row = statistics_at(score, seq, batch, head, heads)
    do_tile = load_tile(
        one_head(grad_out, batch, head, seq.q_start), start_m, seq.query_end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True
    )
    out_tile = load_tile(
        one_head(out, batch, head, seq.q_start), start_m, seq.query_end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True
    )
    exists = queries < seq.query_end
    delta_row = tl.sum(rounded_product(do_tile.to(tl.float32), out_tile.to(tl.float32)), 1)
    if grad_lse is not None:
        delta_row -= tl.load(grad_lse + row + queries, mask=exists, other=0.0)
    lse_row, rest_row = exponents(lse, rest, score, row + queries, exists)
    rows = of_head(score, rows, seq, batch, head, heads)
    store_statistics(rows, lse_row, delta_row, rest_row, queries, seq.seq_q, score.raw)

    q_tile = load_tile(one_head(q, batch, head, seq.q_start), start_m, seq.query_end, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tiles = key_tiles(score, seq, start_m, BLOCK_M, BLOCK_N)
    for start_n in range(tiles.steady_begin, tiles.steady_end, BLOCK_N):
        if looks(score, batch, head, start_m, start_n):
            acc = visit_keys(
                acc, q_tile, do_tile, lse_row, delta_row, rest_row, k, v, score, seq, batch, head, heads, start_m,
                start_n,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE=False,
            )  # fmt: skip
    for index in tl.range(0, tiles.edges, num_stages=1):
        start_n = edge_start(tiles, index, BLOCK_N)
        if looks(score, batch, head, start_m, start_n):
            acc = visit_keys(
                acc, q_tile, do_tile, lse_row, delta_row, rest_row, k, v, score, seq, batch, head, heads, start_m,
                start_n,
                HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE=True,
            )  # fmt: skip
    store_tile(
        one_head(grad_q, batch, head, seq.q_start), acc * score.scale, start_m, seq.seq_q, HEAD_DIM, BLOCK_M, BLOCK_D
    )


@triton.jit
def visit_queries(
    grad_k, grad_v, k, v, q, grad_out, rows, score, seq, batch, head, heads, start_m, start_n,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One query tile of pass 2, transposed (keys down, queries across): grad_v += p^T do, grad_k += ds^T q."""
    queries = start_m + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q, start_m, seq.query_end, HEAD_DIM, BLOCK_M, BLOCK_D, EDGE)
    products = tl.dot(k, tl.trans(q_tile), input_precision=score.precision)
    keys = start_n + tl.arange(0, BLOCK_N)[:, None]
    state = block_state(score, batch, head, start_m, start_n)
    lse, delta, rest = load_statistics(rows, queries, seq.query_end, score.raw, EDGE)
    p, slope = weights(
        products, lse[None, :], rest[None, :], score, seq, batch, head, queries[None, :], keys, state, EDGE
    )
    do_tile = load_tile(grad_out, start_m, seq.query_end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, EDGE)
    dropped = p
    if score.dropout is not None:
        kept = tl.trans(kept_weights(score.dropout, batch * heads + head, queries, start_n, BLOCK_N))
        dropped = p * kept
    grad_v = tl.dot(dropped.to(do_tile.dtype), do_tile, grad_v, input_precision=score.precision)
    dp = tl.dot(v, tl.trans(do_tile), input_precision=score.precision)
    if score.dropout is not None:
        dp *= kept
    ds = p * (dp - delta[None, :])
    ds = gradient_through(score, ds, slope)
    grad_k = tl.dot(ds.to(q_tile.dtype), q_tile, grad_k, input_precision=score.precision)
    return grad_k, grad_v


@kernel(do_not_specialize=SIZES)
def attention_backward_kv(
    q, k, v, grad_out, rows, grad_k, grad_v, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pass 2: grad_k and grad_v, summed over the query heads that share this key/value head.

    Grid: (key tiles * kv_heads * batch,), the longest causal tiles first. A program owns BLOCK_N keys of one kv_head.
    """
    tiles_n = tl.cdiv(seq_k, BLOCK_N)
    program = tl.program_id(0)
    start_n = program % tiles_n * BLOCK_N
    kv_head = program // tiles_n % kv_heads
    batch = program // tiles_n // kv_heads
    group = heads // kv_heads
    seq = sequence(score, batch, batches, seq_q, seq_k)

    k_tile = load_tile(one_head(k, batch, kv_head, seq.k_start), start_n, seq.key_end, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v_tile = load_tile(
        one_head(v, batch, kv_head, seq.k_start), start_n, seq.key_end, HEAD_DIM_V, BLOCK_N, BLOCK_DV, True
    )
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    tiles = query_tiles(score, seq, start_n, BLOCK_M, BLOCK_N)
    for head in range(kv_head * group, kv_head * group + group):
        q_head = one_head(q, batch, head, seq.q_start)
        do_head = one_head(grad_out, batch, head, seq.q_start)
        rows_head = of_head(score, rows, seq, batch, head, heads)
        for start_m in range(tiles.steady_begin, tiles.steady_end, BLOCK_M):
            if looks(score, batch, head, start_m, start_n):
                acc_k, acc_v = visit_queries(
                    acc_k, acc_v, k_tile, v_tile, q_head, do_head, rows_head, score, seq, batch, head, heads, start_m,
                    start_n,
                    HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE=False,
                )  # fmt: skip
        for index in tl.range(0, tiles.edges, num_stages=1):
            start_m = edge_start(tiles, index, BLOCK_M)
            if looks(score, batch, head, start_m, start_n):
                acc_k, acc_v = visit_queries(
                    acc_k, acc_v, k_tile, v_tile, q_head, do_head, rows_head, score, seq, batch, head, heads, start_m,
                    start_n,
                    HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE=True,
                )  # fmt: skip

    # Keys past the end were read as 0, but exp2(0 - lse) is not 0: their rows are dropped here, once, so that the
    # steady loop need not look at them.
    exists = (start_n + tl.arange(0, BLOCK_N) < seq.key_end)[:, None]
    acc_k = tl.where(exists, acc_k * score.scale, 0.0)
    acc_v = tl.where(exists, acc_v, 0.0)
    store_tile(one_head(grad_k, batch, kv_head, seq.k_start), acc_k, start_n, seq.seq_k, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(one_head(grad_v, batch, kv_head, seq.k_start), acc_v, start_n, seq.seq_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV)


@triton.jit
def shared(size, index, all_of_them, BLOCK: tl.constexpr):
    """The range that belongs to position `index` of a dimension of the bias: all of it where it is broadcast."""
    begin = tl.where(size == 1, 0, index * BLOCK)
    return begin, tl.where(size == 1, all_of_them, tl.minimum(begin + BLOCK, all_of_them))


@kernel(do_not_specialize=[*SIZES, "size_batch", "size_head", "size_q", "size_k"])
def attention_backward_bias(
    q, k, v, grad_out, rows, grad_bias, score, batches, heads, kv_heads, seq_q, seq_k,
    size_batch, size_head, size_q, size_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_bias (size_batch, size_head, size_q, size_k), float32: ds summed over the batch rows, heads, queries and
    keys that share an element.

    Grid: (tiles of keys * tiles of queries * size_head * size_batch,). A program owns BLOCK_M x BLOCK_N elements of the
    bias, or all queries or keys where those are broadcast; S and dP are computed once more.
    """
    program = tl.program_id(0)
    tiles_n = tl.cdiv(size_k, BLOCK_N)
    tiles_m = tl.cdiv(size_q, BLOCK_M)
    tile_n = program % tiles_n
    tile_m = program // tiles_n % tiles_m
    bias_head = program // tiles_n // tiles_m % size_head
    bias_batch = program // tiles_n // tiles_m // size_head
    first_batch, last_batch = shared(size_batch, bias_batch, batches, 1)
    first_head, last_head = shared(size_head, bias_head, heads, 1)
    first_m, last_m = shared(size_q, tile_m, seq_q, BLOCK_M)
    first_n, last_n = shared(size_k, tile_n, seq_k, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for batch in range(first_batch, last_batch):
        seq = sequence(score, batch, batches, seq_q, seq_k)
        for head in range(first_head, last_head):
            k_head = one_head(k, batch, head // (heads // kv_heads), seq.k_start)
            v_head = one_head(v, batch, head // (heads // kv_heads), seq.k_start)
            rows_head = of_head(score, rows, seq, batch, head, heads)
            for start_m in range(first_m, tl.minimum(last_m, seq.query_end), BLOCK_M):
                queries = start_m + tl.arange(0, BLOCK_M)
                q_tile = load_tile(
                    one_head(q, batch, head, seq.q_start), start_m, seq.query_end, HEAD_DIM, BLOCK_M, BLOCK_D, True
                )
                do_tile = load_tile(
                    one_head(grad_out, batch, head, seq.q_start),
                    start_m,
                    seq.query_end,
                    HEAD_DIM_V,
                    BLOCK_M,
                    BLOCK_DV,
                    True,
                )
                lse, delta, rest = load_statistics(rows_head, queries, seq.query_end, score.raw, True)
                begin, end = visible_keys(score, seq, start_m, BLOCK_M)
                begin = tl.maximum(first_n, begin // BLOCK_N * BLOCK_N)
                for start_n in range(begin, tl.minimum(last_n, end), BLOCK_N):
                    k_tile = load_tile(k_head, start_n, seq.key_end, HEAD_DIM, BLOCK_N, BLOCK_D, True)
                    ds, _ = score_gradients(
                        q_tile, do_tile, lse, delta, rest, k_tile, v_head, score, seq, batch, head, heads, start_m,
                        start_n,
                        HEAD_DIM_V, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE=True,
                    )  # fmt: skip
                    acc += ds
    # Where queries or keys are broadcast, every row or column belongs to the first.
    i = tl.arange(0, BLOCK_M)
    j = tl.arange(0, BLOCK_N)
    if size_q == 1:
        acc = tl.where(i[:, None] == 0, tl.sum(acc, 0)[None, :], 0.0)
    if size_k == 1:
        acc = tl.where(j[None, :] == 0, tl.sum(acc, 1)[:, None], 0.0)
    i += tile_m * BLOCK_M
    j += tile_n * BLOCK_N
    plane = tl.cast(bias_batch * size_head + bias_head, tl.int64) * size_q
    pointers = grad_bias + (plane + i[:, None]) * size_k + j[None, :]
    tl.store(pointers, acc, mask=(i[:, None] < size_q) & (j[None, :] < size_k))
