"""Tile sizes by architecture, as plain data.

Attention: `ATTENTION[pass][architecture]` lists (largest head_dim, bytes per element, Tiles) from small to large; the
first row that is large enough is taken. On sm_80 and sm_90 no row spills a register at head_dim 64 and 128, and every
row fits in its architecture's shared memory: `tests/test_compiled.py` compiles them and counts. The rows were chosen by
that count and not by timing: no GPU has run them yet.
"""

from __future__ import annotations

from typing import NamedTuple

import triton


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

# Architectures that share a table row. Those with 99 KiB go by the small table, unknown ones too.
FAMILY = {
    "sm_80": "sm_80", "sm_87": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "sm_103": "sm_100", "sm_110": "sm_100",
    "gfx90a": "amd", "gfx942": "amd", "gfx950": "amd", "gfx1100": "amd", "gfx1201": "amd",
}  # fmt: skip

ATTENTION = {
    "forward": {
        "sm_80": [
            (64, 2, Tiles(128, 64, 8, 3)),
            (128, 2, Tiles(128, 32, 8, 2)),
            (256, 2, Tiles(64, 32, 8, 2)),
            (64, 4, Tiles(32, 32, 8, 2)),
            (128, 4, Tiles(16, 16, 8, 2)),
            (256, 4, Tiles(16, 16, 8, 2)),
        ],
        "sm_90": [
            (64, 2, Tiles(128, 128, 8, 3)),
            (128, 2, Tiles(128, 64, 8, 3)),
            (256, 2, Tiles(128, 32, 8, 3)),
        ],
        "small": [(256, 2, Tiles(64, 16, 8, 2))],
        "amd": [
            (128, 2, Tiles(128, 32, 4, 2)),
            (256, 2, Tiles(64, 16, 8, 2)),
            (128, 4, Tiles(32, 16, 4, 2)),
        ],
    },
    "backward_q": {
        "sm_80": [
            (64, 2, Tiles(128, 64, 8, 3)),
            (128, 2, Tiles(64, 32, 4, 2)),
            (256, 2, Tiles(64, 32, 8, 1)),
            (64, 4, Tiles(32, 32, 8, 2)),
            (256, 4, Tiles(16, 16, 8, 2)),
        ],
        "sm_90": [
            (64, 2, Tiles(128, 64, 8, 3)),
            (128, 2, Tiles(128, 64, 8, 2)),
            (256, 2, Tiles(128, 32, 8, 2)),
        ],
        "small": [(256, 2, Tiles(32, 16, 8, 1))],
        "amd": [
            (64, 2, Tiles(64, 32, 4, 2)),
            (256, 2, Tiles(32, 16, 4, 1)),
            (128, 4, Tiles(16, 16, 4, 1)),
        ],
    },
    "backward_kv": {
        "sm_80": [
            (64, 2, Tiles(32, 64, 8, 2)),
            (128, 2, Tiles(32, 64, 8, 2)),
            (256, 2, Tiles(16, 64, 8, 1)),
            (64, 4, Tiles(32, 32, 8, 2)),
            (256, 4, Tiles(16, 16, 8, 2)),
        ],
        "sm_90": [
            (64, 2, Tiles(32, 128, 8, 3)),
            (128, 2, Tiles(16, 128, 8, 3)),
            (256, 2, Tiles(16, 64, 8, 1)),
        ],
        "small": [(256, 2, Tiles(16, 32, 8, 1))],
        "amd": [
            (64, 2, Tiles(32, 64, 4, 2)),
            (256, 2, Tiles(16, 32, 4, 1)),
            (128, 4, Tiles(16, 16, 4, 1)),
        ],
    },
}
# A decoding pass: programs are many and short, and memory is the limit. SPLIT is part of the result's bits.
DECODE = [(128, 2, Tiles(16, 64, 4, 2)), (256, 2, Tiles(16, 32, 4, 2)), (256, 4, Tiles(16, 16, 4, 2))]
SPLIT = 512  # keys of a program, up to
SPLIT_QUERIES = 16  # queries; of more, one program takes all keys, so that the workspace stays linear
ROTARY_ELEMENTS = 2048  # of a program that rotates and stores

# Where a family has no row of its own, the next one's serves.
FALLBACK = {"sm_100": "sm_90", "sm_90": "sm_80", "small": "sm_80", "amd": "small"}
INTERPRETED = Tiles(32, 16, 4, 1)  # small, so that short sequences cross tile boundaries too

NORM_COLS = 8192  # the widest row that is kept in registers
NORM_ELEMENTS = 2048  # elements in a tile of narrow rows
NORM_PROGRAMS = 256  # programs of a backward pass, each with a row of partial weight gradients


def architecture() -> str:
    """The GPU Triton compiles for: "sm_90", "gfx942"; "interpreter" under TRITON_INTERPRET=1."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else target.arch.split(":")[0]


def attention_tiles(direction: str, head_dim: int, itemsize: int, modified: bool = False) -> Tiles:
    """Tiles for one pass ("forward", "backward_q", "backward_kv", "decode"); head_dim is the larger of q's and v's.

    modified: with a score_mod. What it captures would be staged in shared memory, for each stage a tile of scores in
    float32, and its value needs registers: half the keys forward, and fewer stages. So no kernel passes its shared
    memory, and at head_dim 64 none spills on sm_80 and sm_90 (with the plain tiles 1,127 spills and 245,760 bytes on
    sm_90).
    """
    arch = architecture()
    if arch == "interpreter":
        return INTERPRETED
    if direction == "decode":
        return next(tiles for largest, size, tiles in DECODE if head_dim <= largest and itemsize == size)
    tiles = plain_tiles(direction, head_dim, itemsize, FAMILY.get(arch, "small"))
    if not modified:
        return tiles
    if direction == "forward":
        return tiles._replace(block_n=max(16, tiles.block_n // 2), stages=2)
    return tiles._replace(stages=1)


def plain_tiles(direction: str, head_dim: int, itemsize: int, family: str) -> Tiles:
    while True:
        for largest, size, tiles in ATTENTION[direction].get(family, []):
            if head_dim <= largest and itemsize == size:
                return tiles
        family = FALLBACK[family]
