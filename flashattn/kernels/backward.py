"""Attention backward, recomputing the weights from lse. Two passes, so that nothing is atomic:

1. `attention_backward_q`: a program owns BLOCK_M queries, visits the keys, writes grad_q and delta.
2. `attention_backward_kv`: a program owns BLOCK_N keys of one key/value head, visits the queries of every head in
   the group, writes grad_k and grad_v.

With s = q k^T * scale, p = exp(s - lse), do = grad_out:

    delta = rowsum(do * out) - grad_lse
    ds    = p * (do v^T - delta)
    grad_q = scale * ds k,   grad_k = scale * ds^T q,   grad_v = p^T do

Dao, "FlashAttention-2" (2023), arXiv:2307.08691, Algorithm 2. That lse may have a gradient of its own adds
p * grad_lse to ds, which delta takes in.
"""

import triton
import triton.language as tl

from .scores import SIZES, edge_start, key_tiles, lengths, query_tiles, visible
from .softmax import LOG2E
from .tiles import load_tile, one_head, owned_queries, store_tile


@triton.jit
def load_lse(lse, queries, query_end):
    """Base-2 lse. +inf for a row that attends to nothing or does not exist, so that exp2(s - lse) is 0 for it."""
    value = tl.load(lse + queries, mask=queries < query_end, other=float("-inf"))
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit
def visit_keys(
    acc, q, grad_out, lse, delta, k, v, score, start_m, start_n, query_end, key_end,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One key tile of pass 1: acc += ds k."""
    k_tile = load_tile(k, start_n, key_end, HEAD_DIM, BLOCK_N, BLOCK_D, EDGE)
    scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee") * (score.scale * LOG2E)
    p = tl.exp2(scores - lse[:, None])
    if EDGE:
        queries = start_m + tl.arange(0, BLOCK_M)[:, None]
        keys = start_n + tl.arange(0, BLOCK_N)[None, :]
        p = tl.where(visible(score, queries, keys, query_end, key_end), p, 0.0)
    v_tile = load_tile(v, start_n, key_end, HEAD_DIM_V, BLOCK_N, BLOCK_DV, EDGE)
    dp = tl.dot(grad_out, tl.trans(v_tile), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")


@triton.jit(do_not_specialize=SIZES)
def attention_backward_q(
    q, k, v, out, grad_out, lse, grad_lse, grad_q, delta, score, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pass 1: grad_q, and delta for pass 2.

    Grid: (query tiles * heads * batch,), the longest causal tiles first. A program owns BLOCK_M queries of one head.
    """
    start_m, head, kv_head, batch = owned_queries(heads, kv_heads, seq_q, BLOCK_M)
    query_end, key_end = lengths(score, batch, seq_q, seq_k)

    k = one_head(k, batch, kv_head)
    v = one_head(v, batch, kv_head)
    queries = start_m + tl.arange(0, BLOCK_M)
    row = tl.cast(batch * heads + head, tl.int64) * seq_q
    do_tile = load_tile(one_head(grad_out, batch, head), start_m, query_end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
    out_tile = load_tile(one_head(out, batch, head), start_m, query_end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
    delta_row = tl.sum(do_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if grad_lse is not None:
        delta_row -= tl.load(grad_lse + row + queries, mask=queries < query_end, other=0.0)
    tl.store(delta + row + queries, delta_row, mask=queries < seq_q)

    lse_row = load_lse(lse + row, queries, query_end)
    q_tile = load_tile(one_head(q, batch, head), start_m, query_end, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tiles = key_tiles(score, start_m, query_end, key_end, BLOCK_M, BLOCK_N)
    for start_n in range(tiles.steady_begin, tiles.steady_end, BLOCK_N):
        acc = visit_keys(
            acc, q_tile, do_tile, lse_row, delta_row, k, v, score, start_m, start_n, query_end, key_end,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE=False,
        )  # fmt: skip
    for index in tl.range(0, tiles.edges, num_stages=1):
        acc = visit_keys(
            acc, q_tile, do_tile, lse_row, delta_row, k, v, score, start_m, edge_start(tiles, index, BLOCK_N),
            query_end, key_end, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE=True,
        )  # fmt: skip
    store_tile(one_head(grad_q, batch, head), acc * score.scale, start_m, seq_q, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def visit_queries(
    grad_k, grad_v, k, v, q, grad_out, lse, delta, score, start_m, start_n, query_end, key_end,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One query tile of pass 2, transposed (keys down, queries across): grad_v += p^T do, grad_k += ds^T q."""
    queries = start_m + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q, start_m, query_end, HEAD_DIM, BLOCK_M, BLOCK_D, EDGE)
    scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee") * (score.scale * LOG2E)
    p = tl.exp2(scores - load_lse(lse, queries, query_end)[None, :])
    if EDGE:
        keys = start_n + tl.arange(0, BLOCK_N)[:, None]
        p = tl.where(visible(score, queries[None, :], keys, query_end, key_end), p, 0.0)
    do_tile = load_tile(grad_out, start_m, query_end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, EDGE)
    grad_v = tl.dot(p.to(do_tile.dtype), do_tile, grad_v, input_precision="ieee")
    delta_row = tl.load(delta + queries, mask=queries < query_end, other=0.0)
    dp = tl.dot(v, tl.trans(do_tile), input_precision="ieee")
    ds = p * (dp - delta_row[None, :])
    grad_k = tl.dot(ds.to(q_tile.dtype), q_tile, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit(do_not_specialize=SIZES)
def attention_backward_kv(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, score, heads, kv_heads, seq_q, seq_k,
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
    query_end, key_end = lengths(score, batch, seq_q, seq_k)

    k_tile = load_tile(one_head(k, batch, kv_head), start_n, key_end, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v_tile = load_tile(one_head(v, batch, kv_head), start_n, key_end, HEAD_DIM_V, BLOCK_N, BLOCK_DV, True)
    acc_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    tiles = query_tiles(score, start_n, query_end, key_end, BLOCK_M, BLOCK_N)
    for head in range(kv_head * group, kv_head * group + group):
        q_head = one_head(q, batch, head)
        do_head = one_head(grad_out, batch, head)
        row = tl.cast(batch * heads + head, tl.int64) * seq_q
        for start_m in range(tiles.steady_begin, tiles.steady_end, BLOCK_M):
            acc_k, acc_v = visit_queries(
                acc_k, acc_v, k_tile, v_tile, q_head, do_head, lse + row, delta + row, score, start_m, start_n,
                query_end, key_end, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE=False,
            )  # fmt: skip
        for index in tl.range(0, tiles.edges, num_stages=1):
            start_m = edge_start(tiles, index, BLOCK_M)
            acc_k, acc_v = visit_queries(
                acc_k, acc_v, k_tile, v_tile, q_head, do_head, lse + row, delta + row, score, start_m, start_n,
                query_end, key_end, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE=True,
            )  # fmt: skip

    # Keys past the end were read as 0, but exp2(0 - lse) is not 0: their rows are dropped here, once, so that the
    # steady loop need not look at them.
    exists = (start_n + tl.arange(0, BLOCK_N) < key_end)[:, None]
    acc_k = tl.where(exists, acc_k * score.scale, 0.0)
    acc_v = tl.where(exists, acc_v, 0.0)
    store_tile(one_head(grad_k, batch, kv_head), acc_k, start_n, seq_k, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(one_head(grad_v, batch, kv_head), acc_v, start_n, seq_k, HEAD_DIM_V, BLOCK_N, BLOCK_DV)
