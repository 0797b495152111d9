"""The tiles of norms, as plain data, and how many programs share the rows."""

from __future__ import annotations

from typing import NamedTuple

import triton

from .configs import find_architecture, next_power_of_2

# By pass: the widest row that is kept in registers, and the elements in a tile of narrower rows. The backward
# pass takes wider rows by chunks of NORM_CHUNKS: the fewer columns a program has, the fewer its partial sums.
NORM_COLS = {"forward": 32768, "backward": 8192, "jvp": 8192, "hvp": 4096}
NORM_ELEMENTS = {"forward": 2048, "backward": 4096, "jvp": 2048, "hvp": 2048}
NORM_CHUNKS = {"forward": 32768, "backward": 1024, "jvp": 2048, "hvp": 1024}
NORM_RESIDENT = 8192  # elements of backward tiles whose registers a multiprocessor has: at most 128 for 16 elements
NORM_STAGES = 2  # of the backward pass: while it works on a tile, it copies the next one to shared memory


class NormTile(NamedTuple):
    rows: int
    cols: int
    warps: int
    single: bool  # whether a tile holds whole rows
    registers: int | None = None  # of a thread, at most


def choose_norm_tile(direction: str, width: int, mixed: bool = False, dropout: bool = False) -> NormTile:
    """The tile of one pass ("forward", "backward", "jvp", "hvp") over rows of `width` columns.

    mixed: h has another dtype than x. It then changes its layout, which takes registers, as dropout does: at 32,768
    columns the former makes 23 instructions spill on sm_90, the latter 765.
    """
    limit = NORM_COLS[direction]
    if direction == "forward":
        limit //= 4 if dropout else 2 if mixed else 1
    single = width <= limit
    if not single:
        limit = min(limit, NORM_CHUNKS[direction])
    cols = min(next_power_of_2(width), limit)
    rows = max(1, NORM_ELEMENTS[direction] // cols)
    elements = rows * cols
    if elements <= 8192:
        # With tangents 16 of a thread can take more registers than it has; more than 16 warps have fewer.
        of_warp = 256 if direction in ("jvp", "hvp") else 512
        # Left alone, the assembler spills some of these registers for the sake of more warps at a time.
        registers = 128 if direction == "jvp" and not single and find_architecture().startswith("sm_") else None
        return NormTile(rows, cols, max(1, min(16, elements // of_warp)), single, registers)
    # Two programs at a time, of which one reads while the other computes, where that costs few spills: 2 to 15
    # instructions in LayerNorm. One at a time, LayerNorm of 16,384 columns read an H200's memory at half its speed.
    pair = direction == "forward" and elements == 16384 and not (mixed or dropout)
    registers = 32 if pair and find_architecture().startswith("sm_") else None
    return NormTile(rows, cols, find_max_warps(), single, registers)


def find_max_warps() -> int:
    """Of a block, which has at most 1,024 threads: AMD's data center GPUs have 64 in a warp."""
    return 32 if triton.knobs.runtime.interpret else 1024 // triton.runtime.driver.active.get_current_target().warp_size


def count_norm_programs(multiprocessors: int, tile: NormTile, columns: int) -> int:
    """How many programs share the rows of each of `columns` (heads * chunks of columns): as many as run at a time. Each
    writes a row of partial sums, 4 bytes a column for each parameter, which are read once more."""
    resident = max(1, NORM_RESIDENT // (tile.rows * tile.cols))
    return max(1, multiprocessors * resident // columns)
