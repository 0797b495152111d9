"""The lanes that run as one: some warps of every block of a wave, with their registers and program counters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..faults import Fault
from ..frontend.program import Program
from ..frontend.syntax import Instruction
from ..frontend.types import BYTES, UNSIGNED
from ..memory.shared_memory import Problem
from .progress import Progress, count_changes
from .wave import Wave


class Blocked(NamedTuple):
    """Lanes that wait at an instruction: at a barrier (its number, its thread count) or for an mbarrier phase."""

    pc: int
    mask: np.ndarray
    barrier: np.ndarray | None = None
    threads: np.ndarray | None = None
    aligned: bool = False  # all threads must wait at this instruction: bar.sync, not barrier.sync
    poll: Callable | None = None  # for an mbarrier: (unit, mask) -> the lanes whose phase has completed
    describe: Callable | None = None  # and (unit, lane) -> what is pending, for a message


class SuspendedLanes(NamedTuple):
    """Lanes that loop in the same state until memory changes; changes: how often it had."""

    pc: int
    mask: np.ndarray
    changes: int


class Unit:
    """Lanes are ordered by block, warp and lane."""

    def __init__(self, program: Program, wave: Wave, warps: range):
        blocks = len(wave.coordinates)
        self.program, self.wave, self.warps = program, wave, warps
        self.merges_warps = len(warps) > 1 and not program.has_wgmma  # only for speed
        self.count = blocks * len(warps) * 32
        shape = (blocks, len(warps), 32)
        index = np.indices(shape).reshape(3, -1)
        self.block, self.warp, self.lane = index[0], index[1] + warps.start, index[2]
        self.thread = self.warp * 32 + self.lane
        self.grid_block = wave.grid_blocks[self.block]  # number of the block in the grid
        self.alive = np.ones(self.count, bool)
        self.runnable: dict[int, np.ndarray] = {0: self.alive.copy()}
        self.waiting: dict[int, np.ndarray] = {}  # for the rest of their warp, by pc
        self.blocked: list[Blocked] = []
        self.carry = np.zeros(self.count, np.int64)
        self.local = np.zeros((self.count, max(program.local_bytes, 1)), np.uint8) if program.local_bytes else None
        self.params = self.make_params()
        self.turns = self.steps = 0
        self.progress = Progress()
        self.suspended: list[SuspendedLanes] = []
        # Asynchronous copies and wgmmas in flight, and the number of groups that each lane has committed.
        self.copies, self.copy_groups = [], np.zeros(self.count, np.int64)
        self.wgmmas, self.wgmma_groups = [], np.zeros(self.count, np.int64)
        self.slots = self.make_slots()

    def make_params(self) -> np.ndarray:
        """(1, bytes) of the kernel's parameters; (lanes, bytes) if parameters of calls follow them."""
        own, size = self.wave.params, self.program.param_bytes
        if size == self.program.function.param_bytes:
            return own[None]
        params = np.zeros((self.count, size), np.uint8)
        params[:, : len(own)] = own
        return params

    def make_slots(self) -> list:
        program = self.program
        slots: list = [None] * program.size
        rows: dict[str, tuple[int, int]] = {}
        sizes: dict[int, int] = {}
        for name in dict.fromkeys(slot.register for slot in program.slots):
            width = BYTES[program.function.registers[name]]
            rows[name] = width, sizes.get(width, 0)
            sizes[width] = sizes.get(width, 0) + 1
        self.files = files = {width: np.zeros((n, self.count), UNSIGNED[width]) for width, n in sizes.items()}
        for slot, number in program.slots.items():
            width, row = rows[slot.register]
            view = files[width][row].view(slot.dtype)
            slots[number] = view[:: len(view) // self.count]  # a narrower type views the lower part
        for number, value in program.constants.items():
            slots[number] = value
        for number, name in program.specials.items():
            slots[number] = self.read_special(name)
        return slots

    def lane_state(self) -> list[np.ndarray]:
        """All state of the lanes but memory, lanes last."""
        known = [*self.files.values(), self.carry, self.copy_groups, self.wgmma_groups]
        return known + [x.T for x in (self.local, self.params) if x is not None and len(x) > 1]

    def read_special(self, name: str) -> np.ndarray:
        wave = self.wave
        axis = "xyz".find(name[-1])
        base = name.rsplit(".", 1)[0]
        if base == "%tid":
            return (self.thread if axis == 0 else np.zeros(self.count)).astype(np.uint32)
        if base == "%ntid":
            return np.uint32(wave.warps * 32 if axis == 0 else 1)
        if base in ("%ctaid", "%clusterid"):
            return wave.coordinates[self.block, axis].astype(np.uint32)
        if base in ("%nctaid", "%nclusterid"):
            return np.uint32(wave.grid[axis])
        known = {
            "%laneid": self.lane, "%warpid": self.warp, "%cluster_ctarank": 0, "%cluster_nctarank": 1,
            "%cluster_ctaid": 0, "%cluster_nctaid": 1, "%dynamic_smem_size": self.program.shared_bytes, "%smid": 0,
            "%lanemask_lt": (1 << self.lane) - 1, "%lanemask_le": (2 << self.lane) - 1, "%lanemask_eq": 1 << self.lane,
            "%lanemask_ge": 0x100000000 - (1 << self.lane), "%lanemask_gt": 0x100000000 - (2 << self.lane),
        }  # fmt: skip
        if base not in known:
            raise Fault("unknown instruction", f"special register {name}")
        return np.asarray(known[base]).astype(np.uint32)

    # -------------------------------------------------------------------------------------------- lanes

    def enqueue(self, pc: int, mask: np.ndarray) -> None:
        if mask.any():
            there = self.runnable.get(pc)
            self.runnable[pc] = mask if there is None else there | mask

    def next_lanes(self) -> tuple[int, np.ndarray]:
        """The lanes with the lowest pc, so that diverged lanes reconverge; now and then those with the highest, which
        the others may wait for."""
        self.turns += 1
        pc = max(self.runnable) if self.turns % 1024 == 0 else min(self.runnable)
        mask = self.runnable.pop(pc)
        if pc in self.waiting:
            mask = mask | self.waiting.pop(pc)
        return pc, mask

    def wait_for_warp(self, pc: int, mask: np.ndarray, lanes: int = 32) -> None:
        there = self.waiting.get(pc)
        mask = mask if there is None else there | mask
        whole, rest = self.split_converged(mask, lanes)
        self.waiting.pop(pc, None)
        if rest.any():
            self.waiting[pc] = rest
        self.enqueue(pc, whole)

    def suspend(self, pc: int, mask: np.ndarray) -> None:
        """Makes lanes wait until memory changes."""
        self.suspended.append(SuspendedLanes(pc, mask, count_changes(self)))

    def wake(self) -> bool:
        """Resumes suspended lanes if memory has changed; returns whether any lane can run."""
        now = count_changes(self)
        for lanes in [s for s in self.suspended if s.changes != now]:
            self.suspended.remove(lanes)
            self.enqueue(lanes.pc, lanes.mask)
        return bool(self.runnable)

    def exit_lanes(self, mask: np.ndarray) -> None:
        self.alive &= ~mask

    def split_converged(self, mask: np.ndarray, lanes: int = 32) -> tuple[np.ndarray, np.ndarray]:
        """(lanes whose warp, or warp group, is complete, the others)."""
        lanes = lanes if self.count % lanes == 0 else 32
        rows, alive = mask.reshape(-1, lanes), self.alive.reshape(-1, lanes)
        whole = np.repeat((rows == alive).all(1), lanes)
        return mask & whole, mask & ~whole

    def find_active_lanes(self, mask: np.ndarray | None) -> np.ndarray:
        return np.arange(self.count) if mask is None else np.flatnonzero(mask)

    def report(self, problem: Problem, instruction: Instruction, lanes) -> None:
        """Handles a problem in shared memory as the caller of the launch chose."""
        self.wave.judge(self.make_shared_fault(problem, instruction, lanes))

    def make_shared_fault(self, problem: Problem, instruction: Instruction, lanes) -> Fault:
        """lanes: those that the problem indexes, or one for all of them."""
        lane = lanes[problem.at] if len(lanes) > 1 else lanes[0]
        other = None if problem.other is None else self.program.instructions[problem.other]
        return self.make_fault(problem.kind, problem.message, instruction, int(lane), "shared memory", other)

    def make_fault(
        self, kind: str, message: str, instruction: Instruction, lane: int,
        tensor: str | None = None, other: Instruction | None = None, element: tuple[int, ...] | None = None,
    ) -> Fault:  # fmt: skip
        block = tuple(int(x) for x in self.wave.coordinates[self.block[lane]])
        kernel = self.program.function.name
        return Fault(kind, message, instruction, block, int(self.thread[lane]), tensor, other, kernel, element)
