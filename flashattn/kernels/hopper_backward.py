"""Attention backward for Hopper: the passes of `backward.py` with the same formulas, warp-specialised (`hopper.py`).

1. `attention_backward_q_hopper`: a consumer owns 64 queries; S = Q K^T and dP = dO V^T of a key tile are issued
   together, and the exponentials run beside the second.
2. `attention_backward_kv_hopper`: a consumer owns 64 keys (over head_dim 128 two consumers share them), and tiles are
   transposed: S^T = K Q^T, dP^T = V dO^T. The queries of every head in the group, their lse and delta follow each
   other, all by bulk copies.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .backward import StatsPointers, head_stats_pointers, load_lse, locate_stats, recompute_weights, store_stats
from .compiler import gluon_kernel
from .hopper import (
    Ring,
    batch_coordinate,
    copy,
    dropout_multipliers,
    empty_barrier,
    fill,
    fill_rows,
    full_barrier,
    load_work,
    make_head_info,
    multiply,
    new_barrier,
    new_ring,
    product_layout,
    release,
    store_rows,
    tile_at,
    tile_count,
    tile_start,
    wait_full,
    wide_layout,
)
from .scores import (
    NO_SPECIALIZE,
    TileRanges,
    block_is_active,
    block_state,
    key_tile_of_program,
    load_seq_info,
    lse_offset,
    query_tiles,
    scores_backward,
)
from .state import HeadInfo, KeyGradients, KeyTile, QueryTile, RowStats, SeqInfo, Sizes, TilePositions
from .tiles import Heads, head_view, rounded_product

# ------------------------------------------------------------------------------------------------ pass 1: grad_q


class Outputs(NamedTuple):
    """Global memory that a consumer of pass 1 reads and writes."""

    out: Heads
    lse: gl.tensor
    rest: gl.tensor | None
    grad_lse: gl.tensor | None
    grad_q: Heads
    rows: StatsPointers


class KeyRings(NamedTuple):
    q: Ring  # a tile for each consumer
    do: Ring
    k: Ring
    v: Ring


@gluon.jit
def produce_keys(q, k, v, do, rings, landing, score, work):
    """The producer: Q and dO of each consumer, then K and V tiles in turn."""
    CONSUMERS: gl.constexpr = rings.q.tiles.shape[0]
    BLOCK_N: gl.constexpr = rings.k.tiles.shape[3]
    RAGGED: gl.constexpr = score.kv_lengths is not None or score.cu_seqlens is not None
    at = make_head_info(work)
    seq = at.seq
    batch = batch_coordinate(score, at.batch)
    for i in gl.static_range(CONSUMERS):
        row = seq.q_start + work.start_m + i * 64
        fill(rings.q, i, q, batch, at.head, row)
        fill(rings.do, i, do, batch, at.head, row)
    loaded = gl.to_tensor(0)
    landed = gl.to_tensor(0)
    for index in range(tile_count(work.tiles, BLOCK_N)):
        start_n = tile_start(work.tiles, index, BLOCK_N)
        if block_is_active(score, at, work.start_m, start_n):
            row = seq.k_start + start_n
            exist = seq.key_end - start_n
            landed = fill_rows(rings.k, loaded, k, batch, work.kv_head, row, exist, landing, landed, RAGGED)
            landed = fill_rows(rings.v, loaded, v, batch, work.kv_head, row, exist, landing, landed, RAGGED)
            loaded += 1


@gluon.jit
def accumulate_dq(acc, own, rings, number, index, score, work, PARTIAL: gl.constexpr):
    """Key tile `index`, the ring's tile `number`: acc += ds k. own: the consumer's QueryTile."""
    LAYOUT: gl.constexpr = product_layout(rings.k.tiles.shape[3])
    BLOCK_N: gl.constexpr = rings.k.tiles.shape[3]
    k_tile = tile_at(rings.k, number)
    wait_full(rings.k, number)
    s = multiply(own.q, k_tile)
    wait_full(rings.v, number)
    dp = multiply(own.grad_out, tile_at(rings.v, number))
    start_n = tile_start(work.tiles, index, BLOCK_N)
    queries = own.start + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    keys = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    at = make_head_info(work)
    tile = TilePositions(queries[:, None], keys[None, :], block_state(score, at, work.start_m, start_n))
    s = warpgroup_mma_wait(1, deps=(s,))
    p, dscore = recompute_weights(s, own.stats.lse[:, None], own.stats.rest[:, None], score, at, tile, PARTIAL)
    wait_full(rings.v, number)  # ends a block of code: the wait for the second product stays after the exponentials
    dp = warpgroup_mma_wait(0, deps=(dp,))
    release(rings.v, number)
    if score.dropout is not None:
        keep = dropout_multipliers(score.dropout, at.batch * at.heads + at.head, own.start, start_n, 64, BLOCK_N)
        dp *= gl.convert_layout(keep, LAYOUT)
    ds = scores_backward(score, p * (dp - own.stats.delta[:, None]), dscore)
    ds = gl.convert_layout(ds.to(k_tile.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    acc = warpgroup_mma(ds, k_tile, acc, is_async=True)
    acc, ds = warpgroup_mma_wait(0, deps=(acc, ds))
    release(rings.k, number)
    return acc


@gluon.jit
def load_out_tile(out, start_m, end, COLS: gl.constexpr, BLOCK_COLS: gl.constexpr):
    """64 rows of out; 0 at and past `end`."""
    LAYOUT: gl.constexpr = wide_layout(BLOCK_COLS)
    rows = (start_m + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)))[:, None]
    cols = gl.arange(0, BLOCK_COLS, gl.SliceLayout(0, LAYOUT))[None, :]
    pointers = out.ptr + rows.to(gl.int64) * out.stride + cols
    return gl.load(pointers, mask=(rows < end) & (cols < COLS), other=0.0)


@gluon.jit
def is_before_end(tile, start, end):
    LAYOUT: gl.constexpr = gl.SliceLayout(1, tile.type.layout)
    return (start + gl.arange(0, 64, LAYOUT) < end)[:, None]


@gluon.jit
def consume_keys(
    rings, outputs, score, work,
    ME: gl.constexpr, HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
):  # fmt: skip
    """Consumer ME: 64 queries against all key tiles."""
    BLOCK_N: gl.constexpr = rings.k.tiles.shape[3]
    BLOCK_D: gl.constexpr = rings.k.tiles.shape[4]
    BLOCK_DV: gl.constexpr = rings.v.tiles.shape[4]
    ROW: gl.constexpr = gl.SliceLayout(1, product_layout(BLOCK_N))
    at = make_head_info(work)
    seq = at.seq
    start_m = work.start_m + ME * 64
    queries = start_m + gl.arange(0, 64, ROW)
    exists = queries < seq.query_end
    out_tile = load_out_tile(
        head_view(outputs.out, at.batch, at.head, seq.q_start), start_m, seq.query_end, HEAD_DIM_V, BLOCK_DV
    )
    q_tile = tile_at(rings.q, ME)
    do_tile = tile_at(rings.do, ME)
    wait_full(rings.q, ME)
    wait_full(rings.do, ME)
    grad_out = do_tile.load(wide_layout(BLOCK_DV)).to(gl.float32)
    delta = gl.convert_layout(gl.sum(rounded_product(grad_out, out_tile.to(gl.float32)), 1), ROW)
    row = lse_offset(score, at)
    if outputs.grad_lse is not None:
        delta -= gl.load(outputs.grad_lse + row + queries, mask=exists, other=0.0)
    lse_row, rest_row = load_lse(outputs.lse, outputs.rest, score, row + queries, exists)
    rows = head_stats_pointers(score, outputs.rows, at)
    stored = RowStats(lse_row, gl.where(exists, delta, 0.0), rest_row)
    store_stats(rows, stored, queries, seq.seq_q, score.raw)
    own = QueryTile(start_m, q_tile, do_tile, RowStats(lse_row, delta, rest_row))

    acc = gl.zeros([64, BLOCK_D], gl.float32, product_layout(BLOCK_D))
    count = tile_count(work.tiles, BLOCK_N)
    begin = 0
    end = gl.minimum(gl.maximum(work.tiles.partial_count, 1), count)
    number = gl.to_tensor(0)
    for PARTIAL in gl.static_range(1, -1, -1):
        for index in range(begin, end):
            if block_is_active(score, at, work.start_m, tile_start(work.tiles, index, BLOCK_N)):
                acc = accumulate_dq(acc, own, rings, number, index, score, work, PARTIAL)
                number += 1
        begin, end = end, count
    grad = acc * score.scale
    if score.q_lengths is not None:  # q and grad_out may be NaN past the length
        grad = gl.where(is_before_end(grad, start_m, seq.query_end), grad, 0.0)
    store_rows(head_view(outputs.grad_q, at.batch, at.head, seq.q_start), grad, start_m, seq.seq_q, HEAD_DIM)


@gluon_kernel(do_not_specialize=NO_SPECIALIZE)
def attention_backward_q_hopper(
    q, k, v, out, do, lse, rest, grad_lse, grad_q, rows, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `attention_backward_q`. q, k, v and do (grad_out) are tensor descriptors, of tiles of 64 queries and of
    BLOCK_N keys.

    Grid: (query tiles * heads * batch,), the longest causal tiles first. A program owns CONSUMERS * 64 queries.
    """
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    work = load_work(gl.program_id(0), score, sizes, CONSUMERS * 64, k.block_type.shape[2])
    rings = KeyRings(
        new_ring(q, CONSUMERS, 1), new_ring(do, CONSUMERS, 1),
        new_ring(k, STAGES, CONSUMERS), new_ring(v, STAGES, CONSUMERS),
    )  # fmt: skip
    outputs = Outputs(out, lse, rest, grad_lse, grad_q, rows)
    landing = 0
    if score.kv_lengths is not None or score.cu_seqlens is not None:
        landing = new_barrier(1)
    fence_async_shared()
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (produce_keys, (q, k, v, do, rings, landing, score, work)),
                (consume_keys, (rings, outputs, score, work, 0, HEAD_DIM, HEAD_DIM_V)),
                (consume_keys, (rings, outputs, score, work, 1, HEAD_DIM, HEAD_DIM_V)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (produce_keys, (q, k, v, do, rings, landing, score, work)),
                (consume_keys, (rings, outputs, score, work, 0, HEAD_DIM, HEAD_DIM_V)),
                (consume_keys, (rings, outputs, score, work, 1, HEAD_DIM, HEAD_DIM_V)),
                (consume_keys, (rings, outputs, score, work, 2, HEAD_DIM, HEAD_DIM_V)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )


# ------------------------------------------------------------------------------------ pass 2: grad_k and grad_v


class QueryRings(NamedTuple):
    k: Ring  # the tiles of keys that the program owns
    v: Ring
    q: Ring
    do: Ring
    rows: Ring  # of statistics: lse, delta and, if scores are not raw, rest and an unused row


class KeyWork(NamedTuple):
    """A work item: keys of one key/value head, and the query tiles that attend to them."""

    batch: gl.tensor
    kv_head: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    start_n: gl.tensor
    tiles: TileRanges
    seq: SeqInfo


@gluon.jit
def fill_statistics(ring, number, descriptor, line, column):
    """`fill` of a ring of query statistics."""
    SLOTS: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(empty_barrier(ring, number), number // SLOTS & 1 ^ 1)
    mbarrier.expect(full_barrier(ring, number), descriptor.block_type.nbytes)
    copy(descriptor, [0, line, column], full_barrier(ring, number), ring.tiles.index(number % SLOTS))


@gluon.jit
def row_stat(ring, number, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
    """One row that `fill_statistics` copied: 0 lse, 1 delta, 2 rest."""
    COUNT: gl.constexpr = ring.tiles.shape[3]
    every = ring.tiles.index(number % ring.tiles.shape[0]).reshape([ring.tiles.shape[1] * COUNT])
    return every.slice(WHICH * COUNT, COUNT).load(LAYOUT)


@gluon.jit
def produce_queries(k, v, q, do, rows, rings, landing, score, keys):
    """The producer: the K and V tiles that the program owns, then the query tiles of each head of the group."""
    TILES: gl.constexpr = rings.k.tiles.shape[0]
    BLOCK_M: gl.constexpr = rings.q.tiles.shape[3]
    RAGGED: gl.constexpr = score.q_lengths is not None or score.cu_seqlens is not None
    seq = keys.seq
    batch = batch_coordinate(score, keys.batch)
    for i in gl.static_range(TILES):
        row = seq.k_start + keys.start_n + i * 64
        fill(rings.k, i, k, batch, keys.kv_head, row)
        fill(rings.v, i, v, batch, keys.kv_head, row)
    count = tile_count(keys.tiles, BLOCK_M)
    loaded = gl.to_tensor(0)
    landed = gl.to_tensor(0)
    for head in range(keys.kv_head * keys.group, keys.kv_head * keys.group + keys.group):
        at = HeadInfo(keys.batch, head, keys.heads, seq)
        line, column = locate_stats(score, at)
        for index in range(count):
            start_m = tile_start(keys.tiles, index, BLOCK_M)
            if block_is_active(score, at, start_m, keys.start_n):
                row = seq.q_start + start_m
                exist = seq.query_end - start_m
                landed = fill_rows(rings.q, loaded, q, batch, head, row, exist, landing, landed, RAGGED)
                fill_statistics(rings.rows, loaded, rows, line, column + start_m)
                landed = fill_rows(rings.do, loaded, do, batch, head, row, exist, landing, landed, RAGGED)
                loaded += 1


@gluon.jit
def accumulate_dkv(
    grads, own, rings, number, index, score, at, keys,
    PARTIAL: gl.constexpr, GRAD_K: gl.constexpr, GRAD_V: gl.constexpr,
):  # fmt: skip
    """Query tile `index` of a head, the ring's tile `number`: acc_v += p^T do if GRAD_V, acc_k += ds^T q if GRAD_K.
    own: the consumer's KeyTile."""
    BLOCK_M: gl.constexpr = rings.q.tiles.shape[3]
    LAYOUT: gl.constexpr = product_layout(BLOCK_M)
    COLS: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    acc_k, acc_v = grads
    q_tile = tile_at(rings.q, number)
    do_tile = tile_at(rings.do, number)
    wait_full(rings.q, number)
    s = multiply(own.k, q_tile)
    wait_full(rings.do, number)
    if GRAD_K:
        dp = multiply(own.v, do_tile)
    start_m = tile_start(keys.tiles, index, BLOCK_M)
    queries = start_m + gl.arange(0, BLOCK_M, COLS)
    keys_of_tile = own.start + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    tile = TilePositions(queries[None, :], keys_of_tile[:, None], block_state(score, at, start_m, keys.start_n))
    wait_full(rings.rows, number)
    s = warpgroup_mma_wait(GRAD_K, deps=(s,))  # as many products as were issued after it
    lse = row_stat(rings.rows, number, 0, COLS)  # only now: the registers were needed before
    rest = lse
    if not score.raw:
        rest = row_stat(rings.rows, number, 2, COLS)
    p, dscore = recompute_weights(s, lse[None, :], rest[None, :], score, at, tile, PARTIAL)
    DTYPE: gl.constexpr = q_tile.dtype
    dropped = p
    if score.dropout is not None:
        keep = dropout_multipliers(score.dropout, at.batch * at.heads + at.head, start_m, own.start, BLOCK_M, 64)
        keep = gl.convert_layout(keep.permute((1, 0)), LAYOUT)
        dropped = p * keep
    if GRAD_V:
        pt = gl.convert_layout(dropped.to(DTYPE), gl.DotOperandLayout(0, acc_v.type.layout, 2))
        acc_v = warpgroup_mma(pt, do_tile, acc_v, is_async=True)
    if GRAD_K:
        wait_full(rings.do, number)  # ends a block of code: the wait for dP stays after the exponentials
        dp = warpgroup_mma_wait(GRAD_V, deps=(dp,))
        delta = row_stat(rings.rows, number, 1, COLS)
    release(rings.rows, number)
    if GRAD_K:
        if PARTIAL:
            delta = gl.where(queries < at.seq.query_end, delta, 0.0)  # of another sequence, or never written
        if score.dropout is not None:
            dp *= keep
        ds = scores_backward(score, p * (dp - delta[None, :]), dscore)
        ds = gl.convert_layout(ds.to(DTYPE), gl.DotOperandLayout(0, acc_k.type.layout, 2))
        acc_k = warpgroup_mma(ds, q_tile, acc_k, is_async=True)
    if GRAD_V:
        acc_v, pt = warpgroup_mma_wait(GRAD_K, deps=(acc_v, pt))
    release(rings.do, number)
    if GRAD_K:
        acc_k, ds = warpgroup_mma_wait(0, deps=(acc_k, ds))
    release(rings.q, number)
    return KeyGradients(acc_k, acc_v)


@gluon.jit
def consume_queries(
    rings, grad_k, grad_v, score, keys, TILE: gl.constexpr, GRAD_K: gl.constexpr, GRAD_V: gl.constexpr,
    HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr,
):  # fmt: skip
    """A consumer: the keys of tile TILE against the query tiles of every head in the group. It sums grad_k, grad_v or
    both."""
    BLOCK_M: gl.constexpr = rings.q.tiles.shape[3]
    BLOCK_D: gl.constexpr = rings.k.tiles.shape[4]
    BLOCK_DV: gl.constexpr = rings.v.tiles.shape[4]
    acc_k = gl.to_tensor(0)
    acc_v = gl.to_tensor(0)
    if GRAD_K:
        acc_k = gl.zeros([64, BLOCK_D], gl.float32, product_layout(BLOCK_D))
    if GRAD_V:
        acc_v = gl.zeros([64, BLOCK_DV], gl.float32, product_layout(BLOCK_DV))
    seq = keys.seq
    start_n = keys.start_n + TILE * 64
    k_tile = tile_at(rings.k, TILE)
    v_tile = tile_at(rings.v, TILE)
    wait_full(rings.k, TILE)
    wait_full(rings.v, TILE)
    own = KeyTile(start_n, k_tile, v_tile)
    grads = KeyGradients(acc_k, acc_v)
    count = tile_count(keys.tiles, BLOCK_M)
    partial_count = gl.minimum(gl.maximum(keys.tiles.partial_count, 1), count)
    number = gl.to_tensor(0)
    for head in range(keys.kv_head * keys.group, keys.kv_head * keys.group + keys.group):
        at = HeadInfo(keys.batch, head, keys.heads, seq)
        begin, end = 0, partial_count
        for PARTIAL in gl.static_range(1, -1, -1):
            for index in range(begin, end):
                if block_is_active(score, at, tile_start(keys.tiles, index, BLOCK_M), keys.start_n):
                    grads = accumulate_dkv(grads, own, rings, number, index, score, at, keys, PARTIAL, GRAD_K, GRAD_V)
                    number += 1
            begin, end = end, count
    # Keys past the end were read from another sequence, or from uninitialised memory.
    acc_k, acc_v = grads
    if GRAD_K:
        acc_k = gl.where(is_before_end(acc_k, start_n, seq.key_end), acc_k * score.scale, 0.0)
        store_rows(head_view(grad_k, keys.batch, keys.kv_head, seq.k_start), acc_k, start_n, seq.seq_k, HEAD_DIM)
    if GRAD_V:
        acc_v = gl.where(is_before_end(acc_v, start_n, seq.key_end), acc_v, 0.0)
        store_rows(head_view(grad_v, keys.batch, keys.kv_head, seq.k_start), acc_v, start_n, seq.seq_k, HEAD_DIM_V)


@gluon_kernel(do_not_specialize=NO_SPECIALIZE)
def attention_backward_kv_hopper(
    q, k, v, do, rows, grad_k, grad_v, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM: gl.constexpr, HEAD_DIM_V: gl.constexpr, SHARED: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `attention_backward_kv`. q, k, v, do (grad_out) and rows (the statistics) are tensor descriptors, of tiles of
    BLOCK_M queries and of 64 keys.

    Grid: (key tiles * kv_heads * batch,), the longest causal tiles first. A program owns 64 keys for each consumer or,
    if SHARED, 64 of which one consumer sums grad_k and the other grad_v: both do not fit the registers of one.
    """
    BLOCK_M: gl.constexpr = q.block_type.shape[2]
    TILES: gl.constexpr = 1 if SHARED else CONSUMERS
    BLOCK_N: gl.constexpr = TILES * 64
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    start_n, kv_head, batch = key_tile_of_program(sizes, BLOCK_N)
    seq = load_seq_info(score, batch, sizes)
    tiles = query_tiles(score, seq, start_n, BLOCK_M, BLOCK_N)
    keys = KeyWork(batch, kv_head, heads, heads // kv_heads, start_n, tiles, seq)
    rings = QueryRings(
        new_ring(k, TILES, 1), new_ring(v, TILES, 1), new_ring(q, STAGES, CONSUMERS),
        new_ring(do, STAGES, CONSUMERS), new_ring(rows, STAGES, CONSUMERS),
    )  # fmt: skip
    landing = 0
    if score.q_lengths is not None or score.cu_seqlens is not None:
        landing = new_barrier(1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (produce_queries, (k, v, q, do, rows, rings, landing, score, keys)),
            (consume_queries, (rings, grad_k, grad_v, score, keys, 0, True, not SHARED, HEAD_DIM, HEAD_DIM_V)),
            (consume_queries, (rings, grad_k, grad_v, score, keys, TILES - 1, not SHARED, True, HEAD_DIM, HEAD_DIM_V)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )
