"""Attention forward.

Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023), arXiv:2307.08691.
"""

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
    key_tiles,
    lse_offset,
    partial_start,
    query_tile_of_program,
    scale_products,
)
from .softmax import LARGEST_RAW, LOG2E, add_sink, logsumexp, online_softmax
from .state import Shape, Sizes, Softmax, TilePositions
from .tiles import head_view, load_tile, store_tile


@triton.jit
def fold_tile(products, m_i, l_i, score, at, tile, PARTIAL: tl.constexpr):
    """(weights, alpha, m_i, l_i): a tile of q k^T folded into the softmax."""
    scores, dscore = apply_softcap(score, scale_products(score, products))
    scores, _ = apply_score_mods(score, at, scores, dscore, tile)
    return fold_scores(scores, m_i, l_i, score, at, tile, PARTIAL)


@triton.jit
def fold_scores(scores, m_i, l_i, score, at, tile, PARTIAL: tl.constexpr):
    """The same from the scores of a tile."""
    if PARTIAL:
        scores = tl.where(in_window_and_bounds(score, at.seq, tile), scores, float("-inf"))
    # A feature that gives -inf can leave a row without a key in any tile.
    MASKED: tl.constexpr = score.mask is not None or score.bias is not None
    EMPTY: tl.constexpr = PARTIAL or MASKED or score.score_mod is not None or score.blocks is not None
    return online_softmax(scores, score.scale * LOG2E, m_i, l_i, score.raw, EMPTY)


@triton.jit
def finalize_softmax(m_i, l_i, score, head):
    """(l, alpha, lse, rest) after the last key: the sum of the weights (0 of a fully masked row), the factor of the
    output so far where a sink joins, and the two parts of the sum's logarithm."""
    alpha = 1.0
    if score.raw:  # NaN, not 0, where weights would not fit float16
        l_i = tl.where((tl.abs(m_i) >= LARGEST_RAW) & (m_i > float("-inf")), float("nan"), l_i)
    if score.sinks is not None:
        m_i, l_i, alpha = add_sink(m_i, l_i, tl.load(score.sinks + head), score.raw)
    lse, rest = logsumexp(m_i, l_i, score.raw)
    return l_i, alpha, lse, rest


@triton.jit
def finalize_and_store_lse(lse, rest, m_i, l_i, score, at, queries):
    """Store lse and, if asked for, its rest. Returns (l, alpha, lse, rest) of `finalize_softmax`."""
    if score.q_lengths is not None:
        m_i = tl.where(queries < at.seq.query_end, m_i, float("-inf"))
        l_i = tl.where(queries < at.seq.query_end, l_i, 0.0)
    l_i, alpha, lse_row, rest_row = finalize_softmax(m_i, l_i, score, at.head)
    offset = lse_offset(score, at)
    tl.store(lse + offset + queries, lse_row, mask=queries < at.seq.seq_q)
    if rest is not None:
        tl.store(rest + offset + queries, rest_row, mask=queries < at.seq.seq_q)
    return l_i, alpha, lse_row, rest_row


@triton.jit
def attend_tile(state, q, k, v, score, at, start_m, start_n, shape: tl.constexpr, PARTIAL: tl.constexpr):
    """One key tile: s = q k^T * scale, folded into the softmax; acc = alpha acc + p v."""
    k_tile = load_tile(k, start_n, at.seq.key_end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, PARTIAL)
    products = tl.dot(q, tl.trans(k_tile), input_precision=score.precision)
    queries = start_m + tl.arange(0, shape.BLOCK_M)[:, None]
    keys = start_n + tl.arange(0, shape.BLOCK_N)[None, :]
    tile = TilePositions(queries, keys, block_state(score, at, start_m, start_n))
    p, alpha, m_i, l_i = fold_tile(products, state.m_i, state.l_i, score, at, tile, PARTIAL)
    if score.dropout is not None:
        queries = start_m + tl.arange(0, shape.BLOCK_M)
        head = at.batch * at.heads + at.head
        p *= dropout_multipliers(score, head, queries, start_n, shape.BLOCK_N, shape.BLOCK_N)
    v_tile = load_tile(v, start_n, at.seq.key_end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV, PARTIAL)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, state.acc * alpha[:, None], input_precision=score.precision)
    return Softmax(acc, m_i, l_i)


@kernel(do_not_specialize=NO_SPECIALIZE)
def attention_forward(
    q, k, v, out, lse, rest, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = softmax(q k^T * scale) v and lse = logsumexp(q k^T * scale), in one pass over the keys; also `rest`, the
    rounding error of lse, if asked for.

    Grid: (query tiles * heads * batch,), the longest causal tiles first. A program owns BLOCK_M queries of one head.
    """
    shape: tl.constexpr = Shape(HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N)
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    start_m, kv_head, at = query_tile_of_program(tl.program_id(0), score, sizes, shape.BLOCK_M)
    seq = at.seq
    k = head_view(k, at.batch, kv_head, seq.k_start)
    v = head_view(v, at.batch, kv_head, seq.k_start)
    q_head = head_view(q, at.batch, at.head, seq.q_start)
    q_tile = load_tile(q_head, start_m, seq.query_end, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D, True)
    acc = tl.zeros((shape.BLOCK_M, shape.BLOCK_DV), tl.float32)
    state = Softmax(acc, tl.full((shape.BLOCK_M,), float("-inf"), tl.float32), tl.zeros((shape.BLOCK_M,), tl.float32))

    tiles = key_tiles(score, seq, start_m, shape.BLOCK_M, shape.BLOCK_N)
    for start_n in range(tiles.full_begin, tiles.full_end, shape.BLOCK_N):
        if block_is_active(score, at, start_m, start_n):
            state = attend_tile(state, q_tile, k, v, score, at, start_m, start_n, shape, False)
    for index in tl.range(0, tiles.partial_count, num_stages=1):
        start_n = partial_start(tiles, index, shape.BLOCK_N)
        if block_is_active(score, at, start_m, start_n):
            state = attend_tile(state, q_tile, k, v, score, at, start_m, start_n, shape, True)

    queries = start_m + tl.arange(0, shape.BLOCK_M)
    l_i, alpha, _, _ = finalize_and_store_lse(lse, rest, state.m_i, state.l_i, score, at, queries)
    acc = state.acc
    if score.sinks is not None:
        acc *= alpha[:, None]
    result = tl.where(l_i[:, None] == 0.0, 0.0, acc / l_i[:, None])
    out_head = head_view(out, at.batch, at.head, seq.q_start)
    store_tile(out_head, result, start_m, seq.seq_q, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
