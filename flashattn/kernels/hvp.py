"""The tangents of attention's gradients at constant grad_out and grad_lse: the Hessian of sum(grad_out * out) +
sum(grad_lse * lse) times the tangents of q, k, v, bias and what a score_mod captured. Passes as in `backward.py`:

1. `attention_hvp_q`: a program owns BLOCK_M queries, visits the keys, and writes the tangents of grad_q and of the
   queries' statistics.
2. `attention_hvp_kv`: a program owns BLOCK_N keys of one key/value head, visits the queries of every head in the group,
   and writes the tangents of grad_k and grad_v.
3. `attention_hvp_bias`: the tangent of grad_bias.

With the scores s = f(x), x = scale * q k^T, a prime for the tangent, the weights p = exp(s - lse), the dropout
multipliers d and do = grad_out; out' and lse' are those of `jvp.py`:

    delta = rowsum(do * out) - grad_lse,   delta' = rowsum(do * out')
    dp  = d * (do v^T),                    dp' = d * (do v'^T)
    ds  = p * (dp - delta),                ds' = p * ((s' - lse') * (dp - delta) + dp' - delta')
    dx  = f'(x) * ds,                      dx' = f'(x) * ds' + (tangent of f'(x)) * ds
    grad_q' = scale * (dx' k + dx k'),   grad_k' = scale * (dx'^T q + dx^T q'),   grad_v' = (d * p * (s' - lse'))^T do

Nothing is atomic. The derivative of Dao, "FlashAttention-2" (2023), arXiv:2307.08691, Algorithm 2.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .backward import (
    BiasSizes,
    StatsPointers,
    bias_tile_of_program,
    head_stats_pointers,
    load_lse,
    load_query_tile,
    load_stats,
    row_dot,
    store_bias_tile,
    store_key_gradients,
    store_stats,
    weigh_scores,
)
from .compiler import kernel
from .dropout import dropout_multipliers
from .jvp import linearize_tile
from .scores import (
    NO_SPECIALIZE,
    block_is_active,
    block_state,
    hide_tangent,
    in_window_and_bounds,
    key_range,
    key_tile_of_program,
    key_tiles,
    load_seq_info,
    lse_offset,
    partial_start,
    query_tile_of_program,
    query_tiles,
    scores_backward,
    scores_backward_tangent,
)
from .state import (
    DualKeyTile,
    DualQueryTile,
    DualStats,
    HeadInfo,
    KeyGradients,
    KeyViews,
    QueryViews,
    RowStats,
    Shape,
    Sizes,
    TilePositions,
)
from .tiles import head_view, load_tile, store_tile


class DualPointers(NamedTuple):
    """The statistics of each query that pass 1 writes for the others, and their tangents, of which rest has none."""

    rows: StatsPointers
    tangents: StatsPointers


@triton.jit
def head_dual_pointers(score, rows, at):
    """Pointers to the statistics of one head's queries."""
    return DualPointers(head_stats_pointers(score, rows.rows, at), head_stats_pointers(score, rows.tangents, at))


@triton.jit
def load_dual_stats(rows, queries, query_end, RAW: tl.constexpr, CHECK_ROWS: tl.constexpr):
    """The DualStats of queries, as `load_stats`; tangents are 0 of those at or past `query_end`."""
    tangent = load_stats(rows.tangents, queries, query_end, True, CHECK_ROWS)
    tangent_lse = tangent.lse
    if CHECK_ROWS:
        tangent_lse = tl.where(queries < query_end, tangent_lse, 0.0)
    return DualStats(load_stats(rows.rows, queries, query_end, RAW, CHECK_ROWS), tangent_lse, tangent.delta)


@triton.jit
def differentiate_scores(dual, p, stats, dp, tangent_dp, tangents):
    """(ds, its tangent, the tangent of log(p)) of a tile. stats: the DualStats, in a shape that broadcasts."""
    tangent_log = hide_tangent(tangents, p, dual.tangent) - stats.tangent_lse
    inner = dp - stats.rows.delta
    tangent_ds = p * (tangent_log * inner + (tangent_dp - stats.tangent_delta))
    return p * inner, tangent_ds, tangent_log


@triton.jit
def expand_stats(stats, AXIS: tl.constexpr):
    """The DualStats of queries with another axis, along which they broadcast."""
    lse = tl.expand_dims(stats.rows.lse, AXIS)
    delta = tl.expand_dims(stats.rows.delta, AXIS)
    rest = tl.expand_dims(stats.rows.rest, AXIS)
    tangent_lse = tl.expand_dims(stats.tangent_lse, AXIS)
    return DualStats(RowStats(lse, delta, rest), tangent_lse, tl.expand_dims(stats.tangent_delta, AXIS))


@triton.jit
def compute_dual_gradients(
    own, k_tile, tangent_k, keys, score, tangents, at, start_n,
    shape: tl.constexpr, PARTIAL: tl.constexpr, OF_BIAS: tl.constexpr,
):  # fmt: skip
    """(dx, its tangent) of a tile (queries, keys): the gradient of scale * q.k, or of the bias. own: the
    DualQueryTile."""
    queries = own.start + tl.arange(0, shape.BLOCK_M)
    cols = start_n + tl.arange(0, shape.BLOCK_N)[None, :]
    tile = TilePositions(queries[:, None], cols, block_state(score, at, own.start, start_n))
    dual = linearize_tile(own.q, own.tangent_q, k_tile, tangent_k, score, tangents, at, tile, OF_BIAS)
    stats = expand_stats(own.stats, 1)
    p = weigh_scores(dual.scores, stats.rows.lse, stats.rows.rest, score)
    if PARTIAL:
        p = tl.where(in_window_and_bounds(score, at.seq, tile), p, 0.0)
    end = at.seq.key_end
    v_tile = load_tile(keys.v, start_n, end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV, PARTIAL)
    dp = tl.dot(own.grad_out, tl.trans(v_tile), input_precision=score.precision)
    tangent_dp = 0.0
    if keys.tangent_v is not None:
        tangent_v = load_tile(keys.tangent_v, start_n, end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV, PARTIAL)
        tangent_dp = tl.dot(own.grad_out, tl.trans(tangent_v), input_precision=score.precision)
    if score.dropout is not None:
        head = at.batch * at.heads + at.head
        kept = dropout_multipliers(score, head, queries, start_n, shape.BLOCK_N, shape.BLOCK_N)
        dp *= kept
        tangent_dp *= kept
    ds, tangent_ds, _ = differentiate_scores(dual, p, stats, dp, tangent_dp, tangents)
    return scores_backward(score, ds, dual.dscore), scores_backward_tangent(score, ds, tangent_ds, dual)


@triton.jit
def accumulate_dual_dq(acc, own, keys, score, tangents, at, start_n, shape: tl.constexpr, PARTIAL: tl.constexpr):
    """One key tile of pass 1: acc += dx' k + dx k'."""
    end = at.seq.key_end
    k_tile = load_tile(keys.k, start_n, end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, PARTIAL)
    tangent_k = None
    if keys.tangent_k is not None:
        tangent_k = load_tile(keys.tangent_k, start_n, end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, PARTIAL)
    dx, tangent_dx = compute_dual_gradients(
        own, k_tile, tangent_k, keys, score, tangents, at, start_n, shape, PARTIAL, False
    )
    acc = tl.dot(tangent_dx.to(k_tile.dtype), k_tile, acc, input_precision=score.precision)
    if keys.tangent_k is not None:
        acc = tl.dot(dx.to(k_tile.dtype), tangent_k, acc, input_precision=score.precision)
    return acc


@kernel(do_not_specialize=[*NO_SPECIALIZE, "tangents"])
def attention_hvp_q(
    q, k, v, out, tangent_out, grad_out, lse, rest, grad_lse, tangent_lse, grad_q, rows, tangents, score,
    batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pass 1: the tangent of grad_q, and the statistics of the queries and their tangents for the other passes.

    Grid: (query tiles * heads * batch,), the longest causal tiles first. A program owns BLOCK_M queries of one head.
    """
    shape: tl.constexpr = Shape(HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N)
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    start_m, kv_head, at = query_tile_of_program(tl.program_id(0), score, sizes, shape.BLOCK_M)
    seq = at.seq
    queries = start_m + tl.arange(0, shape.BLOCK_M)
    exists = queries < seq.query_end
    row = lse_offset(score, at)
    do_tile = load_query_tile(grad_out, start_m, at, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
    out_tile = load_query_tile(out, start_m, at, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
    delta = row_dot(do_tile, out_tile)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + row + queries, mask=exists, other=0.0)
    lse_row, rest_row = load_lse(lse, rest, score, row + queries, exists)
    out_tile = load_query_tile(tangent_out, start_m, at, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
    tangent_delta = row_dot(do_tile, out_tile)
    tangent_row = tl.load(tangent_lse + row + queries, mask=exists, other=0.0)
    stats = DualStats(RowStats(lse_row, delta, rest_row), tangent_row, tangent_delta)
    rows_head = head_dual_pointers(score, rows, at)
    store_stats(rows_head.rows, stats.rows, queries, seq.seq_q, score.raw)
    store_stats(rows_head.tangents, RowStats(tangent_row, tangent_delta, tangent_row), queries, seq.seq_q, True)

    tangent_q = None
    if tangents.q is not None:
        tangent_q = load_query_tile(tangents.q, start_m, at, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D)
    q_tile = load_query_tile(q, start_m, at, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D)
    own = DualQueryTile(start_m, q_tile, tangent_q, do_tile, stats)
    tangent_k = None
    tangent_v = None
    if tangents.k is not None:
        tangent_k = head_view(tangents.k, at.batch, kv_head, seq.k_start)
    if tangents.v is not None:
        tangent_v = head_view(tangents.v, at.batch, kv_head, seq.k_start)
    k = head_view(k, at.batch, kv_head, seq.k_start)
    v = head_view(v, at.batch, kv_head, seq.k_start)
    keys = KeyViews(k, v, tangent_k, tangent_v)
    acc = tl.zeros((shape.BLOCK_M, shape.BLOCK_D), tl.float32)
    tiles = key_tiles(score, seq, start_m, shape.BLOCK_M, shape.BLOCK_N)
    for start_n in range(tiles.full_begin, tiles.full_end, shape.BLOCK_N):
        if block_is_active(score, at, start_m, start_n):
            acc = accumulate_dual_dq(acc, own, keys, score, tangents, at, start_n, shape, False)
    for index in tl.range(0, tiles.partial_count, num_stages=1):
        start_n = partial_start(tiles, index, shape.BLOCK_N)
        if block_is_active(score, at, start_m, start_n):
            acc = accumulate_dual_dq(acc, own, keys, score, tangents, at, start_n, shape, True)
    grad_q_head = head_view(grad_q, at.batch, at.head, seq.q_start)
    store_tile(grad_q_head, acc * score.scale, start_m, seq.seq_q, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D)


@triton.jit
def accumulate_dual_dkv(
    grads, own, views, rows, score, tangents, at, start_m, shape: tl.constexpr, PARTIAL: tl.constexpr
):
    """One query tile of pass 2, transposed (keys down, queries across): grad_v' += (p (s' - lse'))^T do, grad_k' +=
    dx'^T q + dx^T q'. own: the DualKeyTile; views: the QueryViews of the head."""
    end = at.seq.query_end
    queries = start_m + tl.arange(0, shape.BLOCK_M)
    q_tile = load_tile(views.q, start_m, end, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D, PARTIAL)
    tangent_q = None
    if views.tangent_q is not None:
        tangent_q = load_tile(views.tangent_q, start_m, end, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D, PARTIAL)
    rows_down = own.start + tl.arange(0, shape.BLOCK_N)[:, None]
    tile = TilePositions(queries[None, :], rows_down, block_state(score, at, start_m, own.start))
    dual = linearize_tile(own.k, own.tangent_k, q_tile, tangent_q, score, tangents, at, tile)
    stats = expand_stats(load_dual_stats(rows, queries, end, score.raw, PARTIAL), 0)
    p = weigh_scores(dual.scores, stats.rows.lse, stats.rows.rest, score)
    if PARTIAL:
        p = tl.where(in_window_and_bounds(score, at.seq, tile), p, 0.0)
    do_tile = load_tile(views.grad_out, start_m, end, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV, PARTIAL)
    dp = tl.dot(own.v, tl.trans(do_tile), input_precision=score.precision)
    tangent_dp = 0.0
    if own.tangent_v is not None:
        tangent_dp = tl.dot(own.tangent_v, tl.trans(do_tile), input_precision=score.precision)
    dropped = p
    if score.dropout is not None:
        head = at.batch * at.heads + at.head
        kept = tl.trans(dropout_multipliers(score, head, queries, own.start, shape.BLOCK_N, shape.BLOCK_M))
        dropped = p * kept
        dp *= kept
        tangent_dp *= kept
    ds, tangent_ds, tangent_log = differentiate_scores(dual, p, stats, dp, tangent_dp, tangents)
    dropped *= tangent_log
    grad_v = tl.dot(dropped.to(do_tile.dtype), do_tile, grads.v, input_precision=score.precision)
    tangent_dx = scores_backward_tangent(score, ds, tangent_ds, dual)
    grad_k = tl.dot(tangent_dx.to(q_tile.dtype), q_tile, grads.k, input_precision=score.precision)
    if views.tangent_q is not None:
        dx = scores_backward(score, ds, dual.dscore)
        grad_k = tl.dot(dx.to(q_tile.dtype), tangent_q, grad_k, input_precision=score.precision)
    return KeyGradients(grad_k, grad_v)


@kernel(do_not_specialize=[*NO_SPECIALIZE, "tangents"])
def attention_hvp_kv(
    q, k, v, grad_out, rows, grad_k, grad_v, tangents, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pass 2: the tangents of grad_k and grad_v, summed over the query heads that share this key/value head.

    Grid: (key tiles * kv_heads * batch,), the longest causal tiles first. A program owns BLOCK_N keys of one kv_head.
    """
    shape: tl.constexpr = Shape(HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N)
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    start_n, kv_head, batch = key_tile_of_program(sizes, shape.BLOCK_N)
    group = sizes.heads // sizes.kv_heads
    seq = load_seq_info(score, batch, sizes)

    tangent_k = None
    tangent_v = None
    if tangents.k is not None:
        k_head = head_view(tangents.k, batch, kv_head, seq.k_start)
        tangent_k = load_tile(k_head, start_n, seq.key_end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, True)
    if tangents.v is not None:
        v_head = head_view(tangents.v, batch, kv_head, seq.k_start)
        tangent_v = load_tile(v_head, start_n, seq.key_end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV, True)
    k_head = head_view(k, batch, kv_head, seq.k_start)
    k_tile = load_tile(k_head, start_n, seq.key_end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, True)
    v_head = head_view(v, batch, kv_head, seq.k_start)
    v_tile = load_tile(v_head, start_n, seq.key_end, shape.HEAD_DIM_V, shape.BLOCK_N, shape.BLOCK_DV, True)
    own = DualKeyTile(start_n, k_tile, tangent_k, v_tile, tangent_v)
    acc_k = tl.zeros((shape.BLOCK_N, shape.BLOCK_D), tl.float32)
    grads = KeyGradients(acc_k, tl.zeros((shape.BLOCK_N, shape.BLOCK_DV), tl.float32))
    tiles = query_tiles(score, seq, start_n, shape.BLOCK_M, shape.BLOCK_N)
    for head in range(kv_head * group, kv_head * group + group):
        at = HeadInfo(batch, head, sizes.heads, seq)
        tangent_q = None
        if tangents.q is not None:
            tangent_q = head_view(tangents.q, batch, head, seq.q_start)
        q_head = head_view(q, batch, head, seq.q_start)
        views = QueryViews(q_head, head_view(grad_out, batch, head, seq.q_start), tangent_q)
        rows_head = head_dual_pointers(score, rows, at)
        for start_m in range(tiles.full_begin, tiles.full_end, shape.BLOCK_M):
            if block_is_active(score, at, start_m, start_n):
                grads = accumulate_dual_dkv(grads, own, views, rows_head, score, tangents, at, start_m, shape, False)
        for index in tl.range(0, tiles.partial_count, num_stages=1):
            start_m = partial_start(tiles, index, shape.BLOCK_M)
            if block_is_active(score, at, start_m, start_n):
                grads = accumulate_dual_dkv(grads, own, views, rows_head, score, tangents, at, start_m, shape, True)
    store_key_gradients(grads, grad_k, grad_v, score, seq, batch, kv_head, start_n, shape)


@triton.jit
def bias_gradient_tangent(own, keys, score, tangents, at, start_n, shape: tl.constexpr):
    """The tangent of the gradient of the bias in a tile (queries, keys). own: the DualQueryTile."""
    end = at.seq.key_end
    k_tile = load_tile(keys.k, start_n, end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, True)
    tangent_k = None
    if keys.tangent_k is not None:
        tangent_k = load_tile(keys.tangent_k, start_n, end, shape.HEAD_DIM, shape.BLOCK_N, shape.BLOCK_D, True)
    _, result = compute_dual_gradients(own, k_tile, tangent_k, keys, score, tangents, at, start_n, shape, True, True)
    return result


@kernel(do_not_specialize=[*NO_SPECIALIZE, "tangents", "size_batch", "size_head", "size_q", "size_k"])
def attention_hvp_bias(
    q, k, v, grad_out, rows, grad_bias, tangents, score, batches, heads, kv_heads, seq_q, seq_k,
    size_batch, size_head, size_q, size_k,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tangent of grad_bias, float32, summed as in `attention_backward_bias`, with its grid."""
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
            tangent_k = None
            tangent_v = None
            if tangents.k is not None:
                tangent_k = head_view(tangents.k, batch, kv_head, seq.k_start)
            if tangents.v is not None:
                tangent_v = head_view(tangents.v, batch, kv_head, seq.k_start)
            k_head = head_view(k, batch, kv_head, seq.k_start)
            keys = KeyViews(k_head, head_view(v, batch, kv_head, seq.k_start), tangent_k, tangent_v)
            rows_head = head_dual_pointers(score, rows, at)
            for start_m in range(sums.first_m, tl.minimum(sums.last_m, seq.query_end), shape.BLOCK_M):
                queries = start_m + tl.arange(0, shape.BLOCK_M)
                tangent_q = None
                if tangents.q is not None:
                    tangent_q = load_query_tile(tangents.q, start_m, at, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D)
                q_tile = load_query_tile(q, start_m, at, shape.HEAD_DIM, shape.BLOCK_M, shape.BLOCK_D)
                do_tile = load_query_tile(grad_out, start_m, at, shape.HEAD_DIM_V, shape.BLOCK_M, shape.BLOCK_DV)
                stats = load_dual_stats(rows_head, queries, seq.query_end, score.raw, True)
                own = DualQueryTile(start_m, q_tile, tangent_q, do_tile, stats)
                begin, end = key_range(score, seq, start_m, shape.BLOCK_M)
                begin = tl.maximum(sums.first_n, begin // shape.BLOCK_N * shape.BLOCK_N)
                for start_n in range(begin, tl.minimum(sums.last_n, end), shape.BLOCK_N):
                    acc += bias_gradient_tangent(own, keys, score, tangents, at, start_n, shape)
    store_bias_tile(grad_bias, acc, bias, sums, shape.BLOCK_M, shape.BLOCK_N)
