"""Global memory: the tensors' own memory, with bounds checks and race detection between blocks.

A segment is a range of addresses that tensors of the launch cover (overlapping tensors share one). An access outside
of every segment is a fault. Each grain of a segment (the size of the kernel's smallest global access) records the last
block that wrote it and the blocks that read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ..frontend.types import UNSIGNED
from .extents import TensorExtent, find_live_tensors, view_bytes
from .segments import MANY_WARPS, SECTOR, Segment, is_other_block, is_other_warp, reduce_to_grains
from .uninitialised import UninitialisedMemory


class Traffic(NamedTuple):
    """The memory traffic of one tensor in a launch, in bytes of whole sectors."""

    name: str
    size: int  # of the tensor
    requested: int  # by the warps, repeated requests included: the traffic without caches
    unique: int  # each sector read or written counts once


def find_lane_index(lanes: np.ndarray | slice, at: int) -> int:
    """The index among all lanes of number `at` of these: a mask, or all."""
    return at if isinstance(lanes, slice) else int(np.flatnonzero(lanes)[at])


class WarpConflict(Exception):  # noqa: N818  (a signal, no error)
    """Warps of one block access the same global memory while one unit runs several of them."""


class OutOfBoundsError(Exception):
    """Accesses outside of every segment; `lanes` masks them."""

    def __init__(self, lanes: np.ndarray):
        super().__init__(lanes)
        self.lanes = lanes


class GlobalMemory:
    def __init__(
        self,
        tensors: Iterable[TensorExtent],
        constants: Iterable[TensorExtent],
        grain: int,
        unwritten: UninitialisedMemory,
    ):
        """unwritten: the memory that was never written."""
        self.tensors, self.grain, self.unwritten = [*tensors, *constants], grain, unwritten
        self.order, self.changes = BlockOrder(), 0
        merged: list[list[int]] = []
        for each in sorted(self.tensors, key=lambda t: t.start):
            if merged and each.start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], each.end)
            else:
                merged.append([each.start, each.end])
        self.segments: list[Segment] = []
        self.add_segments([Segment(start, end, grain) for start, end in merged])
        self.has_gaps = any(t.view_elements is not None for t in self.tensors)
        self.live_tensors: list[TensorExtent] | None = None  # of the process, found when needed
        self.by_provenance: dict[frozenset[str], list[TensorExtent]] = {}

    def add_segments(self, segments: list[Segment]) -> None:
        self.unwritten.mark_segments(segments)
        self.segments = sorted([*self.segments, *segments], key=lambda segment: segment.start)
        self.starts = np.array([s.start for s in self.segments], np.uint64)

    def find_tensors(self, provenance: frozenset[str] | None) -> list[TensorExtent]:
        """The tensors that an address of this provenance may be in; all if it is unknown."""
        if provenance is None:
            return self.tensors
        if provenance not in self.by_provenance:
            found = [t for t in self.tensors if t.parameter in provenance]
            self.by_provenance[provenance] = found or self.tensors
        return self.by_provenance[provenance]

    def find_stray(
        self, provenance: frozenset[str] | None, address: np.ndarray, nbytes: int, used_bytes: int | None
    ) -> tuple[str, np.ndarray] | None:
        """(kind of fault, mask of lanes) of accesses outside of all memory of the launch, or outside of the views that
        their addresses derive from; None: all are inside. used_bytes: mask of the bytes that matter."""
        tensors = self.find_tensors(provenance)
        if tensors is not self.tensors or self.has_gaps:
            good = tensors[0].contains(address, nbytes, used_bytes)
            for tensor in tensors[1:]:
                good |= tensor.contains(address, nbytes, used_bytes)
            if good.all():
                return None
        try:
            self.split_by_segment(address, nbytes)
        except OutOfBoundsError as error:
            if tensors is self.tensors and self.adopt_tensors(address[error.lanes], nbytes):
                return self.find_stray(provenance, address, nbytes, used_bytes)
            return "out of bounds", error.lanes
        return ("out of view", ~good) if tensors is not self.tensors or self.has_gaps else None

    def find_nearest_tensor(self, address: int, tensors: list[TensorExtent] | None = None) -> TensorExtent | None:
        tensors = tensors or self.tensors
        inside = [t for t in tensors if t.start <= address < t.end]
        return min(inside or tensors, key=lambda t: max(t.start - address, address - t.end, 0), default=None)

    def adopt_tensors(self, address: np.ndarray, nbytes: int) -> bool:
        """Adds the tensors of this process that contain these addresses; returns whether there are any. For addresses
        that a kernel loaded from memory: a table of pointers."""
        if self.live_tensors is None:
            self.live_tensors = find_live_tensors()
        found = [tensor for tensor in self.live_tensors if tensor.contains(address, nbytes, None).any()]
        news = [Segment(*piece, self.grain) for piece in self.find_uncovered(found)]
        self.tensors += found
        self.has_gaps |= any(t.view_elements is not None for t in found)
        self.add_segments(news)
        return bool(news)

    def find_uncovered(self, tensors: list[TensorExtent]) -> list[tuple[int, int]]:
        """The address ranges of these tensors outside of every segment."""
        pieces, at = [], 0
        for start, end in sorted((t.start, t.end) for t in tensors):
            at = max(at, start)
            for segment in self.segments:
                if at < segment.start < end:
                    pieces.append((at, segment.start))
                if at < segment.end and segment.start < end:
                    at = segment.end
            if at < end:
                pieces.append((at, end))
                at = end
        return pieces

    def split_by_segment(self, address: np.ndarray, nbytes: int) -> list[tuple[Segment, np.ndarray | slice]]:
        """Each accessed segment with the lanes that access it."""
        if not self.segments:
            raise OutOfBoundsError(np.ones(len(address), bool))
        number = np.searchsorted(self.starts, address, side="right") - 1
        one = (number == number[0]).all()
        found, outside = [], np.zeros(len(address), bool)
        for n, lanes in [(number[0], slice(None))] if one else [(n, number == n) for n in np.unique(number)]:
            there, segment = address[lanes], self.segments[n]
            # Addresses before the first segment are outside too: -1 is the last one, which starts after them.
            outside[lanes] = (there < np.uint64(segment.start)) | (there + np.uint64(nbytes) > np.uint64(segment.end))
            found.append((segment, lanes))
        if outside.any():
            raise OutOfBoundsError(outside)
        return found

    def load(self, address: np.ndarray, width: int, count: int) -> np.ndarray:
        """(n, count) elements of `width` bytes."""
        out = np.empty((len(address), count), UNSIGNED[width])
        for segment, lanes in self.split_by_segment(address, width * count):
            view, index = segment.locate_elements(address[lanes], width, count)
            out[lanes] = view[index]
            segment.record_sectors(address[lanes], False)
        return out

    def restore(self) -> None:
        """Restores the data from before the launch."""
        for segment in self.segments:
            if segment.saved is not None:
                view_bytes(segment.start, segment.end - segment.start)[:] = segment.saved

    def store(self, address: np.ndarray, values: np.ndarray) -> None:
        """Of lanes that write to the same address the last one wins."""
        width, count = values.dtype.itemsize, values.shape[1]
        for segment, lanes in self.split_by_segment(address, width * count):
            view, index = segment.locate_elements(address[lanes], width, count)
            view[index] = values[lanes]
            segment.record_sectors(address[lanes], True)
            if segment.unwritten is not None:
                segment.unwritten[segment.grain_indices(address[lanes], width * count)] = False

    def find_unwritten_read(self, address: np.ndarray, nbytes: int, used_bytes: int | None) -> int | None:
        """The first lane that reads memory that was never written, within the used bytes."""
        if all(segment.unwritten is None for segment in self.segments):
            return None
        for segment, lanes in self.split_by_segment(address, nbytes):
            if segment.unwritten is None:
                continue
            bad = segment.unwritten[segment.grain_indices(address[lanes], nbytes)]
            if used_bytes is not None:
                whole = (1 << self.grain) - 1
                bad = bad[:, [used_bytes >> i * self.grain & whole != 0 for i in range(bad.shape[1])]]
            if bad.any():
                return find_lane_index(lanes, int(np.argmax(bad.any(1))))
        return None

    # -------------------------------------------------------------------------------------------- warps

    def has_warp_conflict(
        self, pieces, address: np.ndarray, nbytes: int, block: np.ndarray, warp: np.ndarray, write: bool
    ) -> bool:
        """Whether one of these warps accesses what another of its block wrote, or writes what another accessed: then
        the order of warps may matter. Records the access and, before a write, the data. pieces: of
        `split_by_segment`."""
        for segment, lanes in pieces:
            grains = segment.grain_indices(address[lanes], nbytes)
            mine = ((block[lanes].astype(np.int64) + 1) << 6 | warp[lanes])[:, None]
            if is_other_warp(segment.writing_warp[grains], mine).any():
                return True
            read = is_other_warp(segment.reading_warp[grains], mine)
            if not write:
                segment.reading_warp[grains] = np.where(read, mine | MANY_WARPS, mine)
                together = is_other_warp(segment.reading_warp[grains], mine)  # within this access
                segment.reading_warp[grains[together]] |= MANY_WARPS
                continue
            if read.any():
                return True
            segment.writing_warp[grains] = mine
            if is_other_warp(segment.writing_warp[grains], mine).any():  # within this access
                return True
            segment.save()
        return False

    # -------------------------------------------------------------------------------------------- races

    def find_unordered(self, marks: tuple[np.ndarray, ...], mine: np.ndarray, lanes) -> tuple[int, int] | None:
        """(lane, other block) where marks (n, grains) are of another block that is not ordered before this one."""
        for other in marks:
            bad = is_other_block(other, mine[:, None])
            if bad.any() and (at := self.order.find_first_unordered(bad, other, mine)):
                return find_lane_index(lanes, at[0]), at[1]
        return None

    def check_read(self, address: np.ndarray, nbytes: int, block: np.ndarray) -> tuple[int, int] | None:
        """(lane, other block) of a read that races with a write of another block. Records the reads."""
        for segment, lanes in self.split_by_segment(address, nbytes):
            grains, mine = segment.grain_indices(address[lanes], nbytes), block[lanes] + 1
            if race := self.find_unordered((segment.writer[grains], segment.updater[grains]), mine, lanes):
                return race
            segment.record_reads(grains, np.broadcast_to(mine[:, None], grains.shape))
        return None

    def check_write(self, address: np.ndarray, values: np.ndarray, block: np.ndarray) -> tuple[int, int] | None:
        """(lane, other block) of a write that races with an access of another block. Writing the value that is already
        there counts as a read: only a write of another value races with it."""
        nbytes = values.dtype.itemsize * values.shape[1]
        for segment, lanes in self.split_by_segment(address, nbytes):
            grains, mine = segment.grain_indices(address[lanes], nbytes), block[lanes] + 1
            view, index = segment.locate_elements(address[lanes], values.dtype.itemsize, values.shape[1])
            changes = reduce_to_grains(view[index] != values[lanes], grains.shape[1])
            if changes.any():
                self.changes += 1
            mine = np.broadcast_to(mine[:, None], grains.shape)
            segment.record_reads(grains[~changes], mine[~changes])
            writer, reader = segment.writer[grains], segment.reader[grains]
            writer = np.where(writer == 0, segment.updater[grains], writer)
            bad = changes & (is_other_block(writer, mine) | is_other_block(reader, mine))
            segment.writer[grains[changes]] = mine[changes]
            clash = changes & (segment.writer[grains] != mine)  # two blocks within this access
            if not (bad | clash).any():
                continue
            view[index] = values[lanes]
            disagrees = reduce_to_grains(view[index] != values[lanes], grains.shape[1])
            other = np.where(clash, segment.writer[grains], np.where(writer != 0, writer, reader))
            bad |= clash & disagrees
            if bad.any() and (at := self.order.find_first_unordered(bad, other, mine[:, 0])):
                return find_lane_index(lanes, at[0]), at[1]
        return None

    def check_atomic(self, address: np.ndarray, nbytes: int, block: np.ndarray) -> tuple[int, int] | None:
        """(lane, other block) of an atomic that races with a plain access of another block. Records the atomic."""
        for segment, lanes in self.split_by_segment(address, nbytes):
            grains, mine = segment.grain_indices(address[lanes], nbytes), block[lanes] + 1
            if race := self.find_unordered((segment.writer[grains], segment.reader[grains]), mine, lanes):
                return race
            segment.updater[grains] = np.broadcast_to(mine[:, None], grains.shape)
            segment.record_sectors(address[lanes], False)
            segment.record_sectors(address[lanes], True)
        return None

    def count_unique_bytes(self) -> tuple[int, int]:
        """(read, written): bytes of the sectors accessed at least once."""
        return tuple(
            SECTOR * sum(int(getattr(s, kind).sum()) for s in self.segments)
            for kind in ("read_sectors", "written_sectors")
        )

    def count_traffic(self, address: np.ndarray, sectors: np.ndarray) -> list[Traffic]:
        """Of each accessed tensor. address, sectors: for each accessing instruction its first address and its number of
        sectors. An instruction counts for the tensor of its first access."""
        tensors = sorted(self.tensors, key=lambda t: t.start)
        starts = np.array([t.start for t in tensors], np.uint64)
        requested = np.zeros(len(tensors), np.int64)
        number = np.searchsorted(starts, address, side="right") - 1
        np.add.at(requested, number, SECTOR * sectors)
        return [
            Traffic(t.name, t.end - t.start, int(bytes_requested), self.count_touched_bytes(t))
            for t, bytes_requested in zip(tensors, requested, strict=True)
            if bytes_requested
        ]

    def count_touched_bytes(self, tensor: TensorExtent) -> int:
        segment = next(s for s in self.segments if s.start <= tensor.start < s.end)
        there = slice(
            *(address // SECTOR - segment.first_sector for address in (tensor.start, tensor.end + SECTOR - 1))
        )
        return SECTOR * int(segment.read_sectors[there].sum() + segment.written_sectors[there].sum())


class BlockOrder:
    """The happens-before order of blocks by release and acquire: seen[block] has a bit for each earlier block."""

    def __init__(self):
        self.seen: dict[int, int] = {}
        self.released: dict[int, int] = {}  # address -> blocks

    def release(self, address: int, block: int) -> None:
        self.released[address] = self.released.get(address, 0) | self.seen.get(block, 0) | (1 << block)

    def acquire(self, address: int, block: int) -> None:
        self.seen[block] = self.seen.get(block, 0) | self.released.get(address, 0)

    def find_first_unordered(self, bad: np.ndarray, other: np.ndarray, mine: np.ndarray) -> tuple[int, int] | None:
        """(lane, other block) of the first marked pair without such an order. Block numbers come plus 1."""
        for lane, grain in zip(*np.nonzero(bad), strict=True):
            him, me = int(other[lane, grain]) - 1, int(mine[lane]) - 1
            if him < 0 or not self.seen.get(me, 0) >> him & 1:
                return int(lane), him
        return None
