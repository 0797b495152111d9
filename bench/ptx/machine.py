"""The machine: runs a kernel over a grid, wave by wave, and says what it did.

A wave is as many blocks as fit the lane budget; its lanes run as NumPy arrays, one unit for each group of warps (a
warp, or the four warps of a wgmma). A unit runs until all its lanes wait or are done, then the next one does; the order
of the units turns round after every barrier, so that what one warp must see of another is tried both ways. Clocks tell
what a warp has seen of shared memory, whatever the order. So the first attempt has units of several warps, which take
NumPy no longer than one; where warps of a block turn out to meet in global memory, the launch begins again with a unit
for each warp.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from . import atomics, bulk, copies, loads, matrices, outside, tensor, warps  # noqa: F401  (they register instructions)
from .counts import Counts
from .faults import Fault, Judge
from .mbarriers import Barrier
from .memory import GlobalMemory, WarpsMeet
from .origins import find_origins
from .program import Program
from .progress import IDLE
from .shared import SharedMemory
from .tensors import Named
from .uninitialised import Unwritten
from .unit import Parked, Unit

LANES = 8192  # of a wave, at most (one block at least)
REGISTER_BYTES = 256 << 20  # of a wave's register files


MAX_INSTRUCTIONS = 2_000_000  # of one unit in one wave: past it the kernel counts as endless


class Execution(NamedTuple):
    """A program with what it runs on."""

    program: Program
    grid: tuple[int, int, int]
    threads: int
    params: np.ndarray
    memory: GlobalMemory
    counts: Counts
    judge: Judge


class Wave:
    """Blocks that run together: their shared memory, and the tensors of the launch."""

    def __init__(self, execution: Execution, numbers: np.ndarray):
        program, self.grid, threads, self.params, self.memory, self.counts, self.judge = execution
        self.numbers = numbers
        x, y = self.grid[0], self.grid[1]
        self.coordinates = np.stack([numbers % x, numbers // x % y, numbers // (x * y)], 1)
        self.warps = threads // 32
        groups = -(-self.warps // 4) if program.careful else 0
        self.shared = SharedMemory(len(numbers), program.shared_bytes, self.warps, program.shared_grain, groups)
        self.mbarriers: dict[tuple[int, int], Barrier] = {}
        self.stores: list = []  # bulk stores whose source has not been waited for
        self.arrived: dict[tuple[int, int], int] = {}  # bar.arrive: (block, barrier) -> threads

    def place(self, number: int) -> tuple[int, int, int]:
        """A block of the grid by its number."""
        x, y = self.grid[0], self.grid[1]
        return number % x, number // x % y, number // (x * y)

    def arrive(self, unit: Unit, mask: np.ndarray, numbers: np.ndarray) -> None:
        for block, barrier in zip(unit.block[mask].tolist(), numbers[mask].tolist(), strict=True):
            self.arrived[block, barrier] = self.arrived.get((block, barrier), 0) + 1
        self.shared.changes += 1


def execute(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    params: bytes,
    tensors: Iterable[Named],
    judge: Judge,
    unwritten: Unwritten,
    max_instructions: int = MAX_INSTRUCTIONS,
) -> Counts:
    """Runs every block of the grid on the tensors' own memory. Raises Fault at the first thing that is wrong and that
    `judge` does not let pass. unwritten: the memory that nothing has written so far."""
    tensors, params = list(tensors), np.frombuffer(params, np.uint8)
    find_origins(program, {t.parameter for t in tensors} - {None})
    half, noted = min(max(threads // 64, 1), 4), dict(judge.noted)
    for size in (4,) if program.careful else (half, 1):
        constants = (named for named, _ in program.constant_data)
        memory = GlobalMemory(tensors, constants, program.global_grain, unwritten)
        execution = Execution(program, grid, threads, params, memory, Counts(program.instructions), judge)
        try:
            counts = run_grid(execution, size, max_instructions)
        except WarpsMeet:
            memory.restore()
            judge.noted = dict(noted)
            continue
        unwritten.learn(memory.segments)
        return counts
    raise AssertionError("a unit of one warp that meets another of itself")


def run_grid(execution: Execution, size: int, max_instructions: int) -> Counts:
    """In units of `size` warps."""
    program, grid, threads, _, memory, counts, _ = execution
    blocks = grid[0] * grid[1] * grid[2]
    lane_bytes = sum({slot.register: 8 for slot in program.slots}.values())
    together = max(1, min(LANES // threads, REGISTER_BYTES // (lane_bytes * threads + 1)))
    with np.errstate(all="ignore"):
        for start in range(0, blocks, together):
            wave = Wave(execution, np.arange(start, min(start + together, blocks)))
            run_wave(program, wave, size, max_instructions)
    counts.read_bytes, counts.written_bytes = memory.unique_bytes()
    counts.tensors = memory.traffic(counts)
    return counts


def run_wave(program: Program, wave: Wave, size: int, max_instructions: int) -> None:
    units = [Unit(program, wave, range(w, min(w + size, wave.warps))) for w in range(0, wave.warps, size)]
    while any(unit.wake() for unit in units):
        for unit in units:
            run_unit(program, unit, max_instructions)
        release(program, wave, units)
        units.reverse()
    for unit in units:
        if unit.spinning:
            pc, mask, _ = unit.spinning[0]
            message = "goes round for ever: it comes back to the same state, and nothing else runs that could change it"
            raise unit.fault("endless", message, program.instructions[pc], int(np.argmax(mask)))
    stuck = [unit for unit in units if unit.parked or unit.waiting]
    if stuck:
        raise deadlock(program, wave, stuck)


def run_unit(program: Program, unit: Unit, max_instructions: int) -> None:
    """Until every lane waits or is done."""
    steps, ends, controls, issued = program.steps, program.ends, program.controls, unit.wave.counts.issued
    while unit.ready or unit.wake():
        pc, mask = unit.pick()
        if unit.progress.repeats(unit, pc, mask):
            unit.spin(pc, mask)
            continue
        end = ends[pc]
        whole = bool(mask.all())
        if whole and not (program.careful or unit.waiting):
            issued[pc:end] += unit.count // 32
            for step in steps[pc:end]:
                step(unit, None)
        else:
            mask = run_carefully(program, unit, pc, end, mask)
        unit.steps += end - pc + 1
        if unit.steps > max_instructions:
            message = f"more than {max_instructions} instructions: `max_instructions` of ptx.device allows others"
            raise unit.fault("endless", message, program.instructions[end - 1], int(np.argmax(mask)))
        if unit.progress.idles(unit, max_instructions):
            message = f"{max_instructions // IDLE} instructions without an access to memory: `max_instructions` allows"
            raise unit.fault("endless", f"{message} more", program.instructions[end - 1], int(np.argmax(mask)))
        if not mask.any():
            continue
        if end in controls:
            issued[end] += int(mask.reshape(-1, 32).any(1).sum())
            controls[end](unit, end, mask)
        else:
            unit.push(end, mask)


def run_carefully(program: Program, unit: Unit, pc: int, end: int, mask: np.ndarray) -> np.ndarray:
    """With lanes missing, or wgmma results pending: checked before each instruction. The lanes that came through."""
    issued, n = unit.wave.counts.issued, pc
    while n < end:
        if n in unit.waiting and n != pc:
            mask = mask | unit.waiting.pop(n)
        ragged = unit.split_whole_warps(mask, 128)[1].any()
        if ragged and n in program.convergent:
            mask, rest = unit.split_whole_warps(mask, program.convergent[n])
            if rest.any():
                unit.wait_for_warp(n, rest, program.convergent[n])
            if not mask.any():
                return mask
        active, count = None if mask.all() else mask, int(mask.reshape(-1, 32).any(1).sum())
        while n < end:  # as far as the same lanes go
            if unit.products:
                tensor.pending_use(unit, program.instructions[n], program.uses[n], mask)
            issued[n] += count
            program.steps[n](unit, active)
            n += 1
            if (ragged and n in program.convergent) or n in unit.waiting:
                break
    return mask


# ------------------------------------------------------------------------------------------------ barriers


def release(program: Program, wave: Wave, units: list[Unit]) -> None:
    """Lets the lanes go on whose barrier all threads have reached, and those whose mbarrier is through."""
    for number in sorted(
        {int(n) for unit in units for p in unit.parked if p.barrier is not None for n in p.barrier[p.mask]}
    ):
        release_barrier(program, wave, units, number)
    for unit in units:
        for parked in [p for p in unit.parked if p.ready is not None]:
            free = parked.ready(unit, parked.mask)
            unit.parked.remove(parked)
            unit.push(parked.pc + 1, free)
            if (parked.mask & ~free).any():
                unit.parked.append(parked._replace(mask=parked.mask & ~free))


def release_barrier(program: Program, wave: Wave, units: list[Unit], number: int) -> None:
    blocks = len(wave.numbers)
    arrived, expected = np.zeros(blocks, np.int64), np.full(blocks, wave.warps * 32)
    lowest, highest = np.full(blocks, len(program.instructions)), np.full(blocks, -1)
    at = [(unit, p, p.mask & (p.barrier == number)) for unit in units for p in unit.parked if p.barrier is not None]
    for unit, parked, mask in at:
        block = unit.block[mask]
        arrived += np.bincount(block, minlength=blocks)
        if parked.threads is not None:
            expected[block] = parked.threads[mask]
        if parked.together:
            lowest[block] = np.minimum(lowest[block], parked.pc)
            highest[block] = np.maximum(highest[block], parked.pc)
    for (block, barrier), n in wave.arrived.items():
        arrived[block] += n * (barrier == number)
    different = (lowest < highest) & (highest >= 0)
    if different.any():
        raise at_barrier(units, int(np.argmax(different)), "threads of one block wait at different barriers", program)
    done = arrived >= expected
    if not done.any():
        return
    for block in np.flatnonzero(done).tolist():
        wave.arrived.pop((block, number), None)
    meet(wave, units, at, np.flatnonzero(done), expected)
    for unit, parked, mask in at:
        free = mask & done[unit.block]
        unit.push(parked.pc + 1, free)
        unit.parked = [p for p in unit.parked if p is not parked]
        left = parked.mask & ~free
        if left.any():
            unit.parked.append(parked._replace(mask=left))


def meet(wave: Wave, units: list[Unit], at: list, done: np.ndarray, expected: np.ndarray) -> None:
    """The warps at the barrier have seen each other; all of the block where the barrier takes all of it."""
    shared = wave.shared
    everyone = done[expected[done] == wave.warps * 32]
    shared.barrier(everyone)
    for block in np.setdiff1d(done, everyone).tolist():
        there = np.unique(np.concatenate([unit.warp[mask & (unit.block == block)] for unit, _, mask in at]))
        shared.meet(block, there)


def at_barrier(units: list[Unit], block: int, message: str, program: Program) -> Fault:
    for unit in units:
        for parked in unit.parked:
            lanes = parked.mask & (unit.block == block)
            if lanes.any():
                return unit.fault("barrier", message, program.instructions[parked.pc], int(np.argmax(lanes)))
    raise AssertionError("no lane waits")


def deadlock(program: Program, wave: Wave, units: list[Unit]) -> Fault:
    """Nobody can go on: what the first lane that waits is waiting for. An mbarrier comes before a barrier, where warps
    without a role wait for the end."""
    for unit in units:
        for pc, mask in unit.waiting.items():
            lanes = "its four warps" if program.convergent[pc] > 32 else "the warp"
            message = f"not all lanes of {lanes} reach this instruction, which takes them together"
            return unit.fault("barrier", message, program.instructions[pc], int(np.argmax(mask)))
    parked: Parked
    at = [(unit, parked) for unit in units for parked in unit.parked]
    unit, parked = min(at, key=lambda x: (x[1].ready is None, x[0].warps.start))
    lane = int(np.argmax(parked.mask))
    block = unit.block[lane]
    if parked.ready is not None:
        message = f"waits for an mbarrier that nothing completes: {parked.missing(unit, lane)}"
        places = waiting_places(program, units, block)
        return unit.fault("barrier", "\n  ".join([message, *places]), program.instructions[parked.pc], lane)
    waiting = sum(int((p.mask & (u.block == block)).sum()) for u in units for p in u.parked)
    missing = wave.warps * 32 - waiting
    message = f"{waiting} threads of the block wait here, and {missing} never come: they have left, or wait elsewhere"
    return unit.fault("barrier", message, program.instructions[parked.pc], lane)


def waiting_places(program: Program, units: list[Unit], block: int) -> list[str]:
    """Where the warps of a block wait, one line for each place."""
    places: dict[str, set[int]] = {}
    for unit in units:
        for parked in unit.parked:
            there = unit.warp[parked.mask & (unit.block == block)].tolist()
            places.setdefault(str(program.instructions[parked.pc].location), set()).update(there)
    return [f"warps {sorted(there)} wait at {place}" for place, there in places.items() if there]
