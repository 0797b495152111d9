"""The blocks that run together and the state that they share."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..faults import Judge
from ..frontend.program import Program
from ..memory.global_memory import GlobalMemory
from ..memory.shared_memory import Mbarrier, SharedMemory
from .counts import Counts


class Execution(NamedTuple):
    """A launch: the program, its configuration and its memory."""

    program: Program
    grid: tuple[int, int, int]
    threads: int
    params: np.ndarray
    memory: GlobalMemory
    counts: Counts
    judge: Judge


class Wave:
    """Blocks that run together: their shared memory and barriers, and the memory of the launch."""

    def __init__(self, execution: Execution, grid_blocks: np.ndarray):
        program, self.grid, threads, self.params, self.memory, self.counts, self.judge = execution
        self.grid_blocks = grid_blocks
        x, y = self.grid[0], self.grid[1]
        self.coordinates = np.stack([grid_blocks % x, grid_blocks // x % y, grid_blocks // (x * y)], 1)
        self.warps = threads // 32
        groups = -(-self.warps // 4) if program.has_wgmma else 0
        self.shared = SharedMemory(len(grid_blocks), program.shared_bytes, self.warps, program.shared_grain, groups)
        self.mbarriers: dict[tuple[int, int], Mbarrier] = {}
        self.bulk_stores: list = []  # bulk stores that may still read their source
        self.arrived: dict[tuple[int, int], int] = {}  # bar.arrive: (block, barrier) -> threads

    def find_block_coordinates(self, number: int) -> tuple[int, int, int]:
        """The coordinates in the grid of a block."""
        x, y = self.grid[0], self.grid[1]
        return number % x, number // x % y, number // (x * y)

    def arrive(self, blocks: np.ndarray, barriers: np.ndarray) -> None:
        for block, barrier in zip(blocks.tolist(), barriers.tolist(), strict=True):
            self.arrived[block, barrier] = self.arrived.get((block, barrier), 0) + 1
        self.shared.changes += 1
