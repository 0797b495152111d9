"""The derivative of attention's forward pass in the direction of tangents, in one pass over the keys.

With the scores s, their tangents s', the weights p = exp(s - lse) and the dropout multipliers d:

    lse' = sum(p s') + p_sink sink'
    out' = sum(d p (s' v + v')) - lse' out

Beside the output the online softmax sums d p (s' v + v') and p s'. Forward-mode differentiation of Dao,
"FlashAttention-2" (2023), arXiv:2307.08691, Algorithm 1.
"""

import triton
import triton.language as tl

from .backward import load_query_tile
from .compiler import kernel
from .dropout import dropout_multipliers
from .forward import finalize_and_store_lse, fold_scores
from .scores import (
    NO_SPECIALIZE,
    block_is_active,
    block_state,
    hide_tangent,
    key_tiles,
    linearize_scores,
    lse_offset,
    partial_start,
    query_tile_of_program,
)
from .softmax import LOG2E
from .state import KeyViews, Shape, Sizes, Softmax, SoftmaxTangent, TilePositions
from .tiles import head_view, load_tile, rounded_product, store_tile


@triton.jit
def product_tangent(a, tangent_a, b, tangent_b, precision: tl.constexpr):
    """The tangent of a b^T; 0 at compile time where neither has one."""
    result = 0.0
    if tangent_a is not None:
        result = tl.dot(tangent_a, tl.trans(b), input_precision=precision)
    if tangent_a is not None and tangent_b is not None:
        result = tl.dot(a, tl.trans(tangent_b), result, input_precision=precision)
    elif tangent_b is not None:
        result = tl.dot(a, tl.trans(tangent_b), input_precision=precision)
    return result


@triton.jit
def linearize_tile(a, tangent_a, b, tangent_b, score, tangents, at, tile, OF_BIAS: tl.constexpr = False):
    """The `Dual` of a tile of scores from q and k, or transposed from k and q."""
    products = tl.dot(a, tl.trans(b), input_precision=score.precision)
    tangent_products = product_tangent(a, tangent_a, b, tangent_b, score.precision)
    return linearize_scores(score, tangents, at, products, tangent_products, tile, OF_BIAS)


@triton.jit
def attend_tile(
    state,
    tangent_state,
    q,
    tangent_q,
    keys,
    score,
    tangents,
    at,
    start_m,
    start_n,
    shape: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """One key tile, folded into the Softmax and its tangent: acc = alpha acc + d p v and, of the tangents, acc' = alpha
    acc' + d p (s' v + v'), mu = alpha mu + rowsum(p s')."""
    end = at.seq.key_end
    k_tile = load_tile(keys.k, start_n, end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, PARTIAL)
    tangent_k = None
    if keys.tangent_k is not None:
        tangent_k = load_tile(keys.tangent_k, start_n, end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, PARTIAL)
    queries = start_m + tl.arange(0, shape.BLOCK_M)
    cols = start_n + tl.arange(0, shape.BLOCK_N)[None, :]
    tile = TilePositions(queries[:, None], cols, block_state(score, at, start_m, start_n))
    dual = linearize_tile(q, tangent_q, k_tile, tangent_k, score, tangents, at, tile)
    p, alpha, m_i, l_i = fold_scores(dual.scores, state.m_i, state.l_i, score, at, tile, PARTIAL)
    mu = tangent_state.mu * alpha
    tangent_p = p
    if tangents.of_scores:
        tangent_p = rounded_product(p, hide_tangent(tangents, p, dual.tangent))
        mu += tl.sum(tangent_p, 1)
    if score.dropout is not None:
        head = at.batch * at.heads + at.head
        kept = dropout_multipliers(score, head, queries, start_n, shape.BLOCK_N, shape.BLOCK_N)
        p *= kept
        tangent_p *= kept
    v_tile = load_tile(keys.v, start_n, end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV, PARTIAL)
    weights = p.to(v_tile.dtype)
    acc = tl.dot(weights, v_tile, state.acc * alpha[:, None], input_precision=score.precision)
    tangent_acc = tangent_state.acc * alpha[:, None]
    if tangents.of_scores:
        tangent_acc = tl.dot(tangent_p.to(v_tile.dtype), v_tile, tangent_acc, input_precision=score.precision)
    if keys.tangent_v is not None:
        tangent_v = load_tile(keys.tangent_v, start_n, end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV, PARTIAL)
        tangent_acc = tl.dot(weights, tangent_v, tangent_acc, input_precision=score.precision)
    return Softmax(acc, m_i, l_i), SoftmaxTangent(tangent_acc, mu)


@triton.jit
def sink_weight(score, head, lse, rest):
    """The weight of a head's sink, 0 of fully masked rows."""
    exponent = (tl.load(score.sinks + head).to(tl.float32) - lse) * LOG2E
    if not score.raw:
        exponent -= rest * LOG2E
    return tl.where(lse == float("-inf"), 0.0, tl.exp2(exponent))


@kernel(do_not_specialize=[*NO_SPECIALIZE, "tangents"])
def attention_jvp(
    q, k, v, out, lse, rest, tangent_out, tangent_lse, tangents, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out, lse and rest of `attention_forward`, and the tangents of out and lse.

    Grid: (query tiles * heads * batch,), the longest causal tiles first. A program owns BLOCK_M queries of one head.
    """
    shape: tl.constexpr = Shape(HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N)
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    start_m, kv_head, at = query_tile_of_program(tl.program_id(0), score, sizes, shape.BLOCK_M)
    seq = at.seq
    tangent_k = None
    tangent_v = None
    if tangents.k is not None:
        tangent_k = head_view(tangents.k, at.batch, kv_head, seq.k_start)
    if tangents.v is not None:
        tangent_v = head_view(tangents.v, at.batch, kv_head, seq.k_start)
    k = head_view(k, at.batch, kv_head, seq.k_start)
    v = head_view(v, at.batch, kv_head, seq.k_start)
    keys = KeyViews(k, v, tangent_k, tangent_v)
    tangent_q = None
    if tangents.q is not None:
        tangent_q = load_query_tile(tangents.q, start_m, at, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D)
    q_tile = load_query_tile(q, start_m, at, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D)
    acc = tl.zeros((shape.BLOCK_M, shape.BLOCK_DV), tl.float32)
    zeros = tl.zeros((shape.BLOCK_M,), tl.float32)
    state = Softmax(acc, tl.full((shape.BLOCK_M,), float("-inf"), tl.float32), zeros)
    tangent_state = SoftmaxTangent(acc, zeros)

    tiles = key_tiles(score, seq, start_m, shape.BLOCK_M, shape.BLOCK_N)
    for start_n in range(tiles.full_begin, tiles.full_end, shape.BLOCK_N):
        if block_is_active(score, at, start_m, start_n):
            state, tangent_state = attend_tile(
                state, tangent_state, q_tile, tangent_q, keys, score, tangents, at, start_m, start_n, shape, False
            )
    for index in tl.range(0, tiles.partial_count, num_stages=1):
        start_n = partial_start(tiles, index, shape.BLOCK_N)
        if block_is_active(score, at, start_m, start_n):
            state, tangent_state = attend_tile(
                state, tangent_state, q_tile, tangent_q, keys, score, tangents, at, start_m, start_n, shape, True
            )

    queries = start_m + tl.arange(0, shape.BLOCK_M)
    l_i, alpha, lse_row, rest_row = finalize_and_store_lse(lse, rest, state.m_i, state.l_i, score, at, queries)
    empty = l_i == 0.0
    factor = tl.where(empty, 0.0, alpha / l_i)
    mu = tl.where(empty, 0.0, tangent_state.mu * factor)
    if tangents.sinks is not None:
        mu += sink_weight(score, at.head, lse_row, rest_row) * tl.load(tangents.sinks + at.head).to(tl.float32)
    tl.store(tangent_lse + lse_offset(score, at) + queries, mu, mask=queries < seq.seq_q)
    result = tl.where(empty[:, None], 0.0, state.acc * factor[:, None])
    tangent_result = tl.where(empty[:, None], 0.0, tangent_state.acc * factor[:, None] - mu[:, None] * result)
    out_head = head_view(out, at.batch, at.head, seq.q_start)
    store_tile(out_head, result, start_m, seq.seq_q, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
    out_head = head_view(tangent_out, at.batch, at.head, seq.q_start)
    store_tile(out_head, tangent_result, start_m, seq.seq_q, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
