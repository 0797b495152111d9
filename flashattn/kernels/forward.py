"""Attention forward.

Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023), arXiv:2307.08691.
"""

import triton
import triton.language as tl

from .compiler import kernel
from .dropout import kept_weights
from .scores import (
    SIZES,
    block_state,
    cap,
    edge_start,
    key_tiles,
    looks,
    owned_queries,
    scaled,
    shift,
    statistics_at,
    visible,
)
from .softmax import LARGEST_RAW, LOG2E, join_sink, logsumexp, online_softmax
from .state import Shape, Sizes, Softmax, TilePositions
from .tiles import load_tile, one_head, store_tile


@triton.jit
def fold(products, m_i, l_i, score, at, tile, EDGE: tl.constexpr):
    """(weights, alpha, m_i, l_i): a tile of q k^T folded into the softmax."""
    scores, slope = cap(score, scaled(score, products))
    scores, _ = shift(score, at, scores, slope, tile)
    if EDGE:
        scores = tl.where(visible(score, at.seq, tile), scores, float("-inf"))
    # What gives -inf can leave a row of any tile without a key.
    MASKED: tl.constexpr = score.mask is not None or score.bias is not None
    EMPTY: tl.constexpr = EDGE or MASKED or score.score_mod is not None or score.blocks is not None
    return online_softmax(scores, score.scale * LOG2E, m_i, l_i, score.raw, EMPTY)


@triton.jit
def close(m_i, l_i, score, head):
    """(l, alpha, lse, rest) once every key is folded in: the sum of the weights, 0 where there are none, what the
    output so far is multiplied by where a sink joins, and the two parts of the sum's logarithm."""
    alpha = 1.0
    if score.raw:  # beyond that weights do not fit float16: NaN, not 0
        l_i = tl.where((tl.abs(m_i) >= LARGEST_RAW) & (m_i > float("-inf")), float("nan"), l_i)
    if score.sinks is not None:
        m_i, l_i, alpha = join_sink(m_i, l_i, tl.load(score.sinks + head), score.raw)
    lse, rest = logsumexp(m_i, l_i, score.raw)
    return l_i, alpha, lse, rest


@triton.jit
def finish(lse, rest, m_i, l_i, score, at, queries):
    """(l, alpha) of `close`. Stores lse and, if asked for, its rest."""
    if score.q_lengths is not None:
        m_i = tl.where(queries < at.seq.query_end, m_i, float("-inf"))
        l_i = tl.where(queries < at.seq.query_end, l_i, 0.0)
    l_i, alpha, lse_row, rest_row = close(m_i, l_i, score, at.head)
    offset = statistics_at(score, at)
    tl.store(lse + offset + queries, lse_row, mask=queries < at.seq.seq_q)
    if rest is not None:
        tl.store(rest + offset + queries, rest_row, mask=queries < at.seq.seq_q)
    return l_i, alpha


@triton.jit
def attend(run, q, k, v, score, at, start_m, start_n, shape: tl.constexpr, EDGE: tl.constexpr):
    """One key tile: s = q k^T * scale, fold into the softmax, acc = alpha acc + p v."""
    k_tile = load_tile(k, start_n, at.seq.key_end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, EDGE)
    products = tl.dot(q, tl.trans(k_tile), input_precision=score.precision)
    queries = start_m + tl.arange(0, shape.BLOCK_M)[:, None]
    keys = start_n + tl.arange(0, shape.BLOCK_N)[None, :]
    tile = TilePositions(queries, keys, block_state(score, at, start_m, start_n))
    p, alpha, m_i, l_i = fold(products, run.m_i, run.l_i, score, at, tile, EDGE)
    if score.dropout is not None:
        queries = start_m + tl.arange(0, shape.BLOCK_M)
        p *= kept_weights(score.dropout, at.batch * at.heads + at.head, queries, start_n, shape.BLOCK_N)
    v_tile = load_tile(v, start_n, at.seq.key_end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV, EDGE)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, run.acc * alpha[:, None], input_precision=score.precision)
    return Softmax(acc, m_i, l_i)


@kernel(do_not_specialize=SIZES)
def attention_forward(
    q, k, v, out, lse, rest, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T * scale) v and lse = logsumexp(q k^T * scale), one pass over the keys; if `rest` is given,
    also what rounding took from lse.

    Grid: (query tiles * heads * batch,), the longest causal tiles first. A program owns BLOCK_M queries of one head.
    """
    shape: tl.constexpr = Shape(HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N)
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    start_m, kv_head, at = owned_queries(tl.program_id(0), score, sizes, shape.BLOCK_M)
    seq = at.seq
    k = one_head(k, at.batch, kv_head, seq.k_start)
    v = one_head(v, at.batch, kv_head, seq.k_start)
    q_head = one_head(q, at.batch, at.head, seq.q_start)
    q_tile = load_tile(q_head, start_m, seq.query_end, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D, True)
    acc = tl.zeros((shape.BLOCK_M, shape.BLOCK_DV), tl.float32)
    run = Softmax(acc, tl.full((shape.BLOCK_M,), float("-inf"), tl.float32), tl.zeros((shape.BLOCK_M,), tl.float32))

    tiles = key_tiles(score, seq, start_m, shape.BLOCK_M, shape.BLOCK_N)
    for start_n in range(tiles.steady_begin, tiles.steady_end, shape.BLOCK_N):
        if looks(score, at, start_m, start_n):
            run = attend(run, q_tile, k, v, score, at, start_m, start_n, shape, False)
    for index in tl.range(0, tiles.edges, num_stages=1):
        start_n = edge_start(tiles, index, shape.BLOCK_N)
        if looks(score, at, start_m, start_n):
            run = attend(run, q_tile, k, v, score, at, start_m, start_n, shape, True)

    queries = start_m + tl.arange(0, shape.BLOCK_M)
    l_i, alpha = finish(lse, rest, run.m_i, run.l_i, score, at, queries)
    acc = run.acc
    if score.sinks is not None:
        acc *= alpha[:, None]
    result = tl.where(l_i[:, None] == 0.0, 0.0, acc / l_i[:, None])
    out_head = one_head(out, at.batch, at.head, seq.q_start)
    store_tile(out_head, result, start_m, seq.seq_q, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
