"""Tile sizes by architecture, as plain data.

Attention: `ATTENTION[pass][architecture]` lists (largest head_dim, bytes per element, Tiles) from small to large; the
first row that is large enough is taken, and made smaller where a call's features do not fit in shared memory beside it.
In place of bytes "tf32" and "tf32x3" stand for float32 on tensor cores (`precision.py`), where of two rows with counts
within a twentieth the one with more warps is taken.
A row is the one with the fewest issue slots for its tensor FLOPs among those whose steady loop keeps out of local
memory (on sm_80 and sm_90, at head_dim 64 and 128; `tests/kernels/test_machine_code.py`). The rows were chosen by that
count and not by timing: `python -m bench gpu --only tune` times their neighbours.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from .compiler import loses_descriptors


class Tiles(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    warps: int
    stages: int


# Shared memory a block may use, in bytes. Triton compiles past it without a word.
# NVIDIA: CUDA C++ Programming Guide, table of compute capabilities. AMD: the LDS of a workgroup, from the ISA manuals.
SHARED_MEMORY = {
    "sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448,
    "sm_103": 232448, "sm_110": 232448, "sm_120": 101376, "sm_121": 101376,
    "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536,
}  # fmt: skip
SCRATCH = 512  # of reductions and the like

# Architectures that share a table row. Those with 99 KiB go by the small table, unknown ones too.
FAMILY = {
    "sm_80": "sm_80", "sm_87": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100", "sm_110": "sm_100",
    "gfx90a": "amd", "gfx942": "amd", "gfx950": "amd", "gfx1100": "amd", "gfx1201": "amd",
}  # fmt: skip

ATTENTION = {
    "forward": {
        "sm_80": [
            (64, 2, Tiles(128, 128, 8, 2)),
            (128, 2, Tiles(128, 64, 8, 2)),
            (256, 2, Tiles(64, 32, 8, 2)),
            (64, 4, Tiles(32, 32, 8, 2)),
            (128, 4, Tiles(16, 16, 8, 2)),
            (256, 4, Tiles(16, 16, 8, 2)),
            (64, "tf32", Tiles(128, 64, 8, 2)),
            (128, "tf32", Tiles(128, 32, 8, 2)),
            (256, "tf32", Tiles(64, 16, 8, 2)),
            (64, "tf32x3", Tiles(32, 64, 4, 2)),
            (128, "tf32x3", Tiles(32, 32, 8, 2)),
        ],
        "sm_90": [
            (64, 2, Tiles(128, 128, 8, 3)),
            (128, 2, Tiles(128, 64, 8, 3)),
            (256, 2, Tiles(128, 32, 8, 3)),
            (128, "tf32", Tiles(128, 64, 8, 2)),
            (256, "tf32", Tiles(64, 32, 8, 2)),
            (64, "tf32x3", Tiles(128, 64, 8, 2)),
            (128, "tf32x3", Tiles(128, 32, 8, 2)),
        ],
        "sm_100": [
            (128, "tf32", Tiles(128, 32, 8, 2)),
            (256, "tf32", Tiles(64, 16, 8, 2)),
        ],
        "small": [
            (256, 2, Tiles(64, 16, 8, 2)),
            (64, "tf32", Tiles(64, 64, 8, 2)),
            (128, "tf32", Tiles(64, 32, 4, 2)),
            (256, "tf32", Tiles(32, 16, 8, 2)),
        ],
        "amd": [
            (128, 2, Tiles(128, 32, 4, 2)),
            (256, 2, Tiles(64, 16, 8, 2)),
            (128, 4, Tiles(32, 16, 4, 2)),
        ],
    },
    "backward_q": {
        "sm_80": [
            (64, 2, Tiles(128, 32, 4, 2)),
            (128, 2, Tiles(128, 64, 8, 2)),
            (256, 2, Tiles(64, 32, 8, 1)),
            (64, 4, Tiles(32, 32, 8, 2)),
            (256, 4, Tiles(16, 16, 8, 2)),
            (64, "tf32", Tiles(128, 32, 4, 2)),
            (128, "tf32", Tiles(64, 32, 8, 2)),
            (256, "tf32", Tiles(32, 16, 8, 2)),
            (64, "tf32x3", Tiles(32, 64, 8, 2)),
            (128, "tf32x3", Tiles(16, 32, 8, 2)),
        ],
        "sm_90": [
            (64, 2, Tiles(128, 64, 8, 3)),
            (128, 2, Tiles(128, 64, 8, 2)),
            (256, 2, Tiles(128, 32, 8, 2)),
            (64, "tf32", Tiles(128, 128, 8, 2)),
            (128, "tf32", Tiles(128, 32, 8, 2)),
            (64, "tf32x3", Tiles(128, 64, 8, 2)),
        ],
        "sm_100": [
            (64, "tf32", Tiles(128, 64, 8, 2)),
            (128, "tf32", Tiles(64, 32, 8, 2)),
            (64, "tf32x3", Tiles(128, 32, 8, 2)),
        ],
        "small": [
            (256, 2, Tiles(32, 16, 8, 1)),
            (64, "tf32", Tiles(64, 32, 4, 2)),
            (128, "tf32", Tiles(64, 16, 4, 2)),
            (256, "tf32", Tiles(16, 16, 8, 2)),
        ],
        "amd": [
            (64, 2, Tiles(64, 32, 4, 2)),
            (256, 2, Tiles(32, 16, 4, 1)),
            (128, 4, Tiles(16, 16, 4, 1)),
        ],
    },
    "backward_kv": {
        "sm_80": [
            (64, 2, Tiles(32, 128, 4, 2)),
            (128, 2, Tiles(32, 128, 8, 2)),
            (256, 2, Tiles(16, 64, 8, 1)),
            (64, 4, Tiles(32, 32, 8, 2)),
            (128, 4, Tiles(16, 16, 8, 1)),
            (256, 4, Tiles(16, 16, 8, 2)),
            (64, "tf32", Tiles(16, 128, 4, 2)),
            (128, "tf32", Tiles(32, 64, 8, 2)),
            (256, "tf32", Tiles(16, 32, 8, 2)),
            (64, "tf32x3", Tiles(32, 32, 8, 2)),
            (128, "tf32x3", Tiles(16, 32, 8, 2)),
        ],
        "sm_90": [
            (64, 2, Tiles(64, 128, 8, 3)),
            (128, 2, Tiles(32, 128, 8, 3)),
            (256, 2, Tiles(16, 64, 8, 1)),
            (64, "tf32", Tiles(64, 128, 8, 2)),
            (128, "tf32", Tiles(16, 128, 8, 2)),
            (64, "tf32x3", Tiles(32, 128, 8, 2)),
            (128, "tf32x3", Tiles(16, 16, 8, 2)),
        ],
        "small": [
            (256, 2, Tiles(16, 32, 8, 1)),
            (64, "tf32", Tiles(16, 128, 4, 2)),
            (128, "tf32", Tiles(16, 64, 8, 2)),
            (256, "tf32", Tiles(16, 16, 8, 2)),
        ],
        "amd": [
            (64, 2, Tiles(32, 64, 4, 2)),
            (256, 2, Tiles(16, 32, 4, 1)),
            (128, 4, Tiles(16, 16, 4, 1)),
        ],
    },
}

# Of calls that change scores or weights by more than a scale and positions, which needs registers: smaller ones, where
# those above would spill in their steady loop.
CHANGED = {
    "forward": {"sm_80": [(64, 2, Tiles(128, 64, 8, 3)), (128, 2, Tiles(128, 32, 8, 2))]},
    "backward_q": {"sm_80": [(64, 2, Tiles(128, 64, 8, 3)), (128, 2, Tiles(64, 32, 4, 2))]},
    "backward_kv": {
        "sm_80": [(128, 2, Tiles(32, 64, 8, 2))],
        "sm_90": [(64, 2, Tiles(32, 128, 8, 3)), (128, 2, Tiles(16, 128, 8, 3))],
    },
}


class Roles(NamedTuple):
    """How a pass on Hopper shares its work out (`hopper.py`)."""

    consumers: int  # groups of four warps, with 64 rows
    block: int  # rows of a tile that they visit
    stages: int  # tiles of a ring
    registers: int  # of a consumer's thread
    pingpong: bool  # consumers take turns to issue products
    persistent: bool  # a program takes work items in turn
    shared: bool = False  # both consumers have the same rows: one sums dK, the other dV

    @property
    def owned(self) -> int:
        """Rows that a program owns."""
        return 64 if self.shared else 64 * self.consumers


# The first row whose head_dim is at least the larger one of a call; chosen by counting, not by timing.
HOPPER = {
    "forward": {
        64: Roles(2, 128, 2, 240, True, False),
        128: Roles(2, 128, 2, 240, True, False),
        256: Roles(2, 64, 2, 240, True, False),
    },
    "backward_q": {
        64: Roles(2, 128, 2, 240, False, False),
        128: Roles(2, 64, 2, 240, False, False),
        256: Roles(2, 32, 2, 240, False, False),
    },
    "backward_kv": {
        64: Roles(2, 64, 2, 240, False, False),
        128: Roles(2, 64, 2, 240, False, False),
        256: Roles(2, 64, 2, 240, False, False, shared=True),
    },
}
# Other rows that fit and keep out of local memory in their steady loops, to be timed against those above.
HOPPER_CANDIDATES = {
    "forward": {
        64: [
            Roles(2, 128, 3, 240, True, False), Roles(2, 128, 2, 240, False, False), Roles(2, 128, 2, 240, True, True),
            Roles(3, 64, 3, 160, True, False),
        ],
        128: [
            Roles(2, 128, 2, 240, False, False), Roles(2, 128, 2, 240, True, True), Roles(2, 64, 4, 240, True, False),
            Roles(3, 64, 2, 160, True, False),
        ],
        256: [Roles(2, 64, 2, 240, False, False), Roles(2, 64, 2, 240, True, True)],
    },
    "backward_q": {
        64: [Roles(2, 64, 3, 240, False, False), Roles(3, 64, 3, 160, False, False)],
        128: [Roles(2, 64, 3, 240, False, False), Roles(3, 64, 2, 160, False, False)],
        256: [],
    },
    "backward_kv": {
        64: [Roles(2, 64, 3, 240, False, False)],
        128: [Roles(2, 32, 3, 240, False, False)],
        256: [Roles(2, 32, 3, 240, False, False, shared=True)],
    },
}  # fmt: skip
# A decoding pass: programs are many and short, and memory is the limit, so that with three stages two tiles are under
# way while one is used. SPLITS is part of the result's bits, as SPLIT_KEYS in decode.py is.
DECODE = [
    (128, 2, Tiles(16, 64, 4, 3)),
    (256, 2, Tiles(16, 32, 4, 3)),
    (256, 4, Tiles(16, 16, 4, 3)),
    (256, "tf32", Tiles(16, 32, 4, 3)),
    (128, "tf32x3", Tiles(16, 16, 4, 3)),
]
SPLITS = 32  # of a row's keys, at most: a tile of the merge
SPLIT_QUERIES = 16  # queries; of more, one program takes all keys, so that the workspace stays linear
ROTARY_ELEMENTS = 2048  # of a program that rotates and stores

# Where a family has no row of its own, the next one's serves.
FALLBACK = {"sm_100": "sm_90", "sm_90": "sm_80", "small": "sm_80", "amd": "small"}
INTERPRETED = Tiles(32, 16, 4, 1)  # small, so that short sequences cross tile boundaries too

# Norms, by pass: the widest row that is kept in registers, and the elements in a tile of narrower rows. The backward
# pass takes wider rows by chunks of NORM_CHUNK columns: the fewer columns a program has, the fewer its partial sums.
NORM_COLS = {"forward": 32768, "backward": 8192}
NORM_ELEMENTS = {"forward": 2048, "backward": 4096}
NORM_CHUNK = 1024
NORM_RESIDENT = 8192  # elements of backward tiles whose registers a multiprocessor has: at most 128 for 16 elements
NORM_STAGES = 2  # of the backward pass: while it works on a tile, it copies the next one to shared memory


def next_power_of_2(n: int) -> int:
    """As Triton's, which is made to be called in kernels too and takes the host ten times as long."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; as Triton's."""
    return -(-a // b)


class NormTile(NamedTuple):
    rows: int
    cols: int
    warps: int
    single: bool  # whether the columns are all of a row
    registers: int | None = None  # of a thread, at most


def architecture() -> str:
    """The GPU Triton compiles for: "sm_90", "gfx942"; "interpreter" under TRITON_INTERPRET=1."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch.split(":")[0]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; of CPU tensors, which Triton's interpreter takes, few: each program then visits several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def shared_memory(arch: str) -> int:
    """Bytes a block may use; of an architecture that is not named, the least of its maker's."""
    return SHARED_MEMORY.get(arch) or min(size for name, size in SHARED_MEMORY.items() if name[:2] == arch[:2])


def norm_tile(direction: str, width: int, mixed: bool = False, dropout: bool = False) -> NormTile:
    """The tile of one pass ("forward", "backward") over rows of `width` columns.

    mixed: h has another dtype than x. It then changes its layout on the way, which takes registers, as dropout does:
    at 32,768 columns the one makes 23 instructions spill on sm_90, the other 765.
    """
    limit = NORM_COLS[direction]
    if direction == "forward":
        limit //= 4 if dropout else 2 if mixed else 1
    single = width <= limit
    if not single and direction == "backward":
        limit = NORM_CHUNK
    cols = min(next_power_of_2(width), limit)
    rows = max(1, NORM_ELEMENTS[direction] // cols)
    elements = rows * cols
    if elements <= 8192:
        return NormTile(rows, cols, max(1, elements // 512), single)
    # Two programs at a time, of which one reads while the other computes, where that takes few spills: 2 to 15
    # instructions in LayerNorm. Alone, LayerNorm of 16,384 columns read an H200's memory at half its speed.
    pair = direction == "forward" and elements == 16384 and not (mixed or dropout)
    return NormTile(rows, cols, most_warps(), single, 32 if pair and architecture().startswith("sm_") else None)


def most_warps() -> int:
    """Of a block, which has 1,024 threads at most: AMD's data center GPUs have 64 in a warp."""
    return 32 if triton.knobs.runtime.interpret else 1024 // triton.runtime.driver.active.get_current_target().warp_size


def norm_programs(multiprocessors: int, tile: NormTile, columns: int) -> int:
    """How many programs share out the rows of each of `columns` (heads, chunks of columns): as many as run at a time.
    Each writes a row of partial sums, 4 bytes a column for each parameter, which are read once more."""
    resident = max(1, NORM_RESIDENT // (tile.rows * tile.cols))
    return max(1, multiprocessors * resident // columns)


class Pairs(NamedTuple):
    """What a pass reads and makes of each (query, key) pair on top of the products, in bytes."""

    loaded: int = 0  # bias, mask and what a score_mod captured: staged in shared memory with the tiles of the loop
    widest: int = 0  # the largest of those
    dropout: bool = False  # whose random numbers change their layout through shared memory
    changed: bool = False  # scores or weights are, by more than a scale and positions


PLAIN = Pairs()


def attention_cols(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The columns of a tile of q or k and of v: the head dimensions as powers of two, 16 at least; more of v where the
    assembler would get narrow ones wrong (`compiler.py`)."""
    cols, cols_v = (max(16, next_power_of_2(dim)) for dim in (head_dim, head_dim_v))
    wider = max(cols_v, min(cols, 64))
    # The width first: only a call with narrow ones asks the driver, which costs the host time.
    if wider > cols_v and architecture() == "sm_90" and loses_descriptors():
        return cols, wider
    return cols, cols_v


def attention_tiles(
    direction: str, cols: tuple[int, int], itemsize: int, pairs: Pairs = PLAIN, modified: bool = False,
    precision: str = "ieee",
) -> Tiles:  # fmt: skip
    """Tiles for one pass ("forward", "backward_q", "backward_kv", "decode") that fit the architecture's shared memory.

    cols: the columns of a tile of q or k and of v, from `attention_cols`.
    modified: with a score_mod, whose value needs registers: half the keys forward, and fewer stages. So at head_dim 64
    none spills on sm_80 and sm_90 (with the plain tiles 1,127 spills).
    """
    return fitting_tiles(architecture(), direction, cols, itemsize, pairs, modified, precision)


@functools.cache
def fitting_tiles(
    arch: str, direction: str, cols: tuple[int, int], itemsize: int, pairs: Pairs, modified: bool,
    precision: str = "ieee",
) -> Tiles:  # fmt: skip
    if arch == "interpreter":
        return INTERPRETED
    widest, kind = max(cols), itemsize if precision == "ieee" else precision
    if direction == "decode":
        tiles = next(tiles for largest, size, tiles in DECODE if widest <= largest and kind == size)
    else:
        tiles = plain_tiles(direction, widest, kind, FAMILY.get(arch, "small"), pairs.changed)
    if modified and direction == "forward":
        tiles = tiles._replace(block_n=max(16, tiles.block_n // 2), stages=2)
    elif modified:
        tiles = tiles._replace(stages=1)
    limit = shared_memory(arch)
    while shared_bytes(arch, direction, tiles, cols, itemsize, pairs, precision) > limit:
        less = smaller(direction, tiles)
        if less is None:
            break
        tiles = less
    return tiles


def hopper_roles(direction: str, head_dim: int, changed: bool) -> Roles:
    """How a pass on Hopper shares its work out. changed: as in Pairs."""
    row = next(row for largest, row in HOPPER[direction].items() if head_dim <= largest)
    return halved(row) if changed else row


def hopper_candidates(direction: str, head_dim: int, changed: bool) -> list[Roles]:
    """What to time against that row."""
    rows = next(rows for largest, rows in HOPPER_CANDIDATES[direction].items() if head_dim <= largest)
    return [halved(row) for row in rows] if changed else rows


def halved(row: Roles) -> Roles:
    """With half the tile: changing scores takes registers."""
    return row._replace(block=max(32, row.block // 2))


def shared_bytes(
    arch: str, direction: str, tiles: Tiles, cols: tuple[int, int], itemsize: int, pairs: Pairs, precision: str = "ieee"
) -> int:
    """At most how much shared memory a pass is compiled to use. `tests/kernels/test_shared_memory.py` holds it against
    what Triton makes of the kernels.

    A loop has copies of what it visits and loads; what a program owns lies there once, where tensor cores or ldmatrix
    read it. AMD's compiler keeps that, and what is loaded of each pair, in registers.
    """
    owned, visited = (tiles.block_n, tiles.block_m) if direction == "backward_kv" else (tiles.block_m, tiles.block_n)
    owned_cols = cols[0] if direction in ("forward", "decode") else sum(cols)
    staged = tiles.stages - 1
    nvidia = arch.startswith("sm_")
    tensor_cores = itemsize == 2 or precision != "ieee"
    reads_shared = nvidia and tensor_cores and int(arch.removeprefix("sm_")) in range(90, 120)  # wgmma, tcgen05.mma
    copies = max(staged + reads_shared, 1)  # one is read while the next ones are on their way
    # Of each query that is visited lse and delta, and where scores are not raw the rest of lse.
    numbers = 12 if direction == "backward_kv" and (itemsize == 4 or pairs.changed) else 8
    rows = copies * visited * (sum(cols) * itemsize + numbers) + nvidia * owned * owned_cols * itemsize
    if precision == "tf32x3":  # big and small: of what is owned, and of the wider of k and v in place of a copy of each
        rows += (owned * owned_cols + visited * (max(cols) - min(cols))) * itemsize
    if nvidia and (staged == 0 or precision == "tf32"):  # ldmatrix transposes 16-bit elements alone
        rows += visited * max(cols) * itemsize  # what two products read lies there twice, once transposed
    # What passes through shared memory to change its layout: random numbers, loads that are not staged, and weights and
    # their gradients as operands, which wgmma takes from registers.
    operands = 0 if arch == "sm_90" and tensor_cores else 2 * itemsize
    scratch = operands + max(4 * pairs.dropout, pairs.widest * (staged == 0))
    pair = nvidia * staged * pairs.loaded + scratch
    return rows + tiles.block_m * tiles.block_n * pair + SCRATCH


def paged_stages(stages: int) -> int:
    """The stages of a decoding loop that reads a page table, so that as many keys are under way as without one: its
    entries are loaded first, NVIDIA's compiler leaves them as many turns as the keys, AMD's one."""
    return stages + (1 if architecture().startswith("gfx") else stages - 1)


def smaller(direction: str, tiles: Tiles) -> Tiles | None:
    """The next tiles to try where these do not fit: fewer stages, then less of what is visited, then of what is owned;
    None for the smallest."""
    if tiles.stages > 1:
        return tiles._replace(stages=tiles.stages - 1)
    sides = ("block_m", "block_n") if direction == "backward_kv" else ("block_n", "block_m")
    for side in sides:
        if getattr(tiles, side) > 16:
            return tiles._replace(**{side: getattr(tiles, side) // 2})
    return None


def plain_tiles(direction: str, head_dim: int, kind: int | str, family: str, changed: bool = False) -> Tiles:
    """The row for elements of `kind` bytes, or for float32 on tensor cores of "tf32", "tf32x3"."""
    while True:
        smaller_rows = CHANGED[direction].get(family, []) if changed else []
        for largest, size, tiles in smaller_rows + ATTENTION[direction].get(family, []):
            if head_dim <= largest and kind == size:
                return tiles
        family = FALLBACK[family]
