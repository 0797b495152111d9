"""Tile sizes of attention by architecture, as plain data.

`ATTENTION[pass][architecture]` lists (largest head_dim, bytes per element, TileConfig) from small to large. A call
takes the first row that is large enough, made smaller where its features would not fit in shared memory. In place of
bytes, "tf32" and "tf32x3" mean float32 on tensor cores (`precision.py`); of two such rows with counts within a
twentieth, the one with more warps was chosen. A row has the fewest issue slots for its tensor FLOPs among those whose
loop over full tiles keeps out of local memory (on sm_80 and sm_90, at head_dim 64 and 128;
`tests/kernels/test_machine_code.py`). The rows were chosen by that count and not by timing: `python -m bench gpu --only
tune` times their neighbours.
"""

from __future__ import annotations

import functools
from operator import mul
from typing import NamedTuple

import torch
import triton

from .compiler import has_descriptor_bug


class TileConfig(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    warps: int
    stages: int


# The largest head_dim, and bytes per element or how float32 is multiplied, of the calls that take the tiles.
TileRow = tuple[int, int | str, TileConfig]

# Shared memory that a block may use, in bytes. Triton does not check it when it compiles.
# NVIDIA: CUDA C++ Programming Guide, table of compute capabilities. AMD: the LDS of a workgroup, from the ISA manuals.
SHARED_MEMORY = {
    "sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448,
    "sm_103": 232448, "sm_110": 232448, "sm_120": 101376, "sm_121": 101376,
    "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536,
}  # fmt: skip
SCRATCH = 512  # of reductions and similar

# Architectures that share a table row. Those with 99 KiB use the small table, unknown ones too.
FAMILY = {
    "sm_80": "sm_80", "sm_87": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100", "sm_110": "sm_100",
    "gfx90a": "amd", "gfx942": "amd", "gfx950": "amd", "gfx1100": "amd", "gfx1201": "amd",
}  # fmt: skip

ATTENTION: dict[str, dict[str, list[TileRow]]] = {
    "forward": {
        "sm_80": [
            (64, 2, TileConfig(128, 128, 8, 2)),
            (128, 2, TileConfig(128, 64, 8, 2)),
            (256, 2, TileConfig(64, 32, 8, 2)),
            (64, 4, TileConfig(32, 32, 8, 2)),
            (128, 4, TileConfig(16, 16, 8, 2)),
            (256, 4, TileConfig(16, 16, 8, 2)),
            (64, "tf32", TileConfig(128, 64, 8, 2)),
            (128, "tf32", TileConfig(128, 32, 8, 2)),
            (256, "tf32", TileConfig(64, 16, 8, 2)),
            (64, "tf32x3", TileConfig(32, 64, 4, 2)),
            (128, "tf32x3", TileConfig(32, 32, 8, 2)),
        ],
        "sm_90": [
            (64, 2, TileConfig(128, 128, 8, 3)),
            (128, 2, TileConfig(128, 64, 8, 3)),
            (256, 2, TileConfig(128, 32, 8, 3)),
            (128, "tf32", TileConfig(128, 64, 8, 2)),
            (256, "tf32", TileConfig(64, 32, 8, 2)),
            (64, "tf32x3", TileConfig(128, 64, 8, 2)),
            (128, "tf32x3", TileConfig(128, 32, 8, 2)),
        ],
        "sm_100": [
            (128, "tf32", TileConfig(128, 32, 8, 2)),
            (256, "tf32", TileConfig(64, 16, 8, 2)),
        ],
        "small": [
            (256, 2, TileConfig(64, 16, 8, 2)),
            (64, "tf32", TileConfig(64, 64, 8, 2)),
            (128, "tf32", TileConfig(64, 32, 4, 2)),
            (256, "tf32", TileConfig(32, 16, 8, 2)),
        ],
        "amd": [
            (128, 2, TileConfig(128, 32, 4, 2)),
            (256, 2, TileConfig(64, 16, 8, 2)),
            (128, 4, TileConfig(32, 16, 4, 2)),
        ],
    },
    "backward_q": {
        "sm_80": [
            (64, 2, TileConfig(128, 32, 4, 2)),
            (128, 2, TileConfig(128, 64, 8, 2)),
            (256, 2, TileConfig(64, 32, 8, 1)),
            (64, 4, TileConfig(32, 32, 8, 2)),
            (256, 4, TileConfig(16, 16, 8, 2)),
            (64, "tf32", TileConfig(128, 32, 4, 2)),
            (128, "tf32", TileConfig(64, 32, 8, 2)),
            (256, "tf32", TileConfig(32, 16, 8, 2)),
            (64, "tf32x3", TileConfig(32, 64, 8, 2)),
            (128, "tf32x3", TileConfig(16, 32, 8, 2)),
        ],
        "sm_90": [
            (64, 2, TileConfig(128, 64, 8, 3)),
            (128, 2, TileConfig(128, 64, 8, 2)),
            (256, 2, TileConfig(128, 32, 8, 2)),
            (64, "tf32", TileConfig(128, 128, 8, 2)),
            (128, "tf32", TileConfig(128, 32, 8, 2)),
            (64, "tf32x3", TileConfig(128, 64, 8, 2)),
        ],
        "sm_100": [
            (64, "tf32", TileConfig(128, 64, 8, 2)),
            (128, "tf32", TileConfig(64, 32, 8, 2)),
            (64, "tf32x3", TileConfig(128, 32, 8, 2)),
        ],
        "small": [
            (256, 2, TileConfig(32, 16, 8, 1)),
            (64, "tf32", TileConfig(64, 32, 4, 2)),
            (128, "tf32", TileConfig(64, 16, 4, 2)),
            (256, "tf32", TileConfig(16, 16, 8, 2)),
        ],
        "amd": [
            (64, 2, TileConfig(64, 32, 4, 2)),
            (256, 2, TileConfig(32, 16, 4, 1)),
            (128, 4, TileConfig(16, 16, 4, 1)),
        ],
    },
    "backward_kv": {
        "sm_80": [
            (64, 2, TileConfig(32, 128, 4, 2)),
            (128, 2, TileConfig(32, 128, 8, 2)),
            (256, 2, TileConfig(16, 64, 8, 1)),
            (64, 4, TileConfig(32, 32, 8, 2)),
            (128, 4, TileConfig(16, 16, 8, 1)),
            (256, 4, TileConfig(16, 16, 8, 2)),
            (64, "tf32", TileConfig(16, 128, 4, 2)),
            (128, "tf32", TileConfig(32, 64, 8, 2)),
            (256, "tf32", TileConfig(16, 32, 8, 2)),
            (64, "tf32x3", TileConfig(32, 32, 8, 2)),
            (128, "tf32x3", TileConfig(16, 32, 8, 2)),
        ],
        "sm_90": [
            (64, 2, TileConfig(64, 128, 8, 3)),
            (128, 2, TileConfig(32, 128, 8, 3)),
            (256, 2, TileConfig(16, 64, 8, 1)),
            (64, "tf32", TileConfig(64, 128, 8, 2)),
            (128, "tf32", TileConfig(16, 128, 8, 2)),
            (64, "tf32x3", TileConfig(32, 128, 8, 2)),
            (128, "tf32x3", TileConfig(16, 16, 8, 2)),
        ],
        "small": [
            (256, 2, TileConfig(16, 32, 8, 1)),
            (64, "tf32", TileConfig(16, 128, 4, 2)),
            (128, "tf32", TileConfig(16, 64, 8, 2)),
            (256, "tf32", TileConfig(16, 16, 8, 2)),
        ],
        "amd": [
            (64, 2, TileConfig(32, 64, 4, 2)),
            (256, 2, TileConfig(16, 32, 4, 1)),
            (128, 4, TileConfig(16, 16, 4, 1)),
        ],
    },
    "jvp": {
        "sm_80": [
            (64, 2, TileConfig(128, 64, 8, 2)),
            (128, 2, TileConfig(128, 16, 8, 2)),
            (256, 2, TileConfig(32, 32, 8, 2)),
            (64, 4, TileConfig(32, 32, 8, 2)),
            (128, 4, TileConfig(16, 16, 8, 2)),
            (256, 4, TileConfig(16, 16, 8, 1)),
            (64, "tf32", TileConfig(64, 32, 8, 2)),
            (128, "tf32", TileConfig(64, 32, 8, 2)),
            (256, "tf32", TileConfig(32, 16, 8, 1)),
            (64, "tf32x3", TileConfig(32, 32, 8, 2)),
        ],
        "sm_90": [
            (64, 2, TileConfig(128, 64, 8, 2)),
            (128, 2, TileConfig(128, 32, 8, 2)),
            (64, "tf32", TileConfig(128, 32, 8, 2)),
            (128, "tf32", TileConfig(128, 16, 8, 2)),
            (64, "tf32x3", TileConfig(64, 32, 8, 2)),
        ],
        "small": [
            (64, 2, TileConfig(64, 64, 8, 2)),
            (128, 2, TileConfig(128, 16, 8, 2)),
            (256, 2, TileConfig(32, 16, 8, 2)),
            (64, "tf32", TileConfig(64, 32, 8, 2)),
            (128, "tf32", TileConfig(32, 16, 8, 2)),
        ],
        "amd": [
            (64, 2, TileConfig(64, 32, 4, 2)),
            (128, 2, TileConfig(64, 32, 8, 2)),
            (256, 2, TileConfig(32, 16, 8, 1)),
            (128, 4, TileConfig(16, 16, 4, 1)),
        ],
    },
    "hvp_q": {
        "sm_80": [
            (64, 2, TileConfig(64, 64, 8, 2)),
            (128, 2, TileConfig(128, 32, 8, 2)),
            (256, 2, TileConfig(32, 16, 8, 2)),
            (64, 4, TileConfig(32, 32, 8, 2)),
            (128, 4, TileConfig(16, 16, 8, 2)),
            (256, 4, TileConfig(16, 16, 8, 1)),
            (64, "tf32", TileConfig(64, 32, 8, 2)),
            (128, "tf32", TileConfig(32, 16, 8, 2)),
            (256, "tf32", TileConfig(16, 16, 8, 1)),
            (64, "tf32x3", TileConfig(16, 32, 8, 2)),
        ],
        "sm_90": [
            (64, 2, TileConfig(128, 64, 8, 2)),
            (128, 2, TileConfig(128, 32, 8, 2)),
            (256, 2, TileConfig(32, 32, 8, 2)),
            (64, "tf32", TileConfig(128, 32, 8, 2)),
            (128, "tf32", TileConfig(32, 32, 8, 2)),
        ],
        "small": [
            (64, 2, TileConfig(128, 32, 8, 2)),
            (128, 2, TileConfig(32, 32, 8, 2)),
            (256, 2, TileConfig(32, 16, 8, 1)),
            (64, "tf32", TileConfig(32, 32, 8, 2)),
            (128, "tf32", TileConfig(16, 16, 8, 2)),
        ],
        "amd": [
            (64, 2, TileConfig(64, 32, 4, 2)),
            (256, 2, TileConfig(32, 16, 4, 1)),
            (128, 4, TileConfig(16, 16, 4, 1)),
        ],
    },
    "hvp_kv": {
        "sm_80": [
            (64, 2, TileConfig(32, 64, 8, 2)),
            (128, 2, TileConfig(16, 128, 8, 2)),
            (256, 2, TileConfig(16, 32, 8, 2)),
            (64, 4, TileConfig(16, 32, 8, 2)),
            (256, 4, TileConfig(16, 16, 8, 1)),
            (64, "tf32", TileConfig(16, 64, 8, 2)),
            (128, "tf32", TileConfig(16, 32, 8, 1)),
            (256, "tf32", TileConfig(16, 16, 8, 1)),
            (64, "tf32x3", TileConfig(16, 16, 8, 2)),
        ],
        "sm_90": [
            (64, 2, TileConfig(32, 128, 8, 2)),
            (128, 2, TileConfig(16, 128, 8, 1)),
            (256, 2, TileConfig(16, 32, 8, 1)),
            (64, "tf32", TileConfig(16, 32, 8, 1)),
        ],
        "small": [
            (64, 2, TileConfig(32, 64, 8, 2)),
            (128, 2, TileConfig(16, 64, 8, 2)),
            (256, 2, TileConfig(16, 16, 8, 1)),
            (64, "tf32", TileConfig(32, 32, 8, 2)),
            (128, "tf32", TileConfig(16, 16, 8, 1)),
        ],
        "amd": [
            (64, 2, TileConfig(32, 32, 4, 2)),
            (256, 2, TileConfig(16, 16, 4, 1)),
            (128, 4, TileConfig(16, 16, 4, 1)),
        ],
    },
}

# For calls that change scores or weights by more than a scale and positions, which needs registers: smaller tiles,
# where those above would spill in their loop over full tiles.
CHANGED_SCORES: dict[str, dict[str, list[TileRow]]] = {
    "forward": {"sm_80": [(64, 2, TileConfig(128, 64, 8, 3)), (128, 2, TileConfig(128, 32, 8, 2))]},
    "backward_q": {"sm_80": [(64, 2, TileConfig(128, 64, 8, 3)), (128, 2, TileConfig(64, 32, 4, 2))]},
    "backward_kv": {
        "sm_80": [(128, 2, TileConfig(32, 64, 8, 2))],
        "sm_90": [(64, 2, TileConfig(32, 128, 8, 3)), (128, 2, TileConfig(16, 128, 8, 3))],
    },
}


class Roles(NamedTuple):
    """How a warp-specialised pass on Hopper divides its work (`hopper.py`)."""

    consumers: int  # groups of four warps, with 64 rows
    block: int  # rows of a tile that they read
    stages: int  # tiles of a ring
    registers: int  # of a thread of a consumer
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
# Other rows that fit and whose loops over full tiles keep out of local memory, to be timed against those above.
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
# A decode pass: programs are many and short, and memory is the limit, so three stages load two tiles while one is used.
# The bits of a result depend on SPLITS, as on SPLIT_KEYS in decode.py.
DECODE: list[TileRow] = [
    (128, 2, TileConfig(16, 64, 4, 3)),
    (256, 2, TileConfig(16, 32, 4, 3)),
    (256, 4, TileConfig(16, 16, 4, 3)),
    (256, "tf32", TileConfig(16, 32, 4, 3)),
    (128, "tf32x3", TileConfig(16, 16, 4, 3)),
]
SPLITS = 32  # of a row's keys, at most: one tile of the merge
SPLIT_QUERIES = 16  # queries at most; beyond, one program reads all keys, so that the workspace stays linear
ROTARY_ELEMENTS = 2048  # of a program that rotates and stores

# What a pass owns and what it visits: how many tensors of head_dim columns, how many of head_dim_v.
TENSORS = {
    "forward": ((1, 0), (1, 1)), "decode": ((1, 0), (1, 1)),
    "backward_q": ((1, 1), (1, 1)), "backward_kv": ((1, 1), (1, 1)),
    "jvp": ((2, 0), (2, 2)), "hvp_q": ((2, 1), (2, 2)), "hvp_kv": ((2, 2), (2, 1)),
}  # fmt: skip
WITH_TANGENTS = ("jvp", "hvp_q", "hvp_kv")
# Where a family has no row of its own, it uses the next one's.
FALLBACK = {"sm_100": "sm_90", "sm_90": "sm_80", "small": "sm_80", "amd": "small"}
INTERPRETED = TileConfig(64, 32, 4, 1)  # small, so that short sequences cross tile boundaries too


def next_power_of_2(n: int) -> int:
    """As triton.next_power_of_2, which takes ten times as long on the host."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; as Triton's."""
    return -(-a // b)


def find_architecture() -> str:
    """The GPU that Triton compiles for: "sm_90", "gfx942"; "interpreter" under TRITON_INTERPRET=1."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch.split(":")[0]


@functools.cache
def count_multiprocessors(device: torch.device) -> int:
    """Of the GPU; few for CPU tensors in Triton's interpreter, so that each program visits several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def find_shared_memory(arch: str) -> int:
    """Bytes that a block may use; for an unknown architecture, the least of its vendor's."""
    return SHARED_MEMORY.get(arch) or min(size for name, size in SHARED_MEMORY.items() if name[:2] == arch[:2])


class PairCosts(NamedTuple):
    """The costs of a pass for each (query, key) pair, besides the products."""

    loaded: int = 0  # bytes of bias, mask and captured tensors: staged in shared memory with the tiles of the loop
    widest: int = 0  # bytes of the largest of those
    dropout: bool = False  # its random numbers change their layout through shared memory
    changes_tiles: bool = False  # or weights, by more than a scale and positions


PLAIN = PairCosts()


def choose_cols(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """The columns of a tile of q or k and of v: the head dimensions as powers of two, 16 at least; more of v where the
    assembler miscompiles narrow ones (`compiler.py`)."""
    cols, cols_v = (max(16, next_power_of_2(dim)) for dim in (head_dim, head_dim_v))
    wider = max(cols_v, min(cols, 64))
    # The width first: asking the driver costs the host time.
    if wider > cols_v and find_architecture() == "sm_90" and has_descriptor_bug():
        return cols, wider
    return cols, cols_v


def choose_tiles(
    direction: str, cols: tuple[int, int], itemsize: int, pairs: PairCosts = PLAIN, has_score_mod: bool = False,
    precision: str = "ieee",
) -> TileConfig:  # fmt: skip
    """Tiles for one pass ("forward", "backward_q", "backward_kv", "decode") that fit the architecture's shared memory.

    cols: the columns of a tile of q or k and of v, from `choose_cols`.
    has_score_mod: its values need registers: half the keys forward, and fewer stages. So at head_dim 64 nothing spills
    on sm_80 and sm_90 (with the plain tiles 1,127 spills).
    """
    return fit_tiles(find_architecture(), direction, cols, itemsize, pairs, has_score_mod, precision)


@functools.cache
def fit_tiles(
    arch: str, direction: str, cols: tuple[int, int], itemsize: int, pairs: PairCosts, has_score_mod: bool,
    precision: str = "ieee",
) -> TileConfig:  # fmt: skip
    if arch == "interpreter":
        return INTERPRETED
    widest, kind = max(cols), itemsize if precision == "ieee" else precision
    if direction == "decode":
        tiles = next(tiles for largest, size, tiles in DECODE if widest <= largest and kind == size)
    else:
        tiles = look_up_tiles(direction, widest, kind, FAMILY.get(arch, "small"), pairs.changes_tiles)
    if has_score_mod and direction == "forward":
        tiles = tiles._replace(block_n=max(16, tiles.block_n // 2), stages=2)
    elif has_score_mod:
        tiles = tiles._replace(stages=1)
    limit = find_shared_memory(arch)
    while count_shared_bytes(arch, direction, tiles, cols, itemsize, pairs, precision) > limit:
        less = shrink_tiles(direction, tiles)
        if less is None:
            break
        tiles = less
    return tiles


def choose_hopper_roles(direction: str, head_dim: int, changes_tiles: bool) -> Roles:
    """The row of HOPPER for a call. changes_tiles: as in PairCosts."""
    row = next(row for largest, row in HOPPER[direction].items() if head_dim <= largest)
    return halve_tile(row) if changes_tiles else row


def list_hopper_candidates(direction: str, head_dim: int, changes_tiles: bool) -> list[Roles]:
    """The rows to time against that one."""
    rows = next(rows for largest, rows in HOPPER_CANDIDATES[direction].items() if head_dim <= largest)
    return [halve_tile(row) for row in rows] if changes_tiles else rows


def halve_tile(row: Roles) -> Roles:
    """The row with half the tile: changing scores takes registers."""
    return row._replace(block=max(32, row.block // 2))


def count_shared_bytes(
    arch: str,
    direction: str,
    tiles: TileConfig,
    cols: tuple[int, int],
    itemsize: int,
    pairs: PairCosts,
    precision: str = "ieee",
) -> int:
    """An upper bound of the shared memory that a compiled pass uses. `tests/kernels/test_compiled.py` compares it with
    the compiled kernels.

    A loop keeps several copies of the tiles that it visits and loads; the tiles that a program owns lie there once,
    where tensor cores or ldmatrix read them. AMD's compiler keeps those, and the loads of each pair, in registers; it
    changes the layout of results through shared memory, after the loop.
    """
    owned, visited = (tiles.block_n, tiles.block_m) if owns_keys(direction) else (tiles.block_m, tiles.block_n)
    owned_cols, visited_cols = (sum(map(mul, count, cols)) for count in TENSORS[direction])
    staged = tiles.stages - 1
    if staged == 0:  # no more are there at a time
        visited_cols = min(visited_cols, 3 * max(cols))
    nvidia = arch.startswith("sm_")
    tensor_cores = itemsize == 2 or precision != "ieee"
    reads_shared = nvidia and tensor_cores and int(arch.removeprefix("sm_")) in range(90, 120)  # wgmma, tcgen05.mma
    copies = max(staged + reads_shared, 1)  # one is read while the next ones are being copied
    # lse and delta of each visited query, the rest of lse unless scores are raw, and the tangents of lse and delta.
    numbers = 12 if owns_keys(direction) and (itemsize == 4 or pairs.changes_tiles) else 8
    numbers += 8 * (direction == "hvp_kv")
    rows = copies * visited * (visited_cols * itemsize + numbers) + nvidia * owned * owned_cols * itemsize
    if precision == "tf32x3":  # big and small: of owned tiles, and of the wider of k and v in place of a copy of each
        rows += (owned * owned_cols + visited * (max(cols) - min(cols))) * itemsize
    twice = staged == 0 or precision == "tf32"  # ldmatrix transposes 16-bit elements alone
    if direction in WITH_TANGENTS:
        twice = tensor_cores and (twice or direction == "hvp_kv")
    if nvidia and twice:
        rows += visited * max(cols) * itemsize  # a tile that two products read lies there twice, once transposed
    # These change their layout through shared memory: random numbers, loads that are not staged, and weights and their
    # gradients as operands, which wgmma reads from registers, but not those of two groups of warps on the same rows;
    # hvp_kv has two at a time.
    operands = 0 if arch == "sm_90" and tensor_cores and direction not in WITH_TANGENTS else 2 * itemsize
    operands *= 1 + (direction == "hvp_kv")
    scratch = operands + max(4 * pairs.dropout, pairs.widest * (staged == 0))
    pair = nvidia * staged * pairs.loaded + scratch
    loop = rows + tiles.block_m * tiles.block_n * pair + SCRATCH
    return loop if nvidia else max(loop, owned * max(cols) * itemsize)


def owns_keys(direction: str) -> bool:
    return direction.endswith("_kv")


def choose_paged_stages(stages: int) -> int:
    """The stages of a decode loop that reads a page table, so that as many keys are in flight as without one: its
    entries are loaded first, as many iterations ahead as the keys by NVIDIA's compiler, one by AMD's."""
    return stages + (1 if find_architecture().startswith("gfx") else stages - 1)


def shrink_tiles(direction: str, tiles: TileConfig) -> TileConfig | None:
    """The next tiles to try where these do not fit: fewer stages, then fewer visited rows, then fewer owned ones; None
    after the smallest. Tangents of float32 at a head_dim of 256 need tiles that tensor cores do not have."""
    if tiles.stages > 1:
        return tiles._replace(stages=tiles.stages - 1)
    sides = ("block_m", "block_n") if owns_keys(direction) else ("block_n", "block_m")
    for side, least in zip(sides, (16, 8 if direction in WITH_TANGENTS else 16), strict=True):
        if getattr(tiles, side) > least:
            return tiles._replace(**{side: getattr(tiles, side) // 2})
    return None


def look_up_tiles(
    direction: str, head_dim: int, kind: int | str, family: str, changes_tiles: bool = False
) -> TileConfig:
    """The row for elements of `kind` bytes, or for float32 on tensor cores of "tf32", "tf32x3"."""
    while True:
        smaller_rows = CHANGED_SCORES.get(direction, {}).get(family, []) if changes_tiles else []
        for largest, size, tiles in smaller_rows + ATTENTION[direction].get(family, []):
            if head_dim <= largest and kind == size:
                return tiles
        family = FALLBACK[family]
