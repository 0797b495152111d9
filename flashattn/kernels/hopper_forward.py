"""Attention forward for Hopper: `attention_forward`, warp-specialised (`hopper.py`).

A consumer issues S(j) = Q K(j)^T, then O += P(j - 1) V(j - 1), and computes the softmax of S(j) during that product.
With PINGPONG the consumers take turns to issue, so that the products of one run during the exponentials of another.
Shah et al., "FlashAttention-3" (2024), arXiv:2407.08608, Algorithms 1 and 2.
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

from .compiler import gluon_kernel
from .forward import finalize_and_store_lse, fold_tile
from .hopper import (
    Ring,
    batch_coordinate,
    dropout_multipliers,
    fill,
    fill_rows,
    first_active_tile,
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
)
from .scores import NO_SPECIALIZE, block_is_active, block_state
from .state import HeadInfo, SeqInfo, Sizes, TilePositions
from .tiles import Heads, head_view


class Inputs(NamedTuple):
    """Tensor descriptors."""

    q: gl.tensor
    k: gl.tensor
    v: gl.tensor


class Outputs(NamedTuple):
    out: Heads
    lse: gl.tensor
    rest: gl.tensor | None


class Rings(NamedTuple):
    q: Ring  # a tile for each consumer
    k: Ring
    v: Ring


class Queries(NamedTuple):
    """The 64 queries of a consumer. `done` work items came before."""

    start: gl.tensor
    tile: gl.shared_memory_descriptor
    done: gl.tensor


class ForwardState(NamedTuple):
    """The state of a consumer between key tiles: its softmax, and the weights of the last tile, whose product with v
    the next step issues, with the factor of acc before it. The weights are float32: rounded ones would be unpacked and
    packed again in each step."""

    acc: gl.tensor
    weights: gl.tensor
    alpha: gl.tensor
    m_i: gl.tensor
    l_i: gl.tensor


# ------------------------------------------------------------------------------------------------ the producer


@gluon.jit
def load_tiles(inputs, rings, landing, score, work, done, loaded, landed):
    """Q of each consumer, then K and V tiles in turn. `done` work items and `loaded` key tiles came before."""
    CONSUMERS: gl.constexpr = rings.q.tiles.shape[0]
    BLOCK_N: gl.constexpr = rings.k.tiles.shape[3]
    RAGGED: gl.constexpr = score.kv_lengths is not None or score.cu_seqlens is not None
    at = make_head_info(work)
    seq = at.seq
    batch = batch_coordinate(score, at.batch)
    for i in gl.static_range(CONSUMERS):
        fill(rings.q, done * CONSUMERS + i, inputs.q, batch, at.head, seq.q_start + work.start_m + i * 64)
    count = tile_count(work.tiles, BLOCK_N)
    first = first_active_tile(score, work, count, BLOCK_N)
    for index in range(first, count):
        start_n = tile_start(work.tiles, index, BLOCK_N)
        if index == first or block_is_active(score, at, work.start_m, start_n):
            row = seq.k_start + start_n
            fill(rings.k, loaded, inputs.k, batch, work.kv_head, row)
            exist = seq.key_end - start_n
            landed = fill_rows(rings.v, loaded, inputs.v, batch, work.kv_head, row, exist, landing, landed, RAGGED)
            loaded += 1
    return loaded, landed


@gluon.jit
def produce(inputs, rings, landing, score, sizes, items, PERSISTENT: gl.constexpr):
    BLOCK_M: gl.constexpr = 64 * rings.q.tiles.shape[0]
    BLOCK_N: gl.constexpr = rings.k.tiles.shape[3]
    if PERSISTENT:
        done = 0
        loaded = 0
        landed = 0
        for program in range(gl.program_id(0), items, gl.num_programs(0)):
            work = load_work(program, score, sizes, BLOCK_M, BLOCK_N)
            loaded, landed = load_tiles(inputs, rings, landing, score, work, done, loaded, landed)
            done += 1  # noqa: SIM113
    else:
        work = load_work(gl.program_id(0), score, sizes, BLOCK_M, BLOCK_N)
        zero = gl.to_tensor(0)
        load_tiles(inputs, rings, landing, score, work, zero, zero, zero)


# ------------------------------------------------------------------------------------------------ a consumer


@gluon.jit
def update_softmax(products, m_i, l_i, score, work, at, start_m, start_n, PARTIAL: gl.constexpr):
    """(weights, alpha, m_i, l_i) of one key tile from q k^T. at: the HeadInfo of the work, or of fewer keys."""
    LAYOUT: gl.constexpr = products.type.layout
    queries = start_m + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    keys = start_n + gl.arange(0, products.shape[1], gl.SliceLayout(0, LAYOUT))
    tile = TilePositions(queries[:, None], keys[None, :], block_state(score, at, work.start_m, start_n))
    return fold_tile(products, m_i, l_i, score, at, tile, PARTIAL)


@gluon.jit
def drop_weights(weights, score, at, start_m, start_n):
    """Weights after dropout."""
    if score.dropout is not None:
        head = at.batch * at.heads + at.head
        keep = dropout_multipliers(score.dropout, head, start_m, start_n, 64, weights.shape[1])
        weights *= gl.convert_layout(keep, weights.type.layout)
    return weights


@gluon.jit
def accumulate_pv(acc, weights, alpha, v_tile):
    """Issue acc = alpha acc + p v. Returns (acc, p): p must stay in its registers until that product is done."""
    LAYOUT: gl.constexpr = acc.type.layout
    p = gl.convert_layout(weights.to(v_tile.dtype), gl.DotOperandLayout(0, LAYOUT, 2))
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, LAYOUT))[:, None]
    return warpgroup_mma(p, v_tile, acc, is_async=True), p


@gluon.jit
def attend_tile(
    state, number, index, own, rings, turns, score, work,
    ME: gl.constexpr, PINGPONG: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """Key tile `index`, the ring's tile `number`: S = q k^T, then acc += p v of the tile before, and during that
    product the softmax of S. own: the consumer's Queries."""
    CONSUMERS: gl.constexpr = rings.q.tiles.shape[0]
    at = make_head_info(work)
    wait_full(rings.k, number)
    if PINGPONG:
        # All key tiles of a work item but its first take turns.
        mbarrier.wait(turns[ME], (number - 1 - own.done) & 1)
    s = multiply(own.tile, tile_at(rings.k, number))
    acc, p = accumulate_pv(state.acc, state.weights, state.alpha, tile_at(rings.v, number - 1))
    if PINGPONG:
        mbarrier.arrive(turns[(ME + 1) % CONSUMERS], count=1)
    s = warpgroup_mma_wait(1, deps=(s,))
    release(rings.k, number)
    start_n = tile_start(work.tiles, index, s.shape[1])
    weights, alpha, m_i, l_i = update_softmax(s, state.m_i, state.l_i, score, work, at, own.start, start_n, PARTIAL)
    weights = drop_weights(weights, score, at, own.start, start_n)
    # The wait for the next V tile is here because it ends a block of code: the assembler cannot move the wait for the
    # product up, before the exponentials that are to run during it.
    wait_full(rings.v, number)
    acc, p, weights = warpgroup_mma_wait(0, deps=(acc, p, weights))
    release(rings.v, number - 1)
    return ForwardState(acc, weights, alpha, m_i, l_i)


@gluon.jit
def attend_queries(
    rings, turns, outputs, score, work, done, read,
    ME: gl.constexpr, HEAD_DIM_V: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """Consumer ME's 64 queries of a work item against all its key tiles. `done` items and `read` key tiles came
    before."""
    CONSUMERS: gl.constexpr = rings.q.tiles.shape[0]
    BLOCK_N: gl.constexpr = rings.k.tiles.shape[3]
    BLOCK_DV: gl.constexpr = rings.v.tiles.shape[4]
    S: gl.constexpr = product_layout(BLOCK_N)
    OUT: gl.constexpr = product_layout(BLOCK_DV)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    at = make_head_info(work)
    seq = at.seq
    start_m = work.start_m + ME * 64
    count = tile_count(work.tiles, BLOCK_N)
    first = first_active_tile(score, work, count, BLOCK_N)
    acc = gl.zeros([64, BLOCK_DV], gl.float32, OUT)
    m_i = gl.full([64], float("-inf"), gl.float32, ROW)
    l_i = gl.zeros([64], gl.float32, ROW)

    q_tile = tile_at(rings.q, ME)
    wait_full(rings.q, done * CONSUMERS + ME)
    wait_full(rings.k, read)
    s = multiply(q_tile, tile_at(rings.k, read))
    s = warpgroup_mma_wait(0, deps=(s,))
    release(rings.k, read)
    start_n = tile_start(work.tiles, first, BLOCK_N)
    key_end = seq.key_end
    if score.blocks is not None:  # no tile may be active: then the first has no key
        key_end = gl.where(block_is_active(score, at, work.start_m, start_n), key_end, 0)
    first_seq = SeqInfo(seq.seq_q, seq.seq_k, seq.query_end, key_end, seq.q_start, seq.k_start, seq.diagonal)
    first_at = HeadInfo(at.batch, at.head, at.heads, first_seq)
    weights, alpha, m_i, l_i = update_softmax(s, m_i, l_i, score, work, first_at, start_m, start_n, PARTIAL=True)
    weights = drop_weights(weights, score, at, start_m, start_n)
    state = ForwardState(acc, weights, alpha, m_i, l_i)
    own = Queries(start_m, q_tile, done)
    wait_full(rings.v, read)

    number = read + 1
    begin = first + 1
    end = gl.minimum(gl.maximum(work.tiles.partial_count, begin), count)
    for PARTIAL in gl.static_range(1, -1, -1):
        for index in range(begin, end):
            if block_is_active(score, at, work.start_m, tile_start(work.tiles, index, BLOCK_N)):
                state = attend_tile(state, number, index, own, rings, turns, score, work, ME, PINGPONG, PARTIAL)
                number += 1
        begin, end = end, count
    acc, p = accumulate_pv(state.acc, state.weights, state.alpha, tile_at(rings.v, number - 1))
    release(rings.q, ME)
    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
    release(rings.v, number - 1)

    queries = start_m + gl.arange(0, 64, ROW)
    l_i, alpha, _, _ = finalize_and_store_lse(outputs.lse, outputs.rest, state.m_i, state.l_i, score, at, queries)
    if score.sinks is not None:
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
    total = gl.convert_layout(l_i, gl.SliceLayout(1, OUT))[:, None]
    result = gl.where(total == 0.0, 0.0, acc / total)
    store_rows(head_view(outputs.out, at.batch, at.head, seq.q_start), result, start_m, seq.seq_q, HEAD_DIM_V)
    return number


@gluon.jit
def consume(
    rings, turns, outputs, score, sizes, items,
    ME: gl.constexpr, HEAD_DIM_V: gl.constexpr, PINGPONG: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 64 * rings.q.tiles.shape[0]
    BLOCK_N: gl.constexpr = rings.k.tiles.shape[3]
    if PERSISTENT:
        done = 0
        read = 0
        for program in range(gl.program_id(0), items, gl.num_programs(0)):
            work = load_work(program, score, sizes, BLOCK_M, BLOCK_N)
            read = attend_queries(rings, turns, outputs, score, work, done, read, ME, HEAD_DIM_V, PINGPONG)
            done += 1  # noqa: SIM113
    else:
        work = load_work(gl.program_id(0), score, sizes, BLOCK_M, BLOCK_N)
        zero = gl.to_tensor(0)
        attend_queries(rings, turns, outputs, score, work, zero, zero, ME, HEAD_DIM_V, PINGPONG)


# ------------------------------------------------------------------------------------------------ the kernel


@gluon_kernel(do_not_specialize=NO_SPECIALIZE)
def attention_forward_hopper(
    q, k, v, out, lse, rest, score, batches, heads, kv_heads, seq_q, seq_k,
    HEAD_DIM_V: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, REGISTERS: gl.constexpr,
    PINGPONG: gl.constexpr, PERSISTENT: gl.constexpr,
):  # fmt: skip
    """As `attention_forward`. q, k and v are tensor descriptors, of tiles of 64 queries and of BLOCK_N keys.

    Grid: (query tiles * heads * batch,), the longest causal tiles first. A work item is CONSUMERS * 64 queries of one
    head; if PERSISTENT there are fewer programs, each of which takes items in turn.
    """
    sizes = Sizes(batches, heads, kv_heads, seq_q, seq_k)
    items = gl.cdiv(seq_q, CONSUMERS * 64) * heads * batches
    inputs = Inputs(q, k, v)
    outputs = Outputs(out, lse, rest)
    rings = Rings(new_ring(q, CONSUMERS, 1), new_ring(k, STAGES, CONSUMERS), new_ring(v, STAGES, CONSUMERS))
    # Only the barriers that are used: Triton lets an unused one share its memory with another during initialisation.
    turns = 0
    if PINGPONG and CONSUMERS == 2:
        turns = (new_barrier(1), new_barrier(1))
    elif PINGPONG:
        turns = (new_barrier(1), new_barrier(1), new_barrier(1))
    landing = 0
    if score.kv_lengths is not None or score.cu_seqlens is not None:
        landing = new_barrier(1)
    fence_async_shared()
    if PINGPONG:
        mbarrier.arrive(turns[0], count=1)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (produce, (inputs, rings, landing, score, sizes, items, PERSISTENT)),
                (consume, (rings, turns, outputs, score, sizes, items, 0, HEAD_DIM_V, PINGPONG, PERSISTENT)),
                (consume, (rings, turns, outputs, score, sizes, items, 1, HEAD_DIM_V, PINGPONG, PERSISTENT)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (produce, (inputs, rings, landing, score, sizes, items, PERSISTENT)),
                (consume, (rings, turns, outputs, score, sizes, items, 0, HEAD_DIM_V, PINGPONG, PERSISTENT)),
                (consume, (rings, turns, outputs, score, sizes, items, 1, HEAD_DIM_V, PINGPONG, PERSISTENT)),
                (consume, (rings, turns, outputs, score, sizes, items, 2, HEAD_DIM_V, PINGPONG, PERSISTENT)),
            ],
            [4, 4, 4],
            [REGISTERS, REGISTERS, REGISTERS],
        )
