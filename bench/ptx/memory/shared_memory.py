"""Shared memory of the blocks that run together, with race detection.

Every warp has a vector clock (FastTrack, Flanagan and Freund, 2009): clocks[block, warp, other] is the time of `other`
up to which this warp has seen its accesses. A barrier makes all accesses of a block visible to all of its warps. Each
grain of memory records its last writer and the time, and the time at which each warp last read it: an access that
conflicts with one that its warp has not seen is a race. One more row of the clocks is the engine of the bulk copies.

One more column for each warp group is for its wgmmas, which may read long after they are issued: its time is the number
of committed groups, and a warp sees it at wgmma.wait_group. A write to an operand of a wgmma must be ordered after that
wait; an mbarrier arrival that releases the slot earlier is too early.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..frontend.types import UNSIGNED
from .segments import reduce_to_grains

THREAD_MASK, ATOMIC_BIT = 0x7FFF, 0x8000  # the lower bits of a write's stamp: the thread, and whether it is an atomic


CloseCheck = Callable[[np.ndarray, np.ndarray, np.ndarray], bool]


class Problem(NamedTuple):
    kind: str
    message: str
    at: int  # index into the lanes of the access
    other: int | None = None  # number of the conflicting instruction, if known


class SharedMemory:
    def __init__(self, blocks: int, size: int, warps: int, grain: int, groups: int = 0):
        """groups: the number of warp groups of a block whose wgmmas are tracked."""
        self.size, self.grain, self.warps = size, grain, warps
        self.rows, columns = warps + 1, warps + 1 + groups
        self.stride = -(-max(size, 1) // 128) * 128
        self.data = np.zeros(blocks * self.stride, np.uint8)
        self.views = {width: self.data.view(dtype) for width, dtype in UNSIGNED.items()}
        grains = len(self.data) // grain
        self.written = np.zeros(grains, np.int64)  # clock << 16 | atomic | thread, 0: never
        self.read = np.zeros((grains, columns), np.int32)  # last reads of each warp, and of each group's wgmmas
        self.wgmma_reader = np.zeros((grains, groups), np.int32)  # instruction number of the last such wgmma
        self.pending_copies = np.zeros(grains, bool)  # destinations of asynchronous copies in flight
        self.changes = 0  # how often its data changed
        self.bulk_reads = np.zeros(grains, np.int16)  # bulk copies in flight that read here
        self.clocks = np.zeros((blocks, self.rows, columns), np.int32)
        self.clocks[:, np.arange(self.rows), np.arange(self.rows)] = 1
        self.proxy_clocks = np.zeros_like(self.clocks)  # what fence.proxy.async made visible to the async proxy
        self.floor = np.zeros((blocks, columns), np.int32)  # what every warp of the block has seen

    # ------------------------------------------------------------------------------------------ clocks

    def sync_blocks(self, blocks: np.ndarray) -> None:
        """A barrier of all warps of these blocks."""
        rows = self.rows
        now = self.clocks[blocks, :, :rows].max(axis=(1, 2))
        self.floor[blocks, :rows] = now[:, None]
        self.floor[blocks, rows:] = self.clocks[blocks, :, rows:].max(axis=1)
        self.clocks[blocks] = self.floor[blocks, None]
        every = np.arange(rows)
        self.clocks[blocks[:, None], every, every] = now[:, None] + 1
        self.proxy_clocks[blocks] = self.proxy_clocks[blocks].max(axis=1, keepdims=True)

    def sync_warps(self, block: int, warps: np.ndarray) -> None:
        """A barrier of some warps of a block."""
        for clocks in (self.clocks, self.proxy_clocks):
            clocks[block, warps] = np.maximum(clocks[block, warps], clocks[block, warps].max(axis=0))
        self.advance_clock(np.full(len(warps), block), warps)

    def proxy_fence(self, block: np.ndarray, warp: np.ndarray) -> None:
        """fence.proxy.async: makes all that these warps have seen or written visible to the async proxy."""
        self.proxy_clocks[block, warp] = np.maximum(self.proxy_clocks[block, warp], self.clocks[block, warp])
        self.advance_clock(block, warp)

    def advance_clock(self, block: np.ndarray, warp: np.ndarray) -> None:
        """The lanes of each of these warps synchronise."""
        self.clocks[block, warp, warp] += 1

    def release(self, block: int, warp: int) -> np.ndarray:
        """The clocks that an arrival passes on: what a warp has seen, and what of it the async proxy sees."""
        return np.stack((self.clocks[block, warp], self.proxy_clocks[block, warp]))

    def acquire(self, block: int, warp: np.ndarray | int, clocks: np.ndarray) -> None:
        """Joins released clocks into those of a warp."""
        for known, more in zip((self.clocks, self.proxy_clocks), clocks, strict=True):
            known[block, warp] = np.maximum(known[block, warp], more)

    # ------------------------------------------------------------------------------------------- indices

    def grain_indices(self, block: np.ndarray, address: np.ndarray, nbytes: int) -> np.ndarray:
        first = (block.astype(np.int64) * self.stride + address) // self.grain
        return first[:, None] + np.arange(max(1, nbytes // self.grain))

    def element_indices(self, block: np.ndarray, address: np.ndarray, width: int, count: int) -> np.ndarray:
        return ((block.astype(np.int64) * self.stride + address) // width)[:, None] + np.arange(count)

    def check_bounds(self, address: np.ndarray, nbytes: int, align: int) -> Problem | None:
        """Whether accesses are within the block's memory and aligned."""
        bad = (address < 0) | (address + nbytes > self.size)
        if bad.any():
            at = int(np.argmax(bad))
            return Problem(
                "out of bounds", f"{nbytes} bytes at {address[at]} of {self.size} bytes of shared memory", at
            )
        bad = address % align != 0
        if bad.any():
            at = int(np.argmax(bad))
            return Problem("misaligned", f"shared address {address[at]} is not a multiple of {align}", at)
        return None

    # -------------------------------------------------------------------------------------------- races

    def find_unseen_writes(self, stamps: np.ndarray, block: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """Mask (n, grains) of writes (clock << 16 | thread) that these threads have not seen."""
        clock = stamps >> 16
        if (clock <= self.floor[block, 0][:, None]).all():
            return np.zeros(stamps.shape, bool)
        writer = stamps & THREAD_MASK
        warp = (thread >> 5)[:, None]
        seen = self.clocks[block[:, None], warp, writer >> 5]
        own = writer >> 5 == warp  # within a warp: the same thread, or a sync since
        fresh = np.where(own, (clock == seen) & (writer != thread[:, None]), clock > seen)
        return fresh & (stamps != 0)

    def find_unfenced_writes(self, stamps: np.ndarray, block: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """Mask of generic-proxy writes with no fence.proxy.async since. Bulk copies write through the async proxy."""
        warp, writer = (thread >> 5)[:, None], (stamps & THREAD_MASK) >> 5
        return ((stamps >> 16) > self.proxy_clocks[block[:, None], warp, writer]) & (writer < self.warps)

    def find_unseen_reads(self, grains: np.ndarray, block: np.ndarray, warp: np.ndarray) -> np.ndarray:
        """Mask (n, grains, columns of the clocks) of reads that this warp has not seen."""
        reads = self.read[grains]
        if (reads <= self.floor[block][:, None]).all():
            return np.zeros(reads.shape, bool)
        late = reads > self.clocks[block, warp][:, None]
        late[np.arange(len(warp)), :, warp] = False
        return late

    def check_read(
        self, block, address, nbytes, thread, async_proxy: bool = False, used_bytes: int | None = None
    ) -> Problem | None:
        """Before a read: no copy in flight to there, and all of it written and seen. Records the read. async_proxy: a
        read through it. used_bytes: mask of the bytes that matter, None: all."""
        grains = self.grain_indices(block, address, nbytes)
        if used_bytes is not None:
            whole = (1 << self.grain) - 1
            grains = grains[:, [used_bytes >> i * self.grain & whole != 0 for i in range(grains.shape[1])]]
        pending = self.pending_copies[grains].any(1)
        if pending.any():
            return Problem(
                "pending copy", "reads what an asynchronous copy has not delivered yet", int(np.argmax(pending))
            )
        stamps = self.written[grains]
        never = (stamps == 0).any(1)
        if never.any():
            at = int(np.argmax(never))
            return Problem("uninitialised", f"reads shared address {address[at]}, which was never written", at)
        racing = self.find_unseen_writes(stamps, block, thread)
        if async_proxy and not racing.any():
            hidden = self.find_unfenced_writes(stamps, block, thread)
            if hidden.any():
                at = int(np.argmax(hidden.any(1)))
                return Problem(
                    "race",
                    f"reads shared address {address[at]} through the async proxy: no fence.proxy.async since the write",
                    at,
                )
        if racing.any():
            at, g = np.argwhere(racing)[0]
            return Problem(
                "race", self.describe_conflict("reads", "wrote", address[at], int(stamps[at, g]) & THREAD_MASK), int(at)
            )
        if not async_proxy:
            warp = thread >> 5
            self.read[grains, warp[:, None]] = self.clocks[block, warp, warp][:, None]
        return None

    def record_wgmma_reads(self, grains: np.ndarray, warp: int, committed: np.ndarray, number: int) -> None:
        """Wgmma `number` of this warp's group reads grains (n, …) in n blocks until it is waited for."""
        self.read[grains, self.rows + warp // 4] = committed[:, None] + 1
        self.wgmma_reader[grains, warp // 4] = number

    def complete_wgmmas(self, block: np.ndarray, warp: np.ndarray, count: np.ndarray) -> None:
        """These warps have waited for the first `count` groups of their wgmmas."""
        where = block, warp, self.rows + warp // 4
        self.clocks[where] = np.maximum(self.clocks[where], count)

    def begin_bulk_read(self, grains: np.ndarray) -> None:
        """A bulk copy starts to read here."""
        self.bulk_reads[grains] += 1

    def end_bulk_read(self, grains: np.ndarray, block: int, warp: int) -> None:
        """A warp has waited for its bulk copy, which counts as its read."""
        self.bulk_reads[grains] -= 1
        self.read[grains, warp] = self.clocks[block, warp, warp]

    def check_write(self, block, address, values, thread, is_close: CloseCheck | None = None) -> Problem | None:
        """Before a write. Writing the value that is already there counts as a read: only a write of another value races
        with it. is_close: whether values to write and the values of other threads differ only by rounding, given
        all values that are written."""
        nbytes = values.dtype.itemsize * values.shape[1]
        grains = self.grain_indices(block, address, nbytes)
        if problem := self.check_pending(grains, address):
            return problem
        stamps, warp = self.written[grains], thread >> 5
        view = self.views[values.dtype.itemsize]
        index = self.element_indices(block, address, values.dtype.itemsize, values.shape[1])
        before = view[index]
        changes = (stamps == 0) | reduce_to_grains(before != values, grains.shape[1])
        overwrites = changes & self.find_unseen_writes(stamps, block, thread)
        unseen_reads = changes & self.find_unseen_reads(grains, block, warp).any(-1)
        clash = self.record_write(grains, changes, stamps, block, thread)
        if not (overwrites | unseen_reads | clash).any():
            return None
        view[index] = values
        clash = clash.any(1) & (view[index] != values).any(1)
        overwrites, unseen_reads = overwrites.any(1), unseen_reads.any(1)
        bad = overwrites | unseen_reads | clash
        if not bad.any():
            return None
        at = int(np.argmax(bad))
        if is_close is not None and not unseen_reads.any():
            wanted, there = (np.concatenate(x) for x in ((values[overwrites], values[clash]),
                                                         (before[overwrites], view[index][clash])))  # fmt: skip
            if is_close(wanted, there, values):
                message = f"writes shared address {address[at]}, where another thread's value differs only by rounding"
                return Problem("last bits", f"{message}: either may remain", at)
        return self.describe_write_race(stamps[at], grains[at], int(address[at]), block[at], thread[at], at)

    def check_copy(self, block, address, nbytes: int, thread) -> Problem | None:
        """Before an asynchronous copy to here, which may write at any time until it is waited for. Records it."""
        grains = self.grain_indices(block, address, nbytes)
        if problem := self.check_pending(grains, address):
            return problem
        stamps = self.written[grains]
        racing = self.find_unseen_writes(stamps, block, thread) | self.find_unseen_reads(
            grains, block, thread >> 5
        ).any(-1)
        self.record_write(grains, np.ones(grains.shape, bool), stamps, block, thread)
        if not racing.any():
            return None
        at = int(np.argmax(racing.any(1)))
        return self.describe_write_race(stamps[at], grains[at], int(address[at]), block[at], thread[at], at)

    def check_pending(self, grains: np.ndarray, address: np.ndarray) -> Problem | None:
        """Before a write: copies in flight to or from there."""
        pending = self.pending_copies[grains].any(1)
        if pending.any():
            at = int(np.argmax(pending))
            return Problem("pending copy", "writes to the destination of an asynchronous copy in flight", at)
        storing = (self.bulk_reads[grains] > 0).any(1)
        if storing.any():
            at = int(np.argmax(storing))
            message = f"writes shared address {address[at]}, which a bulk copy that has not been waited for reads"
            return Problem("race", message, at)
        return None

    def record_write(self, grains, changes, stamps, block, thread) -> np.ndarray:
        """Mask of the writes that conflict with another lane of this instruction. Those without a change are reads."""
        self.changes += bool(changes.any())
        warp = thread >> 5
        now = self.clocks[block, warp, warp]
        mine = np.broadcast_to(((now.astype(np.int64) << 16) | thread)[:, None], grains.shape)
        if changes.all():
            self.written[grains] = mine
            return self.written[grains] != mine
        self.written[grains[changes]] = mine[changes]
        lane, grain = np.nonzero(~changes)
        self.read[grains[lane, grain], warp[lane]] = now[lane]
        return self.written[grains] != np.where(changes, mine, stamps)

    def describe_write_race(self, stamps, grains, address: int, block: int, thread: int, at: int) -> Problem:
        """The access that a lane's write conflicts with, given the stamps and grains that it writes."""
        wrote = self.find_unseen_writes(stamps[None], np.array([block]), np.array([thread]))[0]
        if wrote.any():
            return Problem(
                "race",
                self.describe_conflict("writes", "wrote", address, int(stamps[np.argmax(wrote)]) & THREAD_MASK),
                at,
            )
        late = np.argwhere(self.find_unseen_reads(grains[None], np.array([block]), np.array([thread >> 5]))[0])
        if len(late) == 0:  # two lanes of this instruction
            return Problem("race", self.describe_conflict("writes", "wrote", address, None), at)
        grain, reader = late[0]
        does = f"writes shared address {address}, which"
        if reader < self.rows:
            return Problem("race", f"{does} warp {reader} reads with no barrier between", at)
        group = int(reader) - self.rows
        who = f"a wgmma of warps {4 * group} to {4 * group + 3}"
        message = f"{does} {who} may still read: the write is not ordered after its wgmma.wait_group"
        return Problem("race", message, at, int(self.wgmma_reader[grains[grain], group]))

    def check_atomic(self, block, address, nbytes, thread) -> Problem | None:
        """Before atomics. They do not race with each other, only with plain writes. Records them as writes."""
        grains = self.grain_indices(block, address, nbytes)
        stamps = self.written[grains]
        racing = self.find_unseen_writes(np.where(stamps & ATOMIC_BIT, 0, stamps), block, thread)
        if (stamps == 0).any() or racing.any():
            at = int(np.argmax(((stamps == 0) | racing).any(1)))
            if (stamps[at] == 0).any():
                return Problem("uninitialised", f"updates shared address {address[at]}, which was never written", at)
            return Problem(
                "race", self.describe_conflict("updates", "wrote", address[at], int(stamps[at, 0]) & THREAD_MASK), at
            )
        warp = thread >> 5
        mine = (self.clocks[block, warp, warp].astype(np.int64) << 16) | thread | ATOMIC_BIT
        self.written[grains] = np.broadcast_to(mine[:, None], grains.shape)
        return None

    def describe_conflict(self, does: str, did: str, address: int, thread: int | None) -> str:
        if thread is None:
            return f"{does} shared address {address}, which another thread reads or writes with no barrier between"
        who = f"thread {thread}" if thread >> 5 < self.warps else "a bulk copy"
        return f"{does} shared address {address}, which {who} {did} with no barrier between"

    # -------------------------------------------------------------------------------------------- data

    def load(self, block: np.ndarray, address: np.ndarray, width: int, count: int) -> np.ndarray:
        return self.views[width][self.element_indices(block, address, width, count)]

    def store(self, block: np.ndarray, address: np.ndarray, values: np.ndarray) -> None:
        index = self.element_indices(block, address, values.dtype.itemsize, values.shape[1])
        self.views[values.dtype.itemsize][index] = values

    def record_copies(self, block: np.ndarray, address: np.ndarray, nbytes: int, thread: np.ndarray) -> None:
        """Records the data of an asynchronous copy as written now by these threads, which wait for it."""
        self.changes += 1
        warp = thread >> 5
        mine = (self.clocks[block, warp, warp].astype(np.int64) << 16) | thread
        grains = self.grain_indices(block, address, nbytes)
        self.written[grains] = np.broadcast_to(mine[:, None], grains.shape)


@dataclass
class Mbarrier:
    """An mbarrier object. A phase completes when no arrivals are pending and tx_bytes, its tx-count, is 0."""

    expected: int
    pending: int
    clocks: np.ndarray  # released by the arrivals of completed phases
    arriving_clocks: np.ndarray  # released by the arrivals of this phase
    tx_bytes: int = 0
    phase: int = 0
    deliveries: list = field(default_factory=list)

    def complete_phase(self) -> None:
        if self.pending == 0 and self.tx_bytes == 0:
            self.pending, self.phase = self.expected, self.phase ^ 1
            self.clocks = np.maximum(self.clocks, self.arriving_clocks)
