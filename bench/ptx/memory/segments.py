"""Contiguous ranges of global memory: the data, and the last accesses to it."""

from __future__ import annotations

import numpy as np

from ..frontend.types import UNSIGNED
from .extents import view_bytes

SECTOR = 32  # bytes: the unit of memory traffic on a GPU
MANY_BLOCKS = -1  # blocks have read
MANY_WARPS = 63  # warps of a block have read; a single warp is 0 to 31


class Segment:
    def __init__(self, start: int, end: int, grain: int):
        self.start, self.end, self.grain = start, end, grain
        self.views: dict[int, tuple[int, np.ndarray]] = {}
        for width, dtype in UNSIGNED.items():
            low, high = -(-start // width) * width, end // width * width
            if high > low:
                self.views[width] = low, view_bytes(low, high - low).view(dtype)
        grains = (end - 1) // grain - start // grain + 1
        self.writer = np.zeros(grains, np.int32)  # the last one: block number + 1
        self.reader = np.zeros(grains, np.int32)
        self.updater = np.zeros(grains, np.int32)  # the last atomic
        self.reading_warp, self.writing_warp = np.zeros(grains, np.int64), np.zeros(grains, np.int64)  # which warp last
        self.unwritten: np.ndarray | None = None  # grains never written, None: no such grain
        self.saved: np.ndarray | None = None  # the data before the first write
        self.first_sector = start // SECTOR
        sectors = (end - 1) // SECTOR - self.first_sector + 1
        self.read_sectors, self.written_sectors = np.zeros(sectors, bool), np.zeros(sectors, bool)

    def locate_elements(self, address: np.ndarray, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(view of elements of this width, indices (n, count) of `count` elements at each address)."""
        low, view = self.views[width]
        first = (address - np.uint64(low)).astype(np.int64) // width
        return view, first[:, None] + np.arange(count)

    def grain_indices(self, address: np.ndarray, nbytes: int) -> np.ndarray:
        first = address.astype(np.int64) // self.grain - self.start // self.grain
        return first[:, None] + np.arange(max(1, nbytes // self.grain))

    def record_reads(self, grains: np.ndarray, mine: np.ndarray) -> None:
        """mine: the block numbers plus 1."""
        reader = self.reader[grains]
        self.reader[grains] = np.where((reader == 0) | (reader == mine), mine, MANY_BLOCKS)
        again = self.reader[grains]  # differs where two blocks read in this access
        self.reader[grains] = np.where(again == mine, again, MANY_BLOCKS)

    def mark_unwritten(self, start: int, unwritten: np.ndarray) -> None:
        """Marks bytes from an address on that were never written. A grain is marked if all of its bytes are."""
        if self.unwritten is None:
            self.unwritten = np.zeros(len(self.writer), bool)
        whole = np.zeros(len(self.writer) * self.grain, bool)
        base = self.start // self.grain * self.grain
        whole[start - base :][: len(unwritten)] = unwritten
        whole[: self.start - base] = whole[self.start - base]  # the first and last grain may exceed the tensor
        whole[self.end - base :] = whole[self.end - base - 1]
        self.unwritten |= whole.reshape(-1, self.grain).all(1)

    def find_unwritten_bytes(self, start: int, end: int) -> np.ndarray:
        base = self.start // self.grain * self.grain
        return np.repeat(self.unwritten, self.grain)[start - base : end - base]

    def save(self) -> None:
        if self.saved is None:
            self.saved = view_bytes(self.start, self.end - self.start).copy()

    def record_sectors(self, address: np.ndarray, write: bool) -> None:
        (self.written_sectors if write else self.read_sectors)[
            address.astype(np.int64) // SECTOR - self.first_sector
        ] = True


def is_other_block(marks: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Where marks (block number + 1, 0: none) are of other blocks."""
    return (marks != 0) & (marks != mine)


def reduce_to_grains(elements: np.ndarray, grains: int) -> np.ndarray:
    """(n, grains) of (n, elements): where any element of the grain, or the one that contains it, is marked."""
    n, count = elements.shape
    if grains <= count:
        return elements.reshape(n, grains, -1).any(-1)
    return np.repeat(elements, grains // count, axis=1)


def is_other_warp(last: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Where marks (block + 1) << 6 | warp are of another warp of the same block."""
    return (last != mine) & (last >> 6 == mine >> 6)
