"""Shared by the kernels for Hopper (sm_90), which are warp-specialised: rings of tiles in shared memory, which some
warps fill by bulk copies (TMA) and others read with `wgmma`.

A program has roles, each a function that four of its warps run: the *producer*, which needs few registers, and two or
three *consumers*, with 64 rows each, which get the registers that it gives up. A ring's slot has two barriers.
`full_barrier`: the producer's copy has arrived; `empty_barrier`: every consumer's product that read the slot is done.
Tile number i of a ring lies in slot i % SLOTS and is the (i // SLOTS)-th there, whose parity the barriers wait for.

Written in Gluon, which leaves layouts and waits to the author; the functions of `scores.py` are plain Triton and serve
both. Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision" (2024),
arXiv:2407.08608.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from .dropout import bits_to_multipliers, draw_words
from .scores import TileRanges, block_is_active, key_tiles, partial_start, query_tile_of_program
from .state import HeadInfo, SeqInfo

copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # until Triton 3.7


class Ring(NamedTuple):
    """Tiles in shared memory, and for each slot a barrier that completes when it is full and one when it is empty."""

    tiles: gl.shared_memory_descriptor
    barriers: gl.shared_memory_descriptor  # (2 * SLOTS,): `full_barrier` of each slot, then `empty_barrier`


class WorkItem(NamedTuple):
    """A work item: BLOCK_M queries of one head, and the key tiles that they attend to."""

    batch: gl.tensor
    head: gl.tensor
    kv_head: gl.tensor
    heads: gl.tensor
    start_m: gl.tensor
    tiles: TileRanges
    seq: SeqInfo


@gluon.jit
def load_work(program, score, sizes, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Work item number `program`."""
    start_m, kv_head, at = query_tile_of_program(program, score, sizes, BLOCK_M)
    tiles = key_tiles(score, at.seq, start_m, BLOCK_M, BLOCK_N)
    return WorkItem(at.batch, at.head, kv_head, at.heads, start_m, tiles, at.seq)


@gluon.jit
def make_head_info(work):
    """The HeadInfo of a work item."""
    return HeadInfo(work.batch, work.head, work.heads, work.seq)


# ------------------------------------------------------------------------------------------------ rings


@gluon.jit
def new_barrier(count):
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=count)
    return barrier


@gluon.jit
def new_ring(descriptor, SLOTS: gl.constexpr, READERS: gl.constexpr):
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    tiles = gl.allocate_shared_memory(descriptor.dtype, [SLOTS] + descriptor.block_type.shape, descriptor.layout)  # noqa: RUF005
    barriers = gl.allocate_shared_memory(gl.int64, [2 * SLOTS, 1], LAYOUT)
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=1)
        mbarrier.init(barriers.index(SLOTS + slot), count=READERS)
    return Ring(tiles, barriers)


@gluon.jit
def full_barrier(ring, number):
    """The barrier that completes when tile `number` has arrived."""
    return ring.barriers.index(number % ring.tiles.shape[0])


@gluon.jit
def empty_barrier(ring, number):
    """The barrier that completes when the slot of tile `number` may be filled again."""
    return ring.barriers.index(number % ring.tiles.shape[0] + ring.tiles.shape[0])


@gluon.jit
def batch_coordinate(score, batch):
    """The first coordinate of a batch row in a descriptor: packed sequences are all in row 0."""
    if score.cu_seqlens is not None:
        batch = 0
    return batch


@gluon.jit
def fill(ring, number, descriptor, batch, head, row):
    """The producer copies these rows to tile `number` of a ring. Rows past the tensor's end are 0."""
    SLOTS: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(empty_barrier(ring, number), number // SLOTS & 1 ^ 1)
    mbarrier.expect(full_barrier(ring, number), descriptor.block_type.nbytes)
    copy(descriptor, [batch, head, row, 0], full_barrier(ring, number), ring.tiles.index(number % SLOTS))


@gluon.jit
def fill_rows(ring, number, descriptor, batch, head, row, exist, landing, landed, RAGGED: gl.constexpr):
    """`fill`; if RAGGED, rows at or past the `exist`-th may lie in the tensor but not in the sequence: they may be NaN,
    and 0 times NaN is NaN. They are set to 0 before the consumers read the tile. Returns `landed`, how often the
    barrier `landing` was used."""
    SLOTS: gl.constexpr = ring.tiles.shape[0]
    ROWS: gl.constexpr = ring.tiles.shape[3]
    if not RAGGED or exist >= ROWS:
        fill(ring, number, descriptor, batch, head, row)
    else:
        mbarrier.wait(empty_barrier(ring, number), number // SLOTS & 1 ^ 1)
        mbarrier.expect(landing, descriptor.block_type.nbytes)
        copy(descriptor, [batch, head, row, 0], landing, ring.tiles.index(number % SLOTS))
        mbarrier.wait(landing, landed & 1)
        clear_rows(tile_at(ring, number), exist)
        fence_async_shared()
        mbarrier.arrive(full_barrier(ring, number), count=1)
        landed += 1
    return landed


@gluon.jit
def clear_rows(tile, exist):
    """Set the rows of a tile from number `exist` on to 0, 32 at a time: the producer has few registers."""
    ROWS: gl.constexpr = tile.shape[0]
    LAYOUT: gl.constexpr = wide_layout(tile.shape[1])
    for start in gl.static_range(0, ROWS, 32):
        if start + 32 > exist:
            part = tile.slice(start, 32)
            rows = start + gl.arange(0, 32, gl.SliceLayout(1, LAYOUT))
            part.store(gl.where((rows < exist)[:, None], part.load(LAYOUT), 0.0))


@gluon.jit
def tile_at(ring, number):
    """Tile `number` of a ring, (rows, columns)."""
    tile = ring.tiles.index(number % ring.tiles.shape[0])
    return tile.reshape([tile.shape[2], tile.shape[3]])


@gluon.jit
def wait_full(ring, number):
    SLOTS: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(full_barrier(ring, number), number // SLOTS & 1)


@gluon.jit
def release(ring, number):
    """A consumer has read tile `number`: its product with it is done, not only issued."""
    mbarrier.arrive(empty_barrier(ring, number), count=1)


# ------------------------------------------------------------------------------------------------ products


@gluon.constexpr_function
def product_layout(cols):
    """The layout of a (64, cols) product of wgmma in a consumer's four warps: 16 rows each."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])


@gluon.jit
def multiply(a, b):
    """a b^T of two tiles in shared memory, (64, k) and (n, k), issued."""
    COLS: gl.constexpr = b.shape[0]
    zero = gl.zeros([64, COLS], gl.float32, product_layout(COLS))
    return warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)


# ------------------------------------------------------------------------------------------------ tile loops


@gluon.jit
def tile_start(tiles, index, BLOCK: gl.constexpr):
    """Where tile number `index` of a loop starts: first the partial tiles, then the full ones."""
    full_start = tiles.full_begin + (index - tiles.partial_count) * BLOCK
    return gl.where(index < tiles.partial_count, partial_start(tiles, index, BLOCK), full_start)


@gluon.jit
def tile_count(tiles, BLOCK: gl.constexpr):
    """The tiles of a loop; at least one, which is fully masked where the queries attend to nothing."""
    return gl.maximum(tiles.partial_count + (tiles.full_end - tiles.full_begin) // BLOCK, 1)


@gluon.jit
def first_active_tile(score, work, count, BLOCK_N: gl.constexpr):
    """The number of the first key tile that is active by the block mask; 0 where there is none."""
    first = 0
    at = make_head_info(work)
    if score.blocks is not None:
        while first < count and not block_is_active(score, at, work.start_m, tile_start(work.tiles, first, BLOCK_N)):
            first += 1
        first = gl.where(first == count, 0, first)
    return first


# ------------------------------------------------------------------------------------------------ results


@gluon.constexpr_function
def wide_layout(cols):
    """A layout of (64, cols) in which four warps read and write 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // cols, cols // 8], [4, 1], [1, 0])


@gluon.jit
def store_rows(x, value, start, end, COLS: gl.constexpr):
    """Store rows start .. start + 64 of a (seq, head_dim) matrix, rounded to its dtype, by 16 bytes a thread; rows at
    or past `end` stay untouched."""
    BLOCK_COLS: gl.constexpr = value.shape[1]
    LAYOUT: gl.constexpr = wide_layout(BLOCK_COLS)
    rows = (start + gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)))[:, None]
    cols = gl.arange(0, BLOCK_COLS, gl.SliceLayout(0, LAYOUT))[None, :]
    mask = rows < end
    if COLS != BLOCK_COLS:
        mask = mask & (cols < COLS)
    pointers = x.ptr + rows.to(gl.int64) * x.stride + cols
    gl.store(pointers, gl.convert_layout(value.to(x.ptr.dtype.element_ty), LAYOUT), mask=mask)


# ------------------------------------------------------------------------------------------------ dropout


@gluon.constexpr_function
def quarters_layout(rows, cols):
    """A layout of (rows, cols // 4) in which a warp has the same rows as of a product (rows, cols)."""
    bits = [[0, bit] for bit in (4, 8, 16, 32) if bit < cols // 4]
    warps = [[16, 0], [32, 0]] if rows >= 64 else [[16, 0], bits.pop()]
    registers = [[8, 0], *bits]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, cols // 4])


@gluon.jit
def dropout_multipliers(args, head, start_m, start_n, ROWS: gl.constexpr, COLS: gl.constexpr):
    """`dropout.dropout_multipliers` of ROWS queries and COLS keys."""
    LAYOUT: gl.constexpr = quarters_layout(ROWS, COLS)
    queries = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    quarters = start_n // 4 + gl.arange(0, COLS // 4, gl.SliceLayout(0, LAYOUT))
    a, b, c, d = draw_words(args, head, queries[:, None], quarters[None, :])
    return bits_to_multipliers(args, gl.join(gl.join(a, c), gl.join(b, d)).reshape([ROWS, COLS]))
