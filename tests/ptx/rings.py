"""Attention without exponentials, the sum over key tiles of (s - max(s)) v with s = q k^T, as a warp-specialised kernel
for Hopper: a producer warp fills rings of tiles by TMA, two consumer warp groups take turns to multiply them. FAULT
injects a typical fault of such kernels."""

from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

M, N, D = gl.constexpr(64), gl.constexpr(64), gl.constexpr(64)  # queries of a consumer, keys of a tile, head dimension
CONSUMERS = gl.constexpr(2)
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # until Triton 3.7
SHARED = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # of 64 by 64 sums in a warp group


class Ring(NamedTuple):
    """Tiles in shared memory, each with a full and an empty mbarrier."""

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


@gluon.jit
def new_barrier():
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    return barrier


@gluon.jit
def new_ring(descriptor, SLOTS: gl.constexpr, READERS: gl.constexpr):
    tiles = gl.allocate_shared_memory(descriptor.dtype, [SLOTS, 64, 64], descriptor.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return Ring(tiles, full, empty)


@gluon.jit
def fill(ring, index, descriptor, row, SLOTS: gl.constexpr, FAULT: gl.constexpr):
    """The producer loads tile number `index` from these rows."""
    slot = index % SLOTS
    if FAULT != "no wait for empty":
        mbarrier.wait(ring.empty.index(slot), index // SLOTS & 1 ^ 1)
    mbarrier.expect(ring.full.index(slot), descriptor.block_type.nbytes)
    column = 4 if FAULT == "a column between pieces of 16 bytes" else 0
    async_load(descriptor, [row, column], ring.full.index(slot), ring.tiles.index(slot))


@gluon.jit
def wait_full(ring, index, SLOTS: gl.constexpr):
    mbarrier.wait(ring.full.index(index % SLOTS), index // SLOTS & 1)


@gluon.jit
def release(ring, index, SLOTS: gl.constexpr):
    mbarrier.arrive(ring.empty.index(index % SLOTS), count=1)


@gluon.jit
def load_tiles(q, k, v, q_ring, k_ring, v_ring, tiles, SLOTS: gl.constexpr, AHEAD: gl.constexpr, FAULT: gl.constexpr):
    """The producer. AHEAD: K is loaded a tile ahead of V, as the consumers read them; else V follows K."""
    for i in gl.static_range(CONSUMERS):
        fill(q_ring, i, q, (gl.program_id(0) * CONSUMERS + i) * M, CONSUMERS, FAULT)
    for index in range(tiles + AHEAD):
        if index < tiles:
            fill(k_ring, index, k, index * N, SLOTS, FAULT)
        if index >= AHEAD:
            fill(v_ring, index - AHEAD, v, (index - AHEAD) * N, SLOTS, FAULT)


@gluon.jit
def attend(q_ring, k_ring, v_ring, turns, out, tiles, ME: gl.constexpr, SLOTS: gl.constexpr, FAULT: gl.constexpr):
    """Consumer ME: its queries against all tiles. The product with V of a tile overlaps the next one with K."""
    q_tile = q_ring.tiles.index(ME)
    acc = gl.zeros([M, D], gl.float32, LAYOUT)
    wait_full(q_ring, ME, CONSUMERS)
    wait_full(k_ring, 0, SLOTS)
    zeros = gl.zeros([M, N], gl.float32, LAYOUT)
    scores = warpgroup_mma(q_tile, k_ring.tiles.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    release(k_ring, 0, SLOTS)
    weights = scores - gl.max(scores, 1)[:, None]
    for index in range(1, tiles):
        if FAULT != "no wait for K":
            wait_full(k_ring, index, SLOTS)
        if FAULT != "no wait for V":
            wait_full(v_ring, index - 1 + (SLOTS if FAULT == "wrong parity" else 0), SLOTS)
        mbarrier.wait(turns[ME], (index - 1) & 1)
        p = gl.convert_layout(weights.to(gl.float16), gl.DotOperandLayout(0, LAYOUT, 2))
        k_tile = k_ring.tiles.index(index % SLOTS).permute((1, 0))
        scores = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, v_ring.tiles.index((index - 1) % SLOTS), acc, is_async=True)
        mbarrier.arrive(turns[ME if FAULT == "wrong turn" else (ME + 1) % CONSUMERS], count=1)
        if FAULT == "K released early":
            release(k_ring, index, SLOTS)
        scores = warpgroup_mma_wait(2 if FAULT == "no wait for the first product" else 1, deps=(scores,))
        if FAULT != "K released early":
            release(k_ring, index, SLOTS)
        weights = scores - gl.max(scores, 1)[:, None]
        if FAULT == "V released early":
            release(v_ring, index - 1, SLOTS)
        if FAULT == "P not kept":
            acc = warpgroup_mma_wait(0, deps=(acc,))
        else:
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        if FAULT != "V released early":
            release(v_ring, index - 1, SLOTS)
    wait_full(v_ring, tiles - 1, SLOTS)
    p = gl.convert_layout(weights.to(gl.float16), gl.DotOperandLayout(0, LAYOUT, 2))
    acc = warpgroup_mma(p, v_ring.tiles.index((tiles - 1) % SLOTS), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    rows = (gl.program_id(0) * CONSUMERS + ME) * M + gl.arange(0, M, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    gl.store(out + rows[:, None] * D + columns[None, :], acc)


@gluon.jit
def products(q, k, v, out, tiles, SLOTS: gl.constexpr, AHEAD: gl.constexpr, FAULT: gl.constexpr):
    """One program for CONSUMERS * M queries."""
    q_ring = new_ring(q, CONSUMERS, 1)
    k_ring = new_ring(k, SLOTS, 1 if FAULT == "wrong reader count" else CONSUMERS)
    v_ring = new_ring(v, SLOTS, CONSUMERS)
    turns = (new_barrier(), new_barrier())
    if FAULT != "no fence after init":
        fence_async_shared()
    mbarrier.arrive(turns[0], count=1)
    gl.warp_specialize(
        [
            (attend, (q_ring, k_ring, v_ring, turns, out, tiles, 0, SLOTS, FAULT)),
            (attend, (q_ring, k_ring, v_ring, turns, out, tiles, 1, SLOTS, FAULT)),
            (load_tiles, (q, k, v, q_ring, k_ring, v_ring, tiles, SLOTS, AHEAD, FAULT)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


@gluon.jit
def products_made(q, k, v, out, queries, keys, SLOTS: gl.constexpr):
    """The same, with descriptors made in the kernel."""
    q = tma.make_tensor_descriptor(q, [queries, D], [D, 1], [M, D], SHARED)
    k = tma.make_tensor_descriptor(k, [keys, D], [D, 1], [N, D], SHARED)
    v = tma.make_tensor_descriptor(v, [keys, D], [D, 1], [N, D], SHARED)
    products(q, k, v, out, gl.cdiv(keys, N), SLOTS, 1, "")


def descriptor(x: torch.Tensor) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [64, 64], SHARED.value)


def matrices(queries: int, keys: int):
    """(q, k, v, expected result) with small integers, so that float16 and the sums are exact."""
    torch.manual_seed(0)
    q, k, v = (torch.randint(-1, 2, (n, D.value)).half() for n in (queries, keys, keys))
    scores = torch.zeros(queries, -(-keys // N.value) * N.value, dtype=torch.float64)
    scores[:, :keys] = q.double() @ k.double().T
    scores = scores.view(queries, -1, N.value)
    weights = (scores - scores.amax(-1, keepdim=True)).view(queries, -1)
    return q, k, v, weights[:, :keys] @ v.double()


def run(tiles: int, slots: int = 2, ahead: int = 1, fault: str = "", programs: int = 1):
    """(compiled kernel, result, expected result)."""
    q, k, v, right = matrices(programs * CONSUMERS.value * M.value, tiles * N.value)
    out = torch.full(q.shape, float("nan"))
    compiled = products[(programs,)](
        descriptor(q), descriptor(k), descriptor(v), out, tiles, SLOTS=slots, AHEAD=ahead, FAULT=fault, num_warps=4
    )
    return compiled, out.double(), right


def run_made(queries: int, keys: int):
    """(result of `products_made`, expected result); the tensors end within their last tile."""
    q, k, v, right = matrices(queries, keys)
    programs = -(-queries // (CONSUMERS.value * M.value))
    out = torch.full((programs * CONSUMERS.value * M.value, D.value), float("nan"))
    products_made[(programs,)](q, k, v, out, queries, keys, SLOTS=2, num_warps=4)
    return out[:queries].double(), right
