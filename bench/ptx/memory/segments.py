"""Stretches of global memory: their bytes, and who read and wrote them."""

from __future__ import annotations

import numpy as np

from ..frontend.types import UNSIGNED
from .tensors import raw_bytes

SECTOR = 32  # bytes: the unit of a GPU's memory traffic
MANY_BLOCKS = -1  # readers of more than one block
MANY_WARPS = 63  # warps of a block; a warp by itself is 0 to 31


class Segment:
    def __init__(self, start: int, end: int, grain: int):
        self.start, self.end, self.grain = start, end, grain
        self.views: dict[int, tuple[int, np.ndarray]] = {}
        for width, dtype in UNSIGNED.items():
            low, high = -(-start // width) * width, end // width * width
            if high > low:
                self.views[width] = low, raw_bytes(low, high - low).view(dtype)
        grains = (end - 1) // grain - start // grain + 1
        self.writer = np.zeros(grains, np.int32)  # block number + 1
        self.reader = np.zeros(grains, np.int32)
        self.updater = np.zeros(grains, np.int32)  # by an atomic
        self.reading_warp, self.writing_warp = np.zeros(grains, np.int64), np.zeros(grains, np.int64)  # which warp last
        self.unwritten: np.ndarray | None = None  # what nothing has written yet; None: none of it
        self.saved: np.ndarray | None = None  # the bytes before the first write
        self.first_sector = start // SECTOR
        sectors = (end - 1) // SECTOR - self.first_sector + 1
        self.read_sectors, self.written_sectors = np.zeros(sectors, bool), np.zeros(sectors, bool)

    def locate_elements(self, address: np.ndarray, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(the view of this width, indices (n, count) of the elements from each address on)."""
        low, view = self.views[width]
        first = (address - np.uint64(low)).astype(np.int64) // width
        return view, first[:, None] + np.arange(count)

    def grain_indices(self, address: np.ndarray, nbytes: int) -> np.ndarray:
        first = address.astype(np.int64) // self.grain - self.start // self.grain
        return first[:, None] + np.arange(max(1, nbytes // self.grain))

    def record_reads(self, grains: np.ndarray, mine: np.ndarray) -> None:
        """By blocks (plus 1)."""
        reader = self.reader[grains]
        self.reader[grains] = np.where((reader == 0) | (reader == mine), mine, MANY_BLOCKS)
        again = self.reader[grains]  # two blocks in this very access: the last one stands there
        self.reader[grains] = np.where(again == mine, again, MANY_BLOCKS)

    def mark_unwritten(self, start: int, unwritten: np.ndarray) -> None:
        """Nothing has written these bytes from an address on. A grain counts if it holds none that was."""
        if self.unwritten is None:
            self.unwritten = np.zeros(len(self.writer), bool)
        whole = np.zeros(len(self.writer) * self.grain, bool)
        base = self.start // self.grain * self.grain
        whole[start - base :][: len(unwritten)] = unwritten
        whole[: self.start - base] = whole[self.start - base]  # bytes of the outer grains that are no tensor's
        whole[self.end - base :] = whole[self.end - base - 1]
        self.unwritten |= whole.reshape(-1, self.grain).all(1)

    def unwritten_bytes(self, start: int, end: int) -> np.ndarray:
        base = self.start // self.grain * self.grain
        return np.repeat(self.unwritten, self.grain)[start - base : end - base]

    def save(self) -> None:
        if self.saved is None:
            self.saved = raw_bytes(self.start, self.end - self.start).copy()

    def record_sectors(self, address: np.ndarray, write: bool) -> None:
        (self.written_sectors if write else self.read_sectors)[
            address.astype(np.int64) // SECTOR - self.first_sector
        ] = True


def is_other_block(marks: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Which marks of blocks are of others."""
    return (marks != 0) & (marks != mine)


def reduce_to_grains(elements: np.ndarray, grains: int) -> np.ndarray:
    """(n, grains) of (n, elements): where one of a grain's elements is marked, or the one that it lies in."""
    n, count = elements.shape
    if grains <= count:
        return elements.reshape(n, grains, -1).any(-1)
    return np.repeat(elements, grains // count, axis=1)


def is_other_warp(last: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """Which marks (block + 1) << 6 | warp are of another warp of the same block."""
    return (last != mine) & (last >> 6 == mine >> 6)
